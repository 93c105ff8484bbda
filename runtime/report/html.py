"""A report as one self-contained HTML page without scripts, readable in light and dark mode and on a phone."""

from __future__ import annotations

import base64
import html
import io
import math
from typing import TYPE_CHECKING

from qpert.runtime.errors import ImageError
from qpert.runtime.inputs.boxes import Boxes
from qpert.runtime.inputs.images import load_image
from qpert.runtime.report import model as m

if TYPE_CHECKING:
    from PIL.Image import Image

THUMBNAIL = 420
"""Pixels along the longer side of an embedded picture."""

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; --good: #14804a; --bad: #c02626; --unsure: #b26a00;
  --quiet: #7779; --first: #2f6fdb; --second: #d9822b; --third: #8a8f98; --fourth: #9a5bd0;
  --box: #ffb300; --matched: #ff3d7f }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem;
  overflow-wrap: break-word }
h1 { font-size: 1.5rem; margin-bottom: .3rem } h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem }
h3 { font-size: 1rem; margin: 1.6rem 0 .5rem }
p { margin: .3rem 0 } .quiet { opacity: .7 } li { margin: .2rem 0 }
p.good, p.bad, p.unsure { border-left: .3rem solid; padding: .1rem 0 .1rem .9rem; font-size: 1.1rem; margin: 1rem 0 }
p.good { border-color: var(--good) } p.bad { border-color: var(--bad) } p.unsure { border-color: var(--unsure) }
.badge { padding: .05em .6em; border-radius: .4rem; color: #fff; font-size: .85em; font-weight: 600;
  white-space: nowrap }
.badge.good, .bar i.good { background: var(--good) } .badge.bad, .bar i.bad { background: var(--bad) }
.badge.unsure, .bar i.unsure { background: var(--unsure) } .badge.quiet { background: var(--quiet); opacity: 1 }
.bar i.first { background: var(--first) } .bar i.second { background: var(--second) }
.bar { display: block; min-width: 7rem; height: .7rem; margin: .35rem 0; position: relative; overflow: hidden;
  background: var(--soft); border-radius: .3rem }
.bar i { display: block; height: 100%; border-radius: .3rem }
.bar u { position: absolute; top: 0; bottom: 0; width: 2px; background: CanvasText }
.wide { overflow-x: auto }
table { border-collapse: collapse; margin: .5rem 0; font-size: .95em }
td, th { text-align: left; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top }
td { font-variant-numeric: tabular-nums; min-width: 1rem } td:first-child, .pairs td { max-width: 34rem }
td.number, th.number { text-align: right; white-space: nowrap } th.number { white-space: normal }
tr.strong td { font-weight: 600 }
.grid { display: grid; gap: 1rem 1.6rem; align-items: start; margin: .8rem 0 } .grid > * { min-width: 0 }
.card { border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .8rem; min-width: 0 }
.card.good { border: 2px solid var(--good) } .card p { font-size: .85rem; overflow-wrap: anywhere }
.card > h2, .card > h3 { margin-top: 0 } .card table { width: 100% } .card td { border: 0; vertical-align: middle }
figure { margin: 0; position: relative } img { width: 100%; display: block; border-radius: .3rem }
figure svg { position: absolute; inset: 0; width: 100%; height: 100% }
figure rect { fill: none; stroke: var(--box); stroke-width: 1.5px; vector-effect: non-scaling-stroke }
figure rect.matched { stroke: var(--matched); stroke-width: 3px }
.gone { aspect-ratio: 4/3; display: grid; place-items: center; background: var(--soft); padding: .5rem;
  font-size: .8rem }
pre { background: var(--soft); padding: .7rem 1rem; border-radius: .4rem; overflow-x: auto }
.map { width: 100%; margin: 0 } .map caption { text-align: left; font-weight: 600; padding: .5rem 0 .2rem }
.map th { font-weight: 400; opacity: .75; border: 0; padding: .15rem .5rem .15rem 0;
  width: 4.5rem; vertical-align: middle }
