"""The page of `qpert search --html`: pictures with their boxes, scores, and where ITC alone had put them."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qpert.runtime.errors import ImageError
from qpert.runtime.gallery.search import Hit, TextHit
from qpert.runtime.html import document, figure, table
from qpert.runtime.inputs.boxes import Boxes
from qpert.runtime.inputs.images import load_image

STYLE = """
.row { display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); gap: 1rem; align-items: start }
.card { border: 1px solid var(--line); border-radius: .5rem; padding: .5rem; background: var(--soft) }
.card p { font-size: .82rem; overflow-wrap: anywhere; font-variant-numeric: tabular-nums }
.place { font-weight: 700; font-size: 1.05rem } .score { float: right; font-weight: 600 }
.move { padding: 0 .35rem; border-radius: .3rem; font-size: .78rem; color: #fff; background: #777a }
.up { background: var(--good) } .down { background: var(--bad) }
.gone { aspect-ratio: 4/3; display: grid; place-items: center; background: var(--soft); font-size: .8rem }
.query { max-width: 26rem } h2 { border-top: 1px solid var(--line); padding-top: 1.2rem }
td.text { max-width: 34rem }
"""
LEGEND = (
    "Score = ITM + ITC for what was re-ranked, ITC alone below. The arrow compares with the rank by ITC alone. "
    "Yellow boxes are what the query perturbation was given."
)


@dataclass(frozen=True)
class Picture:
    """A file and the boxes that it was encoded with."""

    path: Path
    boxes: Boxes | None = None


def render_images(
    gallery: str, count: int, texts: Sequence[str], found: Sequence[Sequence[Hit]], picture: Callable[[str], Picture]
) -> str:
    """Images found for texts; `picture` knows an image's file and boxes by its name."""
    sections = []
    for text, hits in zip(texts, found, strict=True):
        cards = "".join(_card(place, hit, picture(hit.image)) for place, hit in enumerate(hits, start=1))
        sections.append(f'<h2>“{html.escape(text)}”</h2><div class="row">{cards}</div>')
    head = f'<h1>Search in {html.escape(gallery)}</h1><p class="quiet">{count} images. {LEGEND}</p>'
    return document(f"qpert search: {texts[0] if texts else ''}", head + "\n".join(sections), STYLE)


def render_texts(query: Picture, hits: Sequence[TextHit]) -> str:
    """Texts found for an image."""
    rows = [
        (
            f'<span class="place">{place}</span>',
            html.escape(hit.text),
            f"{hit.score:.3f}",
            f"{hit.itc:.3f}",
            "" if hit.itm is None else f"{hit.itm:.3f}",
            f"{hit.rank_itc} {_move(place, hit.rank_itc)}",
            html.escape(hit.image or ""),
        )
        for place, hit in enumerate(hits, start=1)
    ]
    name = html.escape(query.path.name)
    head = f'<h1>Texts for {name}</h1><p class="quiet">{LEGEND}</p><div class="query">{_shown(query)}</div>'
    found = table(("", "text", "score", "ITC", "ITM", "rank by ITC", "its image"), rows)
    return document(f"qpert search: {query.path.name}", head + found, STYLE)


def _card(place: int, hit: Hit, picture: Picture) -> str:
    scores = f"ITC {hit.itc:.3f}" if hit.itm is None else f"ITM {hit.itm:.3f} + ITC {hit.itc:.3f}"
    return (
        f'<div class="card"><p><span class="place">{place}</span> {_move(place, hit.rank_itc)}'
        f'<span class="score">{hit.score:.3f}</span></p>{_shown(picture)}'
        f'<p>{scores}, rank {hit.rank_itc} by ITC</p><p class="quiet">{html.escape(hit.image)}</p></div>'
    )


def _move(place: int, rank_itc: int) -> str:
    """How far re-ranking moved a result."""
    if place == rank_itc:
        return '<span class="move">=</span>'
    up = place < rank_itc
    return f'<span class="move {"up" if up else "down"}">{"▲" if up else "▼"} {abs(place - rank_itc)}</span>'


def _shown(picture: Picture) -> str:
    """The picture as it is meant to be seen; one whose file has gone since is said to have."""
    try:
        return figure(load_image(picture.path), picture.boxes)
    except ImageError:
        return f'<div class="gone">no longer at {html.escape(str(picture.path))}</div>'
