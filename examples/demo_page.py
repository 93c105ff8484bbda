"""The page that `make demo` leaves: self-contained HTML, made from results alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from qpert.runtime import Boxes, Hit
from qpert.runtime.inputs.datasets import RetrievalDataset
from qpert.runtime.report.html import to_html
from qpert.runtime.report.model import Badge, Bold, Card, Grid, Paragraph, Picture, Report, Section, Table, Text, Tone

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

    def picture(name: str) -> Picture:
        return Picture(dataset.images[index[name]], boxes[index[name]])

    lead = (
        f"{len(dataset)} generated pictures, {len(dataset.captions)} captions. "
        + " ".join(f"{note[:1].upper() + note[1:]}." for note in notes)
        + " Yellow boxes are what the query perturbation was given."
    )
    explained = Paragraph(
        "The pictures whose largest object is smallest. Ranks in the whole gallery by ITC, then in the shortlist by "
        "ITM + ITC."
    )
    times = tuple((stage, f"{value:.1f}") for stage, value in timings.items())
    blocks = (
        Paragraph(lead),
        recall_table(recalls),
        Section("Where each caption finds its picture", (explained, rank_table(searches))),
        Section("The searches, with boxes, re-ranked", tuple(section(search, picture) for search in searches)),
        Section("Timings on this machine", (Table(("stage", "seconds"), times),)),
    )
    badge = Badge(f"parity with PyTorch: {verdict}", "good" if verdict == "pass" else "bad")
    return to_html(Report("qpert demonstration", ("qpert demonstration ", badge), blocks))


def recall_table(recalls: Mapping[str, Mapping[int, float | None]]) -> Table:
    rows = (
        (name, *(f"{value:.1f} %" for value in found.values() if value is not None)) for name, found in recalls.items()
    )
    return Table(("ITC alone, text to image", "R@1", "R@5", "R@10"), tuple(rows))


def rank_table(searches: Sequence[Search]) -> Table:
    rows = (
        (
            search.caption,
            str(search.rank_stock),
            str(search.rank_perturbed),
            search.place(search.hits_stock, search.target),
            search.place(search.hits, search.target),
        )
        for search in searches
    )
    head = ("caption", "ITC, without boxes", "ITC, with boxes", "re-ranked, without", "re-ranked, with")
    return Table(head, tuple(rows))


def section(search: Search, picture: Callable[[str], Picture]) -> Section:
    """One caption: its picture, and the best results with boxes."""
    cards = [card(picture(search.target), "what the caption describes")]
    for place, hit in enumerate(search.hits[:SHOWN], start=1):
        itm = "" if hit.itm is None else f" = ITM {hit.itm:.2f} + ITC {hit.itc:.2f}"
        text = (Bold(str(place)), f" {hit.score:.2f}{itm}, ITC rank {hit.rank_itc}")
        cards.append(card(picture(hit.image), text, "good" if hit.image == search.target else None))
    return Section(f"“{search.caption}”", (Grid(tuple(cards), 12),))


def card(picture: Picture, text: Text, tone: Tone | None = None) -> Card:
    return Card((picture, Paragraph(text)), tone)
