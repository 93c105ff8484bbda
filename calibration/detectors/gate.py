"""The gate of a quantised detector: does it find what the float one finds?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qpert.runtime.detection.options import overlaps
from qpert.runtime.errors import QpertError
from qpert.runtime.inputs.boxes import Boxes

SAME_OBJECT = 0.5
"""IoU from which two boxes of one label are the same object: that of mAP50."""


class DetectorAccuracyError(QpertError):
    """The quantised detector finds other objects than the float one."""

    exit_code = 1
    code = "detector-accuracy"


@dataclass(frozen=True)
class Agreement:
    """Detections of both detectors on the pictures of the gate, and how many of them are the same."""

    pictures: int
    float_boxes: int
    quantized_boxes: int
    same: int

    @property
    def percent(self) -> float:
        """F1 of the two sets, 0 to 100; 100 where neither finds anything."""
        both = self.float_boxes + self.quantized_boxes
        return 200 * self.same / both if both else 100.0

    def to_dict(self) -> dict[str, Any]:
        return {
            "pictures": self.pictures,
            "float_boxes": self.float_boxes,
            "quantized_boxes": self.quantized_boxes,
            "same": self.same,
            "agreement": self.percent,
        }


def agreement(reference: Sequence[Boxes | None], found: Sequence[Boxes | None]) -> Agreement:
    """Compare the detections of each picture as sets."""
    same = sum(count_same(one, other) for one, other in zip(reference, found, strict=True))
    return Agreement(len(reference), count(reference), count(found), same)


def count(found: Sequence[Boxes | None]) -> int:
    return sum(len(boxes) for boxes in found if boxes is not None)


def count_same(reference: Boxes | None, found: Boxes | None) -> int:
    """Boxes of `found` that have one of `reference` for themselves: same label, IoU of at least `SAME_OBJECT`.

    The best by score choose first, each the box with the largest overlap, as COCO's evaluation does.
    """
    if reference is None or found is None or reference.labels is None or found.labels is None:
        return 0
    left = list(range(len(reference)))
    same = 0
    for box, label in zip(found.xyxy, found.labels, strict=True):
        rows = [row for row in left if reference.labels[row] == label]
        if not rows:
            continue
        shares = overlaps(box, reference.xyxy[rows])
        if shares.max() >= SAME_OBJECT:
            left.remove(rows[int(shares.argmax())])
            same += 1
    return same
