"""A report as GitHub's Markdown, for a pull request or a release's notes."""

from __future__ import annotations

import re

from qpert.runtime.report import model as m

SPECIAL = re.compile(r"[\\`*<>\[\]|~&]|(?<!\w)_|_(?!\w)|^\s*[#+=\-]|^\s*\d+[.)](?=\s|$)")
"""What Markdown would read as markup, which an underscore inside a word is not."""


def to_markdown(report: m.Report) -> str:
    """The whole document; its first heading is at level two."""
    return f"## {inline(report.heading)}\n\n{joined(report.blocks, 3)}\n"


def joined(blocks: tuple[m.Block, ...], level: int) -> str:
    """Blocks separated by an empty line; `level` is that of their headings."""
    return "\n\n".join(block(one, level) for one in m.readable(blocks, details=True))


def block(one: m.Paragraph | m.Bullets | m.Code | m.Table | m.Section, level: int) -> str:
    match one:
        case m.Paragraph(text, tone):
            return f"**{inline(text)}**" if tone in ("good", "bad", "unsure") else inline(text)
        case m.Bullets(lines):
            return "\n".join(f"- {inline(line)}" for line in lines)
        case m.Code(text):
            fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
            return f"{fence}\n{text}\n{fence}"
        case m.Table():
            return table(one)
        case m.Section(title, blocks, True):
            return f"<details><summary>{inline(title)}</summary>\n\n{joined(blocks, level + 1)}\n\n</details>"
        case m.Section(title, blocks):
            return f"{'#' * level} {inline(title)}\n\n{joined(blocks, level + 1)}"
        case _:
            raise m.never(one)


def inline(text: m.Text) -> str:
    return "".join(map(_span, m.spans(text)))


def _span(one: m.Span) -> str:
    match one:
        case str():
            return escaped(one)
        case m.Bold(text) | m.Badge(text, "bad"):
            return f"**{escaped(text)}**"
        case m.Badge(text):
            return escaped(text)
        case m.Bar():
            return ""
        case _:
            raise m.never(one)


def escaped(text: str) -> str:
    """Text that Markdown shows unchanged, on one line: a bar or a line break would end a table cell."""
    return SPECIAL.sub(lambda match: match[0][:-1] + "\\" + match[0][-1], " ".join(text.splitlines()))


def table(one: m.Table) -> str:
    def line(cells: tuple[m.Text, ...]) -> str:
        return "| " + " | ".join(map(inline, cells)) + " |"

    rule = tuple("---" if place < one.words else "---:" for place in range(len(one.head)))
    lines = [line(one.head), "| " + " | ".join(rule) + " |", *map(line, one.rows)]
    return "\n\n".join(["\n".join(lines), *map(escaped, one.legend)])
