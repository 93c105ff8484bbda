"""The page that `make demo` leaves: self-contained HTML, made from results alone."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from PIL import Image

from qpert.runtime import Boxes, Hit
from qpert.runtime.html import document, figure, table
from qpert.runtime.inputs.datasets import RetrievalDataset

SHOWN = 4
"""Pictures shown of each search."""


@dataclass(frozen=True)
class Search:
    """One caption's results. Ranks count from 1 and are by ITC; hits are re-ranked, best first."""

    caption: str
    target: str
    rank_stock: int
    rank_perturbed: int
    hits_stock: list[Hit]
    hits: list[Hit]

    @staticmethod
    def place(hits: Sequence[Hit], target: str) -> str:
        """At which place the target lies after re-ranking."""
        return next((str(place) for place, hit in enumerate(hits, 1) if hit.image == target), f"below {len(hits)}")


def render(
    dataset: RetrievalDataset,
    boxes: list[Boxes],
    searches: list[Search],
    *,
    verdict: str,
    notes: Sequence[str],
    recalls: Mapping[str, Mapping[int, float | None]],
    timings: Mapping[str, float],
) -> str:
    """The whole page."""
    index = {name: number for number, name in enumerate(dataset.names)}

    def picture(name: str) -> str:
        return figure(Image.open(dataset.images[index[name]]), boxes[index[name]])

    body = BODY.format(
        verdict=html.escape(verdict),
        notes=" ".join(f"{html.escape(note[:1].upper() + note[1:])}." for note in notes),
        counts=f"{len(dataset)} generated pictures, {len(dataset.captions)} captions",
        recalls=table(
            ("ITC alone, text to image", "R@1", "R@5", "R@10"),
            [
                (name, *(f"{value:.1f} %" for value in found.values() if value is not None))
                for name, found in recalls.items()
            ],
        ),
        summary=table(
            ("caption", "ITC, without boxes", "ITC, with boxes", "re-ranked, without", "re-ranked, with"),
            [
                (
                    html.escape(search.caption),
                    str(search.rank_stock),
                    str(search.rank_perturbed),
                    search.place(search.hits_stock, search.target),
                    search.place(search.hits, search.target),
                )
                for search in searches
            ],
        ),
        sections="\n".join(section(search, picture) for search in searches),
        timings=table(("stage", "seconds"), [(html.escape(stage), f"{value:.1f}") for stage, value in timings.items()]),
    )
    return document("qpert demonstration", body, STYLE)


def section(search: Search, picture: Callable[[str], str]) -> str:
    """One caption: its picture, and the best results with boxes."""
    cards = [card(picture(search.target), "what the caption describes", "target")]
    for place, hit in enumerate(search.hits[:SHOWN], start=1):
        itm = "" if hit.itm is None else f" = ITM {hit.itm:.2f} + ITC {hit.itc:.2f}"
        style = "found" if hit.image == search.target else ""
        cards.append(card(picture(hit.image), f"<b>{place}</b> {hit.score:.2f}{itm}, ITC rank {hit.rank_itc}", style))
    return f'<h3>“{html.escape(search.caption)}”</h3><div class="row">{"".join(cards)}</div>'


def card(figure: str, text: str, style: str) -> str:
    return f'<div class="card {style}">{figure}<p>{text}</p></div>'


STYLE = """
.verdict { color: #fff; padding: .1rem .7rem; border-radius: .4rem; background: var(--bad); font-size: 1rem }
.verdict.pass { background: var(--good) }
.row { display: grid; grid-template-columns: repeat(5, 1fr); gap: .8rem }
.card { border: 2px solid transparent; border-radius: .5rem; padding: .3rem }
.card.target { border-color: var(--line) } .card.found { border-color: var(--good) }
.card p { font-size: .8rem }
"""

BODY = """<h1>qpert demonstration <span class="verdict {verdict}">parity with PyTorch: {verdict}</span></h1>
<p>{counts}. {notes} Yellow boxes are what the query perturbation was given.</p>
{recalls}
<h2>Where each caption finds its picture</h2>
<p>The pictures whose largest object is smallest. Ranks in the whole gallery by ITC, then in the shortlist by ITM + ITC.
</p>
{summary}
<h2>The searches, with boxes, re-ranked</h2>
{sections}
<h2>Timings on this machine</h2>
{timings}"""
