"""The page that `make demo` leaves: self-contained HTML, made from results alone."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from PIL import Image

from qpert.runtime import Boxes, Hit
from qpert.runtime.datasets import RetrievalDataset

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

    def figure(name: str) -> str:
        return picture(Image.open(dataset.images[index[name]]), boxes[index[name]])

    return PAGE.format(
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
        sections="\n".join(section(search, figure) for search in searches),
        timings=table(("stage", "seconds"), [(html.escape(stage), f"{value:.1f}") for stage, value in timings.items()]),
    )


def section(search: Search, figure: Callable[[str], str]) -> str:
    """One caption: its picture, and the best results with boxes."""
    cards = [card(figure(search.target), "what the caption describes", "target")]
    for place, hit in enumerate(search.hits[:SHOWN], start=1):
        itm = "" if hit.itm is None else f" = ITM {hit.itm:.2f} + ITC {hit.itc:.2f}"
        style = "found" if hit.image == search.target else ""
        cards.append(card(figure(hit.image), f"<b>{place}</b> {hit.score:.2f}{itm}, ITC rank {hit.rank_itc}", style))
    return f'<h3>“{html.escape(search.caption)}”</h3><div class="row">{"".join(cards)}</div>'


def card(figure: str, text: str, style: str) -> str:
    return f'<div class="card {style}">{figure}<p>{text}</p></div>'


def picture(image: Image.Image, boxes: Boxes) -> str:
    """A picture with its boxes drawn over it."""
    stream = io.BytesIO()
    image.convert("RGB").save(stream, "JPEG", quality=88)
    data = base64.b64encode(stream.getvalue()).decode()
    labels = boxes.labels or ("",) * len(boxes)
    rectangles = "".join(
        f'<rect x="{x1}" y="{y1}" width="{x2 - x1}" height="{y2 - y1}"><title>{html.escape(label)}</title></rect>'
        for (x1, y1, x2, y2), label in zip(boxes.xyxy, labels, strict=True)
    )
    width, height = boxes.size
    return (
        f'<figure><img src="data:image/jpeg;base64,{data}" alt=""><svg viewBox="0 0 {width} {height}" '
        f'preserveAspectRatio="none">{rectangles}</svg></figure>'
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table; cells are markup already."""
    header = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{header}</tr>{body}</table>"


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>qpert demonstration</title>
<style>
:root {{ color-scheme: light dark; --line: #8884; --good: #14804a; --bad: #c02626; --box: #ffb300 }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }}
h1 {{ font-size: 1.5rem }} h2 {{ font-size: 1.15rem; margin: 2.2rem 0 .5rem }}
h3 {{ font-size: 1rem; margin: 1.6rem 0 .5rem }}
.verdict {{ color: #fff; padding: .1rem .7rem; border-radius: .4rem; background: var(--bad); font-size: 1rem }}
.verdict.pass {{ background: var(--good) }}
.row {{ display: grid; grid-template-columns: repeat(5, 1fr); gap: .8rem }}
.card {{ border: 2px solid transparent; border-radius: .5rem; padding: .3rem }}
.card.target {{ border-color: var(--line) }} .card.found {{ border-color: var(--good) }}
figure {{ margin: 0; position: relative }} img {{ width: 100%; display: block; border-radius: .3rem }}
svg {{ position: absolute; inset: 0; width: 100%; height: 100% }}
rect {{ fill: none; stroke: var(--box); stroke-width: 1.5px; vector-effect: non-scaling-stroke }}
p {{ margin: .3rem 0 }} .card p {{ font-size: .8rem }}
table {{ border-collapse: collapse; margin: .5rem 0 }}
td, th {{ text-align: left; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid var(--line) }}
td {{ font-variant-numeric: tabular-nums }}
</style>
<h1>qpert demonstration <span class="verdict {verdict}">parity with PyTorch: {verdict}</span></h1>
<p>{counts}. {notes} Yellow boxes are what the query perturbation was given.</p>
{recalls}
<h2>Where each caption finds its picture</h2>
<p>The pictures whose largest object is smallest. Ranks in the whole gallery by ITC, then in the shortlist by ITM + ITC.
</p>
{summary}
<h2>The searches, with boxes, re-ranked</h2>
{sections}
<h2>Timings on this machine</h2>
{timings}
</html>
"""
