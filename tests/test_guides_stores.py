"""The guides to filters and vector stores: every command and program in them runs."""

import json
import os
import re
import shlex
from pathlib import Path

import pytest
from running_postgres import is_available, running_postgres

from qpert.runtime.cli import run

ROOT = Path(__file__).parents[1]
GUIDES = {name: (ROOT / "docs" / "guides" / f"{name}.md").read_text(encoding="utf-8")
          for name in ("filters", "vector-stores")}  # fmt: skip


def blocks(name, language):
    return re.findall(rf"```{language}\n(.*?)```", GUIDES[name], flags=re.DOTALL)


@pytest.fixture
def reader(tmp_path, demo_bundle, monkeypatch):
    (tmp_path / "qpert-blip2-demo-fp32").symlink_to(demo_bundle)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "photos.jsonl").write_text(blocks("filters", "text")[0])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_blocks(name):
    ran = 0
    for block in blocks(name, "sh"):
        for line in block.splitlines():
            program, *arguments = shlex.split(os.path.expandvars(line))
            assert program == "qpert"
            assert run(arguments) == 0, line
            ran += 1
    return ran


def run_python(name):
    (code,) = blocks(name, "python")
    names = {}
    exec(code, names)
    return names["hits"]


def test_the_guide_to_filters(reader, capsys):
    assert run_blocks("filters") == 3
    hits = json.loads(capsys.readouterr().out.splitlines()[-1])["hits"]
    assert {Path(hit["image"]).stem for hit in hits} == {"coffee", "rocket"}
    assert [hit.image for hit in run_python("filters")] == ["examples/photos/coffee.jpg"]


@pytest.mark.slow
def test_the_guide_to_vector_stores(reader, monkeypatch):
    pytest.importorskip("psycopg")
    pytest.importorskip("qdrant_edge")
    if not is_available():
        pytest.skip("no PostgreSQL with pgvector here; `make postgres-env` gets one")
    with running_postgres() as server:
        monkeypatch.setenv("DATABASE", server.url)
        assert run_blocks("vector-stores") == 7
    assert {Path(hit.image).stem for hit in run_python("vector-stores")} == {"coffee", "rocket"}
