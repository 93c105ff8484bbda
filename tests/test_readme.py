"""What the README says to type works as written."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from click import Context
from raw_yolox import export_raw_yolox

from qpert.exporter.commands.export import command as export_command
from qpert.runtime import Boxes, Retriever
from qpert.runtime.cli import cli, run

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def command_lines() -> list[list[str]]:
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.fixture
def reader(tmp_path: Path, demo_bundle: Path, copy_of, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as the README's reader has it: the repository's examples, the exported demonstration, and a detector."""
    copy_of(demo_bundle).rename(tmp_path / "qpert-blip2-demo-fp32")
    export_raw_yolox(tmp_path / "checkpoint", tmp_path / "detector")
    (tmp_path / "examples").symlink_to(REPOSITORY / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_ten_lines_run_and_give_what_their_comments_say(reader: Path) -> None:
    (code,) = blocks("python")
    names: dict = {}
    exec(code, names)
    assert names["itc"].shape == (2, 2)
    assert names["itm"].shape == (2, 1)
    assert [hit.rank_itc for hit in sorted(names["hits"], key=lambda hit: hit.rank_itc)] == [1, 2]
    assert {hit.image for hit in names["hits"]} == set(names["photos"])


def test_the_lines_without_qpert_give_what_the_runtime_gives(reader: Path) -> None:
    """1e-5: the networks are the same sessions on the same inputs, but threads may share the work out differently."""
    guide = (REPOSITORY / "docs" / "guides" / "without-python.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", guide, flags=re.DOTALL)
    assert "qpert." not in code
    names: dict = {}
    exec(code, names)
    boxes = Boxes(xyxy=[[132, 347, 209, 423]], size=(512, 512))
    with Retriever.open("qpert-blip2-demo-fp32") as retriever:
        features = retriever.encode_images(["examples/photos/astronaut.jpg"], boxes=[boxes])
        tokens = retriever.encoder.tokenizer.encode(["A round, BLUE patch!"])
    np.testing.assert_allclose(names["queries"], features.query_embeds, rtol=0, atol=1e-5)
    assert names["ids"] == tokens.input_ids[0].tolist()


def is_quick(line: list[str]) -> bool:
    """Whether a command takes seconds: whatever goes through a whole data set takes minutes, and a service stays."""
    return line[1] not in ("eval", "bench", "calibrate", "quantize", "build", "serve") and "--level" not in line


@pytest.mark.slow
def test_quick_commands_succeed_in_the_order_in_which_they_are_read(reader: Path) -> None:
    lines = [line for line in command_lines() if line[0] == "qpert" and is_quick(line)]
    assert {line[1] for line in lines} >= {"verify", "inspect", "doctor", "detect", "index", "search"}
    for line in lines:
        assert run(line[1:]) == 0, " ".join(line)
    assert (reader / "found.html").exists()


@pytest.mark.parametrize(
    "line", [line for line in command_lines() if line[0] == "qpert" and not is_quick(line)], ids=" ".join
)
def test_commands_that_take_minutes_name_options_that_exist(line: list[str]) -> None:
    assert cli.get_command(Context(cli), line[1]).make_context(line[1], line[2:]).params["bundle"]


@pytest.mark.parametrize("line", [line for line in command_lines() if line[0] == "qpert-export"], ids=" ".join)
def test_export_commands_name_options_that_exist(line: list[str]) -> None:
    with export_command.make_context("export", line[1:]) as context:
        name, family_command, options = export_command.resolve_command(context, line[1:])
        assert name in {"blip2", "clip", "coca", "siglip", "detector"}
        family_command.make_context(name, options, parent=context)  # raises for an option that it does not know


def test_every_make_target_that_is_named_exists() -> None:
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):", makefile, flags=re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z][\w-]+)", README))
    assert {"demo", "test"} <= named <= targets


def test_every_file_and_folder_that_is_linked_exists() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert links
    assert [link for link in links if not (REPOSITORY / link).exists()] == []


def test_the_table_of_speed_and_accuracy_is_that_of_the_committed_results() -> None:
    spec = importlib.util.spec_from_file_location("readme_table", REPOSITORY / "benchmarks" / "readme_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.written(README, module.table()) == README, "run benchmarks/readme_table.py --write"
    assert len(module.table().splitlines()) > 15
