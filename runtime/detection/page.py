"""The page of `qpert detect`: pictures with the boxes found in them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qpert.runtime.detection.run import DetectSummary
from qpert.runtime.inputs.boxes import Boxes
from qpert.runtime.report.model import Bold, Card, Grid, Paragraph, Picture, Report, Section, Table

if TYPE_CHECKING:
    from qpert.runtime.gallery.entries import ImageEntry

PICTURES = 200
"""Pictures on a page: each is embedded, in some 30 kB."""
LABELS = 8
"""Labels that are named under a picture."""


def detections_page(detector: str, found: DetectSummary, pictures: Sequence[tuple[ImageEntry, Boxes]]) -> Report:
    """Counts, then the pictures with their boxes, in order; of more than `PICTURES` the first."""
    shown = pictures[:PICTURES]
    lead = [Paragraph(counts(found))]
    if len(shown) < len(pictures):
        lead.append(Paragraph(f"The first {len(shown)} pictures are shown; the box file has all.", "quiet"))
    cards = tuple(card(entry, boxes) for entry, boxes in shown)
    labels = Section("Labels", (label_table(found),)) if found.labels else None
    pictured = Section("Pictures", (Grid(cards, 18),))
    return Report(f"qpert detect: {detector}", f"Boxes found by {detector}", (*lead, *filter(None, [labels]), pictured))


def detections_report(out: Path, found: DetectSummary) -> Report:
    """What a terminal shows."""
    blocks = (Paragraph(counts(found)), *((label_table(found),) if found.labels else ()))
    skipped = tuple(Paragraph(f"skipped {name}: {reason}") for name, reason in found.skipped)
    return Report("qpert detect", str(out), (*blocks, *skipped))


def counts(found: DetectSummary) -> str:
    line = f"{found.boxes} boxes in {found.images} pictures; nothing found in {found.without_boxes}"
    return f"{line}; {len(found.skipped)} could not be read" if found.skipped else line


def label_table(found: DetectSummary) -> Table:
    return Table(("label", "boxes"), tuple((label, str(count)) for label, count in found.labels.items()))


def card(entry: ImageEntry, boxes: Boxes) -> Card:
    """A picture with its boxes; their labels and scores are written below, as a phone shows nothing on hover."""
    head = Paragraph((Bold(entry.name), f" {len(boxes)} boxes" if len(boxes) != 1 else " 1 box"))
    return Card((head, Picture(entry.path, boxes), Paragraph(names_of(boxes) or "nothing found", "quiet")))


def names_of(boxes: Boxes) -> str:
    """`person 0.93, cup 0.52`, the best first."""
    if boxes.labels is None or boxes.scores is None:
        return f"{len(boxes)} boxes" if len(boxes) else ""
    named = [f"{label} {score:.2f}" for label, score in zip(boxes.labels, boxes.scores.tolist(), strict=True)]
    more = f" and {len(named) - LABELS} more" if len(named) > LABELS else ""
    return ", ".join(named[:LABELS]) + more
