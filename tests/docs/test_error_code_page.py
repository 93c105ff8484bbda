"""The reference of error codes is complete: every code of the source has a meaning and a remedy, no other is there."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def error_codes():
    path = ROOT / "docs" / "_ext" / "error_codes.py"
    spec = importlib.util.spec_from_file_location("error_codes", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["error_codes"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["error_codes"]


def test_every_code_is_described_and_no_other(error_codes) -> None:
    missing, unknown = error_codes.differences()
    assert missing == [], "add a line for each to docs/reference/error_codes.txt (python docs/_ext/error_codes.py)"
    assert unknown == [], "take these lines out of docs/reference/error_codes.txt"


def test_codes_are_found_with_the_exit_code_of_their_class(error_codes) -> None:
    found = error_codes.collect()
    assert len(found) > 400
    assert found["box-inverted"].exit_codes == {2}
    assert found["no-onnxruntime"].exit_codes == {3}
    assert found["accuracy-lost"].exit_codes == {1}
    assert found["os-enospc"].exit_codes == {3}
    assert found["not-found"].modules == {"runtime/serving/app.py"}


def test_descriptions_are_in_order_and_say_something(error_codes) -> None:
    texts = error_codes.descriptions()
    assert list(texts) == sorted(texts)
    assert [code for code, (meaning, remedy) in texts.items() if not meaning.endswith(".") or len(remedy) < 8] == []


def test_a_line_that_is_no_description_is_refused(error_codes, tmp_path: Path) -> None:
    path = tmp_path / "codes.txt"
    path.write_text("box-inverted | only a meaning\n")
    with pytest.raises(ValueError, match=r"codes.txt:1"):
        error_codes.descriptions(path)


def test_the_page_holds_every_code_once_under_a_topic(error_codes) -> None:
    page = error_codes.page()
    for code in error_codes.collect():
        assert page.count(f"({code})=") == 1, code
