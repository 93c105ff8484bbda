"""A report on the terminal; in colour only if stdout is a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from qpert.runtime.report import model as m

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.text import Text as RichText

STYLES = {"good": "bold green", "bad": "bold red", "unsure": "bold yellow", "quiet": "dim"}
STYLES |= dict.fromkeys(("first", "second", "third", "fourth"), "")


def print_report(report: m.Report, console: Console | None = None) -> None:
    """Print to stdout, without sections of details."""
    from rich.console import Console
    from rich.text import Text as RichText

    console = console or Console(highlight=False)
    for part in (inline(report.heading, "bold"), *parts(report.blocks)):
        console.print(part, soft_wrap=isinstance(part, RichText))


def parts(blocks: tuple[m.Block, ...]) -> Iterator[RenderableType]:
    """The renderables of the blocks."""
    for one in m.readable(blocks, details=False):
        match one:
            case m.Paragraph(text, tone):
                yield inline(text, STYLES[tone] if tone else "")
            case m.Bullets(lines):
                yield from (inline(("- ", *m.spans(line))) for line in lines)
            case m.Code(text):
                yield inline(text)
            case m.Table(legend=legend):
                yield table(one)
                yield from map(inline, legend)
            case m.Section(title, inside):
                yield inline(title, "bold")
                yield from parts(inside)
            case _:
                raise m.never(one)


def inline(text: m.Text, style: str = "") -> RichText:
    from rich.text import Text as RichText

    return RichText.assemble(*(_span(one) for one in m.spans(text)), style=style)


def _span(one: m.Span) -> tuple[str, str]:
    match one:
        case str():
            return one, ""
        case m.Bold(text):
            return text, "bold"
        case m.Badge(text, tone):
            return text, STYLES[tone]
        case m.Bar():
            return "", ""
        case _:
            raise m.never(one)


def table(one: m.Table) -> RenderableType:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table as RichTable

    made = RichTable(box=SIMPLE_HEAD, show_header=any(one.head))
    for place, name in enumerate(one.head):
        made.add_column(inline(name), overflow="fold", justify="left" if place < one.words else "right")
    for row in one.rows:
        made.add_row(*map(inline, row))
    return made
