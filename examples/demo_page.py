"""The page that `make demo` leaves: self-contained HTML, made from results alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qpert.runtime import Boxes
from qpert.runtime.evaluation.bootstrap import LEVEL
from qpert.runtime.report.html import to_html
from qpert.runtime.report.model import (
    Badge,
    Bold,
    Card,
    Code,
    Grid,
    Paragraph,
    Picture,
    Report,
    Section,
    Table,
    Text,
)

Interval = tuple[float, float]


@dataclass(frozen=True)
class Condition:
    """R@1 in percent by ITC, of captions of the smallest object and of usual captions; intervals are of the difference
    to no boxes."""

    name: str
    smallest: float
    smallest_interval: Interval
    usual: float
    usual_interval: Interval


@dataclass(frozen=True)
class Case:
    """One caption whose picture moved: ranks by ITC, from 1, without boxes and with those of the detector."""

    caption: str
    picture: Path
    boxes: Boxes | None
    matched: int | None
    before: int
    after: int


@dataclass(frozen=True)
class Page:
    """What the page shows. moved: captions whose picture moved up, down, and not at all."""

    conditions: tuple[Condition, ...]
    improved: tuple[Case, ...]
    worsened: tuple[Case, ...]
    moved: tuple[int, int, int]
    pictures: int
    suggestion: str
    verification: Mapping[str, Any]
    timings: Mapping[str, float]


def render(page: Page) -> str:
    """The whole page."""
    without, detected = page.conditions[0], page.conditions[1]
    lead = (
        f"{page.pictures} pictures went in, and nothing else. A detector found boxes in them, and each box points the "
        "retrieval model at one thing. Asked for the ",
        Bold("smallest"),
        " thing in a picture, it finds the picture first in ",
        Bold(f"{detected.smallest:.1f} %"),
        f" of searches; without boxes, in {without.smallest:.1f} %.",
    )
    up, down, same = page.moved
    blocks = (
        Paragraph(lead),
        Paragraph(
            "The model is small and was made for this: it learned from captions that speak of what is large, as "
            "people's do, so on its own it overlooks small things. The pictures are generated; it knows no others.",
            "quiet",
        ),
        conditions_table(page),
        Section(
            "What boxes changed for the better",
            (
                Paragraph(
                    f"Of {up + down + same} captions of a picture's smallest object, {up} find their picture at a "
                    f"better rank with boxes, {down} at a worse one, {same} at the same. These moved most. Yellow: the "
                    "detector's boxes. Thick: the box whose queries matched the caption."
                ),
                Grid(tuple(case_card(one) for one in page.improved), 13),
            ),
        ),
        Section(
            "… and for the worse",
            (Paragraph("These fell most."), Grid(tuple(case_card(one) for one in page.worsened), 13)),
        ),
        Section("Search it yourself", (Code(page.suggestion),)),
        Section("Timings on this machine", (timings_table(page.timings),), details=True),
    )
    verdict = str(page.verification.get("verdict", "not verified"))
    badge = Badge(f"parity with PyTorch: {verdict}", "good" if verdict == "pass" else "bad")
    return to_html(Report("qpert demonstration", ("qpert: boxes that help ", badge), blocks))


def conditions_table(page: Page) -> Table:
    rows = tuple(
        (
            one.name,
            (Bold(f"{one.smallest:.1f} %"), "" if place == 0 else f" ({signed(one.smallest_interval)})"),
            (Bold(f"{one.usual:.1f} %"), "" if place == 0 else f" ({signed(one.usual_interval)})"),
        )
        for place, one in enumerate(page.conditions)
    )
    head = ("text to image, R@1 by ITC", "captions of the smallest object", "usual captions")
    legend = f"in brackets: {LEVEL} % interval of the difference to no boxes, in points (pictures resampled)"
    return Table(head, rows, words=3, legend=(legend,))


def signed(interval: Interval) -> str:
    return f"{interval[0]:+.1f} to {interval[1]:+.1f}"


def case_card(case: Case) -> Card:
    better = case.after < case.before
    text: Text = (
        f"rank {case.before} ",
        Badge(f"→ {case.after}", "good" if better else "bad"),
    )
    picture = Picture(case.picture, case.boxes, case.matched)
    return Card((picture, Paragraph(f"“{case.caption}”"), Paragraph(text)), "good" if better else None)


def timings_table(timings: Mapping[str, float]) -> Table:
    return Table(("stage", "seconds"), tuple((stage, f"{value:.1f}") for stage, value in timings.items()))
