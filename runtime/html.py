"""Self-contained pages: one style, tables, and pictures with their boxes, all inside one HTML file."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qpert.runtime.inputs.boxes import Boxes

if TYPE_CHECKING:
    from PIL.Image import Image

THUMBNAIL = 420
"""Pixels along the longer side of an embedded picture."""

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --good: #14804a; --bad: #c02626; --box: #ffb300 }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem; margin-bottom: .3rem } h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem }
h3 { font-size: 1rem; margin: 1.6rem 0 .5rem }
p { margin: .3rem 0 } .quiet { opacity: .7 }
figure { margin: 0; position: relative } img { width: 100%; display: block; border-radius: .3rem }
svg { position: absolute; inset: 0; width: 100%; height: 100% }
rect { fill: none; stroke: var(--box); stroke-width: 1.5px; vector-effect: non-scaling-stroke }
table { border-collapse: collapse; margin: .5rem 0 }
td, th { text-align: left; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid var(--line) }
td { font-variant-numeric: tabular-nums }
"""


def document(title: str, body: str, style: str = "") -> str:
    """A whole page; `body` is markup, `style` more CSS."""
    return (
        '<!doctype html>\n<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}{style}</style>\n{body}\n</html>\n"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table; cells are markup already."""
    header = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{header}</tr>{body}</table>"


def figure(image: Image, boxes: Boxes | None = None) -> str:
    """A picture, scaled down, with its boxes drawn over it; a box's label shows when it is pointed at."""
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=88)
    data = base64.b64encode(stream.getvalue()).decode()
    return f'<figure><img src="data:image/jpeg;base64,{data}" alt="">{_drawn(boxes)}</figure>'


def _drawn(boxes: Boxes | None) -> str:
    if boxes is None or not len(boxes):
        return ""
    labels = boxes.labels or ("",) * len(boxes)
    rectangles = "".join(
        f'<rect x="{x1:g}" y="{y1:g}" width="{x2 - x1:g}" height="{y2 - y1:g}">'
        f"<title>{html.escape(label)}</title></rect>"
        for (x1, y1, x2, y2), label in zip(boxes.xyxy, labels, strict=True)
    )
    width, height = boxes.size
    return f'<svg viewBox="0 0 {width} {height}" preserveAspectRatio="none">{rectangles}</svg>'
