"""What README and docs tell their reader to type: the pages, their blocks, and how a command line is checked."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import click
import pytest

from qpert.exporter.commands.export import command as export_command
from qpert.runtime.cli import cli

REPOSITORY = Path(__file__).parents[1]
DOCS = REPOSITORY / "docs"
SHELL = ("sh", "bash", "console", "shell")
SLOW = ("eval", "bench", "calibrate", "quantize", "build", "serve")
"""Commands that go through a whole data set, compile, or stay."""


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(REPOSITORY)}:{self.line}"


def pages() -> list[Path]:
    """README, the project's own files for people, and every page that is written by hand."""
    own = [REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")]
    return [*own, *sorted(path for path in DOCS.rglob("*.md") if "generated" not in path.parts)]


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^([ \t]*)```(\w*)[^\n]*\n(.*?)^\1```", text, flags=re.DOTALL | re.MULTILINE)
    return [Block(page, text.count("\n", 0, match.start()) + 1, match[2], match[3]) for match in found]


def command_lines(block: Block) -> list[list[str]]:
    """The words of every command of a shell block; a line that ends in a backslash goes on."""
    joined = re.sub(r"\\\n\s*", " ", block.text)
    lines = [line.strip().removeprefix("$ ") for line in joined.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def is_quick(line: list[str]) -> bool:
    """Whether a `qpert` command takes seconds on the demonstration."""
    return line[1] not in SLOW and "--level" not in line


def check_options(line: list[str]) -> None:
    """Fail where a `qpert` or `qpert-export` line names a command or an option that does not exist."""
    words = ["qpert", "export", *line[1:]] if line[0] == "qpert-export" else line
    if len(words) == 1 or words[1].startswith("-"):
        return
    if words[1] == "export":
        with export_command.make_context("export", words[2:]) as context:
            name, family_command, options = export_command.resolve_command(context, words[2:])
            assert family_command is not None, " ".join(line)
            parse(family_command, str(name), list(options), context)
        return
    command = cli.get_command(click.Context(cli), words[1])
    assert command is not None, f"there is no command {words[1]}: {' '.join(line)}"
    rest = words[2:]
    while isinstance(command, click.Group) and rest:
        command = command.get_command(click.Context(command), rest[0])
        assert command is not None, " ".join(line)
        rest = rest[1:]
    parse(command, words[1], rest, None)


def parse(command: click.Command, name: str, arguments: list[str], parent: click.Context | None) -> None:
    """Parse without running. That a named file is not here is no fault of the page."""
    if {"--help", "-h"} & {*arguments}:
        return
    try:
        command.make_context(name, arguments, parent=parent)
    except click.BadParameter as error:
        if "does not exist" not in error.message:
            pytest.fail(f"{name} {' '.join(arguments)}: {error.format_message()}")
    except click.UsageError as error:
        pytest.fail(f"{name} {' '.join(arguments)}: {error.format_message()}")