.map th + th { text-align: center; padding-right: 0; width: auto }
.map td { text-align: center; border: 2px solid Canvas; border-radius: .3rem; padding: .3rem .1rem; font-size: .92em }
.map td.unsure { text-decoration: underline dotted; text-underline-offset: .25em }
.map td.best { outline: 2px solid CanvasText; outline-offset: -2px; font-weight: 700 }
.chart { width: 100%; height: auto } .chart text { font: 11px system-ui, sans-serif; fill: currentColor }
.chart path { fill: none } .chart .axis { stroke: var(--line); stroke-width: 1 }
.chart .limit { stroke: var(--bad); stroke-width: 1.5; stroke-dasharray: 4 3 }
.chart .point { fill: var(--good); fill-opacity: .55 } .chart .point.over { fill: var(--bad); fill-opacity: 1 }
.chart .interval { stroke: currentColor; stroke-width: 2 }
.chart .first { fill: var(--first) } .chart .second { fill: var(--second) }
.chart .third { fill: var(--third) } .chart .fourth { fill: var(--fourth) }
@media (max-width: 40rem) { table { font-size: .85em } td, th { padding-right: .5rem } .bar { min-width: 3rem } }
"""


def to_html(report: m.Report) -> str:
    """The whole page."""
    body = "\n".join([f"<h1>{inline(report.heading)}</h1>", *(block(one, 2) for one in report.blocks)])
    return (
        '<!doctype html>\n<html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(report.title)}</title>\n<style>{STYLE}</style>\n{body}\n</html>\n"
    )


def block(one: m.Block, level: int) -> str:
    """One block; `level` is that of a heading inside it."""
    match one:
        case m.Paragraph(text, tone):
            return f"<p{_class(tone)}>{inline(text)}</p>"
        case m.Bullets(lines):
            return f"<ul>{''.join(f'<li>{inline(line)}</li>' for line in lines)}</ul>"
        case m.Code(text):
            return f"<pre>{html.escape(text)}</pre>"
        case m.Table():
            return table(one)
        case m.HeatMap():
            return heat_map(one)
        case m.Chart(svg):
            return f'<div class="wide">{svg}</div>'
        case m.Picture():
            return picture(one)
        case m.Card(blocks, tone):
            return f'<div class="card {tone or ""}">{_blocks(blocks, level)}</div>'
        case m.Grid(blocks, width):
            columns = f"repeat(auto-fill, minmax(min({width}rem, 100%), 1fr))"
            return f'<div class="grid" style="grid-template-columns: {columns}">{_blocks(blocks, level)}</div>'
        case m.Section(title, blocks):
            return f"<h{level}>{inline(title)}</h{level}>\n{_blocks(blocks, min(level + 1, 3))}"
        case _:
            raise m.never(one)


def _blocks(blocks: tuple[m.Block, ...], level: int) -> str:
    return "\n".join(block(one, level) for one in blocks)


def _class(*names: str | None) -> str:
    found = " ".join(filter(None, names))
    return f' class="{found}"' if found else ""


def inline(text: m.Text) -> str:
    return "".join(map(_span, m.spans(text)))


def _span(one: m.Span) -> str:
    match one:
        case str():
            return html.escape(one).replace("\n", "<br>")
        case m.Bold(text):
            return f"<b>{html.escape(text)}</b>"
        case m.Badge(text, tone):
            return f'<span class="badge {tone}">{html.escape(text)}</span>'
        case m.Bar(share, tone, mark):
            line = "" if mark is None else f'<u style="left: calc({100 * mark:.2f}% - 1px)"></u>'
            return f'<span class="bar"><i class="{tone}" style="width: {100 * share:.2f}%"></i>{line}</span>'
        case _:
            raise m.never(one)


def table(one: m.Table) -> str:
    """Columns of numbers are right-aligned; a wide table scrolls."""

    def line(tag: str, cells: tuple[m.Text, ...], name: str | None = None) -> str:
        kinds = (_class("number" if place >= one.words else None) for place in range(len(cells)))
        row = "".join(f"<{tag}{kind}>{inline(cell)}</{tag}>" for kind, cell in zip(kinds, cells, strict=True))
        return f"<tr{_class(name)}>{row}</tr>"

    head = line("th", one.head) if any(one.head) else ""
    last = len(one.rows) - 1 if one.strong_last else None
    rows = "".join(line("td", row, "strong" if place == last else None) for place, row in enumerate(one.rows))
    kind = "" if any(one.head) else ' class="pairs"'
    legend = "".join(f'<p class="quiet">{html.escape(text)}</p>' for text in one.legend)
    return f'<div class="wide"><table{kind}>{head}{rows}</table></div>{legend}'


def heat_map(one: m.HeatMap) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in (one.corner, *one.columns))
    rows = "".join(f"<tr><th>{html.escape(name)}</th>{''.join(map(_heat, values))}</tr>" for name, values in one.rows)
    return f'<table class="map"><caption>{html.escape(one.title)}</caption><tr>{head}</tr>{rows}</table>'


def _heat(one: m.Heat) -> str:
    """The colour's depth is the square root of the weight, so that small differences are visible."""
    colour = "20 128 74" if one.weight > 0 else "192 38 38"
    style = f"background: rgb({colour} / {0.6 * math.sqrt(abs(one.weight)):.3f})"
    kind = _class("heat", "best" if one.best else None, "unsure" if one.unsure else None)
    return f'<td{kind} style="{style}" title="{html.escape(one.note)}">{html.escape(one.text)}</td>'


def picture(one: m.Picture) -> str:
    """The picture, upright and scaled down, with its boxes; or the reason why it cannot be read."""
    try:
        return figure(load_image(one.path), one.boxes, one.matched)
    except ImageError as error:
        why = str(error) if one.path.exists() else f"no longer at {one.path}"
        return f'<div class="gone">{html.escape(why)}</div>'


def figure(image: Image, boxes: Boxes | None = None, matched: int | None = None) -> str:
    """An embedded JPEG; a box's label shows on hover, and box number `matched` stands out."""
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=88)
    data = base64.b64encode(stream.getvalue()).decode()
    return f'<figure><img src="data:image/jpeg;base64,{data}" alt="">{_rectangles(boxes, matched)}</figure>'


def _rectangles(boxes: Boxes | None, matched: int | None) -> str:
    if boxes is None or not len(boxes):
        return ""
    labels = boxes.labels or ("",) * len(boxes)
    rectangles = "".join(
        f'<rect{_class("matched" if number == matched else None)} x="{x1:g}" y="{y1:g}" width="{x2 - x1:g}" '
        f'height="{y2 - y1:g}">'
        f"<title>{html.escape(label)}</title></rect>"
        for number, ((x1, y1, x2, y2), label) in enumerate(zip(boxes.xyxy, labels, strict=True))
    )
    width, height = boxes.size
    return f'<svg viewBox="0 0 {width} {height}" preserveAspectRatio="none">{rectangles}</svg>'
