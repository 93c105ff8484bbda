"""The report of `qpert search`: what was found, with scores; on a page with the pictures and their boxes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from qpert.runtime.gallery.hits import Hit, TextHit
from qpert.runtime.report.model import Badge, Block, Bold, Card, Grid, Paragraph, Picture, Report, Section, Table, Text

LEGEND = (
    "Score = ITM + ITC for what was re-ranked, ITC alone below. The arrow compares with the rank by ITC alone. "
    "Yellow boxes are what the query perturbation was given."
)
MATCHED = " The box with the thick line is the one whose queries matched the text."
SCORES = ("score", "ITC", "ITM", "rank by ITC", "")


def images_page(
    gallery: str,
    count: int,
    texts: Sequence[str],
    found: Sequence[Sequence[Hit]],
    picture: Callable[[str], Picture],
    notice: str | None = None,
) -> Report:
    """Images found for texts; `picture` knows an image's file and boxes by its name, `notice` is said first."""
    sections = tuple(
        Section(f"“{text}”", (Grid(tuple(card(n, hit, picture(hit.image)) for n, hit in enumerate(hits, 1)), 13),))
        for text, hits in zip(texts, found, strict=True)
    )
    matched = MATCHED if any(hit.box for hits in found for hit in hits) else ""
    lead = Paragraph(f"{count:,} images. {LEGEND}{matched}", "quiet")
    return Report(
        f"qpert search: {texts[0] if texts else ''}", f"Search in {gallery}", (*warned(notice), lead, *sections)
    )


def texts_page(query: Picture, hits: Sequence[TextHit], notice: str | None = None) -> Report:
    """Texts found for an image, with the image that each belongs to."""
    name = query.path.name
    rows = tuple((*row[:2], hit.image or "", *row[2:]) for row, hit in zip(hit_rows(hits), hits, strict=True))
    found = Table(("", "text", "its image", *SCORES), rows, words=3)
    blocks = (*warned(notice), Paragraph(LEGEND, "quiet"), Grid((query,), 22), found)
    return Report(f"qpert search: {name}", f"Texts for {name}", blocks)


def warned(notice: str | None) -> tuple[Block, ...]:
    return () if notice is None else (Paragraph(notice, "unsure"),)


def hits_report(gallery: str, queries: Sequence[str], found: Sequence[Sequence[Hit | TextHit]]) -> Report:
    """What a terminal shows."""
    sections = []
    for query, hits in zip(queries, found, strict=True):
        what = "text" if hits and isinstance(hits[0], TextHit) else "image"
        sections.append(Section(query, (Table(("", what, *SCORES), tuple(hit_rows(hits)), words=2),)))
    return Report("qpert search", f"Search in {gallery}", tuple(sections))


def hit_rows(hits: Sequence[Hit | TextHit]) -> list[tuple[Text, ...]]:
    """place, image or text, score, ITC, ITM, rank by ITC, how far re-ranking moved it."""
    return [
        (
            str(place),
            hit.text if isinstance(hit, TextHit) else hit.image,
            f"{hit.score:.3f}",
            f"{hit.itc:.3f}",
            "" if hit.itm is None else f"{hit.itm:.3f}",
            str(hit.rank_itc),
            move(place, hit.rank_itc),
        )
        for place, hit in enumerate(hits, start=1)
    ]


def card(place: int, hit: Hit, picture: Picture) -> Card:
    if hit.box is not None:
        picture = replace(picture, matched=hit.box.index)
    scores = f"ITC {hit.itc:.3f}" if hit.itm is None else f"ITM {hit.itm:.3f} + ITC {hit.itc:.3f}"
    head = Paragraph((Bold(f"{place} "), move(place, hit.rank_itc), Bold(f" {hit.score:.3f}")))
    return Card((head, picture, Paragraph(f"{scores}, rank {hit.rank_itc} by ITC"), Paragraph(hit.image, "quiet")))


def move(place: int, rank_itc: int) -> Badge:
    """How far re-ranking moved a result."""
    if place == rank_itc:
        return Badge("=", "quiet")
    up = place < rank_itc
    return Badge(f"{'▲' if up else '▼'} {abs(place - rank_itc)}", "good" if up else "bad")
