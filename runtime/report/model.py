"""A report as data, written the same way for a page, for Markdown and for a terminal.

Text is plain everywhere: the back-ends escape it. Only a page has bars, charts, heat maps, pictures and cards; Markdown
and the terminal leave them out, and any section or table column that contains nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NoReturn, TypeAlias

from qpert.runtime.inputs.boxes import Boxes

UNDEFINED = "–"
Tone = Literal["good", "bad", "unsure", "quiet", "first", "second", "third", "fourth"]
"""A meaning that back-ends colour; `first` to `fourth` are series that a chart compares."""


@dataclass(frozen=True)
class Bold:
    """Emphasised text."""

    text: str


@dataclass(frozen=True)
class Badge:
    """A word on a coloured background, such as a verdict."""

    text: str
    tone: Tone


@dataclass(frozen=True)
class Bar:
    """A share of the whole, 0 to 1, and a mark at another share."""

    share: float
    tone: Tone = "good"
    mark: float | None = None


Span: TypeAlias = str | Bold | Badge | Bar
Text: TypeAlias = Span | tuple[Span, ...]
"""Spans follow each other without a space."""


@dataclass(frozen=True)
class Paragraph:
    """One or more lines of text."""

    text: Text
    tone: Tone | None = None


@dataclass(frozen=True)
class Bullets:
    """A list."""

    lines: tuple[Text, ...]


@dataclass(frozen=True)
class Code:
    """Verbatim text."""

    text: str


@dataclass(frozen=True)
class Table:
    """A table; all columns but the first `words` hold numbers.

    legend: lines below it. strong_last: emphasise the last row, to compare it with the others.
    """

    head: tuple[str, ...]
    rows: tuple[tuple[Text, ...], ...]
    words: int = 1
    legend: tuple[str, ...] = ()
    strong_last: bool = False

    def without_bars(self) -> Table:
        """The same without the columns that hold bars."""
        kept = [place for place in range(len(self.head)) if not any(isinstance(row[place], Bar) for row in self.rows)]
        rows = tuple(tuple(row[place] for place in kept) for row in self.rows)
        words = sum(place < self.words for place in kept)
        return replace(self, head=tuple(self.head[place] for place in kept), rows=rows, words=words)


@dataclass(frozen=True)
class Heat:
    """One value of a heat map. weight: −1 (deepest red) to 1 (deepest green). note: shown on hover."""

    text: str
    weight: float
    note: str
    best: bool = False
    unsure: bool = False


@dataclass(frozen=True)
class HeatMap:
    """Values by two settings: `columns` across, the name of each row down."""

    title: str
    corner: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Heat, ...]], ...]


@dataclass(frozen=True)
class Chart:
    """An SVG drawing made by `charts`, the only markup in a report."""

    svg: str


@dataclass(frozen=True)
class Picture:
    """An image file with its boxes; replaced by a note if it can no longer be read.

    `matched`: the number of the box to stand out.
    """

    path: Path
    boxes: Boxes | None = None
    matched: int | None = None


@dataclass(frozen=True)
class Card:
    """Blocks in a frame, whose colour is `tone`."""

    blocks: tuple[Block, ...]
    tone: Tone | None = None


@dataclass(frozen=True)
class Grid:
    """Blocks side by side if the page is wide enough: each at least `width` rem."""

    blocks: tuple[Block, ...]
    width: int


@dataclass(frozen=True)
class Section:
    """A title with blocks. details: supplementary; collapsed in Markdown, left out in a terminal."""

    title: Text
    blocks: tuple[Block, ...]
    details: bool = False


Block: TypeAlias = Paragraph | Bullets | Code | Table | HeatMap | Chart | Picture | Card | Grid | Section


@dataclass(frozen=True)
class Report:
    """title: of the browser window. heading: the first line."""

    title: str
    heading: Text
    blocks: tuple[Block, ...]


def readable(blocks: Iterable[Block], *, details: bool) -> Iterator[Paragraph | Bullets | Code | Table | Section]:
    """The blocks that Markdown and a terminal can show, grids flattened; see the module for what is left out."""
    for one in blocks:
        if isinstance(one, Grid):
            yield from readable(one.blocks, details=details)
        elif isinstance(one, Table):
            yield one.without_bars()
        elif isinstance(one, Section):
            inside = tuple(readable(one.blocks, details=details))
            if inside and (details or not one.details):
                yield replace(one, blocks=inside)
        elif isinstance(one, Paragraph | Bullets | Code):
            yield one


def spans(text: Text) -> tuple[Span, ...]:
    return text if isinstance(text, tuple) else (text,)


def paragraphs(*lines: Text, tone: Tone | None = None) -> tuple[Paragraph, ...]:
    return tuple(Paragraph(line, tone) for line in lines)


def pairs(values: Mapping[str, str]) -> Table:
    """Names and values, without a header."""
    return Table(("", ""), tuple(values.items()), words=2)


def number(value: float | None, form: str, undefined: str = UNDEFINED) -> str:
    """A number in a format such as `.2f`."""
    return undefined if value is None else format(value, form)


def verdict_badge(passed: bool, *, loud: bool = False) -> Badge:
    """`pass` or `FAIL`; `loud` is for a heading."""
    return Badge("PASS" if loud and passed else "pass" if passed else "FAIL", "good" if passed else "bad")


def never(value: NoReturn) -> AssertionError:
    """To raise where a `match` is complete, which mypy checks. (`typing.assert_never` is there from Python 3.11 on.)"""
    return AssertionError(f"{value!r} is no part of a report that this writer knows; please report this")
