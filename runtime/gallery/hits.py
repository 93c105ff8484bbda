"""What a search finds."""

from __future__ import annotations

from dataclasses import dataclass

from qpert.runtime.inputs.boxes import Boxes


@dataclass(frozen=True)
class MatchedBox:
    """The box whose query set matched best, of an image that has a query set for each box (reduction `each`).

    `index`: its place among the image's boxes, from 0. `xyxy` in pixels, `label` and the detector's `score`, where they
    are known.
    """

    index: int
    xyxy: tuple[float, float, float, float] | None = None
    label: str | None = None
    score: float | None = None

    @classmethod
    def of(cls, index: int | None, boxes: Boxes | None) -> MatchedBox | None:
        """Box `index` of `boxes`; None where no box of its own matched."""
        if index is None or boxes is None:
            return None if index is None else cls(index)
        x1, y1, x2, y2 = boxes.xyxy[index].tolist()
        label = None if boxes.labels is None else boxes.labels[index]
        score = None if boxes.scores is None else float(boxes.scores[index])
        return cls(index, (x1, y1, x2, y2), label, score)


@dataclass(frozen=True)
class Hit:
    """One result. `rank_itc` counts from 1; `itm` is None below the re-ranked shortlist, where `score` is `itc`.

    `box` is the box that matched by ITC, with reduction `each`; None where the stock queries matched, or all boxes
    together.
    """

    image: str
    score: float
    itc: float
    itm: float | None
    rank_itc: int
    box: MatchedBox | None = None


@dataclass(frozen=True)
class TextHit:
    """One text found for an image; as `Hit`. `image` is the gallery's image whose caption it is, where it is one's."""

    text: str
    score: float
    itc: float
    itm: float | None
    rank_itc: int
    image: str | None = None
    box: MatchedBox | None = None
