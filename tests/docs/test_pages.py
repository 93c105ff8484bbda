"""Every command and every program in README and docs works as written, and every link leads somewhere."""

from __future__ import annotations

import ast
import importlib
import json
import re
import shutil
from pathlib import Path

import pytest
from documentation import DOCS, REPOSITORY, SHELL, Block, blocks_of, check_options, command_lines, is_quick, pages
from raw_yolox import export_raw_yolox

from qpert.runtime.cli import run

PAGES = pages()
BLOCKS = [block for page in PAGES for block in blocks_of(page)]
COMMANDS = [block for block in BLOCKS if block.language in SHELL]
RUN = (
    "start.md",
    "guides/boxes.md",
    "guides/search.md",
    "guides/python.md",
    "guides/without-python.md",
    "concepts/parity.md",
    "troubleshooting.md",
)
"""Pages whose quick commands and whose programs are run, from top to bottom, on the demonstration."""
PROGRAMS = ("qpert", "qpert-export", "make", "pip", "python", "curl", "printf", "hf", "cd", "git", "pytest", "export")
FIRST_INDEX = ["index", "qpert-blip2-demo-fp32", "examples/photos", "--boxes", "examples/photos/boxes.jsonl"]


@pytest.fixture
def reader(tmp_path: Path, demo_bundle: Path, copy_of, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as a reader has it: the repository's examples, and the exported demonstration."""
    copy_of(demo_bundle).rename(tmp_path / "qpert-blip2-demo-fp32")
    (tmp_path / "examples").symlink_to(REPOSITORY / "examples")
    (tmp_path / "texts.txt").write_text("a cup of coffee\na cat\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_there_are_pages_with_commands_and_programs() -> None:
    assert len(PAGES) > 20
    assert sum(block.language in SHELL for block in BLOCKS) > 15
    assert {DOCS / "index.md", DOCS / "start.md"} <= set(PAGES)


@pytest.mark.parametrize("block", COMMANDS, ids=[block.place for block in COMMANDS])
def test_commands_name_options_and_files_that_exist(block: Block) -> None:
    lines = command_lines(block)
    assert lines, block.place
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):", makefile, flags=re.MULTILINE))
    for line in lines:
        if line[0] in ("qpert", "qpert-export"):
            check_options(line)
        if line[0] == "make":
            assert {word for word in line[1:] if "=" not in word and not word.startswith("-")} <= targets, line
        named = [word for word in line if re.match(r"(examples|tools|benchmarks|tests|docs|exporter|runtime)/", word)]
        assert [word for word in named if not (REPOSITORY / word).exists()] == [], block.place


@pytest.mark.slow
@pytest.mark.parametrize("name", RUN)
def test_quick_commands_and_programs_of_a_page_run_in_order(name: str, reader: Path) -> None:
    ran = 0
    if name == "guides/boxes.md":
        export_raw_yolox(reader / "checkpoint", reader / "detector")
    if name in ("guides/search.md", "guides/python.md"):  # the reader comes from `start.md`
        assert run([*FIRST_INDEX, "--out", "gallery"]) == 0
    for block in blocks_of(DOCS / name):
        if block.language == "python":
            exec(compile(block.text, block.place, "exec"), {})
            ran += 1
        for line in command_lines(block) if block.language in SHELL else []:
            if line[0] == "qpert" and is_quick(line):
                shutil.rmtree(line[line.index("--out") + 1], ignore_errors=True) if "--out" in line else None
                assert run(line[1:]) == 0, f"{block.place}: {' '.join(line)}"
                ran += 1
    assert ran > 0


@pytest.mark.parametrize(
    "block",
    [block for block in BLOCKS if block.language in ("python", "json")],
    ids=[block.place for block in BLOCKS if block.language in ("python", "json")],
)
def test_programs_are_well_formed_and_import_names_that_exist(block: Block) -> None:
    if block.language == "json":
        lines = [line for line in block.text.splitlines() if line.strip()]
        whole = all(line.startswith("{") and line.endswith("}") for line in lines)  # JSON Lines
        assert [json.loads(line) for line in lines] if whole else json.loads(block.text)
        return
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "qpert":
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name) or importlib.import_module(f"{node.module}.{alias.name}"), (
                    block.place
                )


@pytest.mark.parametrize("page", PAGES, ids=[page.relative_to(REPOSITORY).as_posix() for page in PAGES])
def test_links_lead_to_files_and_headings_that_exist(page: Path) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\((?!https?:|mailto:|<)([^)\s]+)\)", text):
        path, _, heading = target.partition("#")
        there = (page.parent / path) if path else page
        assert there.exists(), f"{page.name} links to {target}"
        if path.endswith(".md") and heading:
            headings = re.findall(r"^#+ (.+)$|^\((.+)\)=$", there.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert heading in {slug(title or label) for title, label in headings}, f"{page.name} links to {target}"


def slug(heading: str) -> str:
    """As GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def test_readme_names_every_guide_or_their_folder() -> None:
    assert "(docs/guides)" in (REPOSITORY / "README.md").read_text(encoding="utf-8")
