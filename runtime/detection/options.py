"""Which detections become boxes: threshold, classes, suppression of duplicates and the most boxes of a picture."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from qpert.runtime.errors import InputError


@dataclass(frozen=True)
class DetectionOptions:
    """Applied in this order: threshold, classes, suppression, most boxes.

    threshold: a detection's score must be above it. classes: label names to keep; None keeps all. suppression: of two
    boxes whose intersection over union is above it, the one with the higher score stays, whatever their classes; 1
    suppresses nothing. max_boxes: the best by score are kept.

    The default of `suppression` is 0.7: a detector without suppression of its own often reports one object under two
    class names, and boxes perturb queries without regard to their names, so that object would count twice.

    Raises:
        InputError: a value out of its range.
    """

    threshold: float = 0.3
    max_boxes: int = 32
    classes: tuple[str, ...] | None = None
    suppression: float = 0.7

    def __post_init__(self) -> None:
        for name in ("threshold", "suppression"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not 0 <= value <= 1:
                raise InputError(f"{name} is {value!r}; expected a number from 0 to 1", code="detection-option")
            object.__setattr__(self, name, float(value))
        if isinstance(self.max_boxes, bool) or not isinstance(self.max_boxes, int) or self.max_boxes < 1:
            raise InputError(
                f"max_boxes is {self.max_boxes!r}; expected a whole number of at least 1", code="detection-option"
            )
        if self.classes is not None:
            if isinstance(self.classes, str) or not all(isinstance(name, str) for name in self.classes):
                raise InputError(
                    f"classes are {self.classes!r}; expected a sequence of label names", code="detection-option"
                )
            object.__setattr__(self, "classes", tuple(dict.fromkeys(self.classes)))

    def changed(
        self,
        *,
        threshold: float | None = None,
        max_boxes: int | None = None,
        classes: Sequence[str] | None = None,
        suppression: float | None = None,
    ) -> DetectionOptions:
        """The same with those values that are given."""
        given: dict[str, Any] = {
            "threshold": threshold,
            "max_boxes": max_boxes,
            "classes": classes,
            "suppression": suppression,
        }
        return replace(self, **{name: value for name, value in given.items() if value is not None})

    def to_dict(self) -> dict[str, Any]:
        return {
            "threshold": self.threshold,
            "max_boxes": self.max_boxes,
            "classes": None if self.classes is None else list(self.classes),
            "suppression": self.suppression,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DetectionOptions:
        """The inverse of `to_dict`. Raises InputError or KeyError for anything else."""
        unknown = values.keys() - {field.name for field in fields(cls)}
        if unknown:
            raise InputError(f"unknown detection options: {', '.join(sorted(unknown))}", code="detection-option")
        classes = values["classes"]
        return cls(
            values["threshold"],
            values["max_boxes"],
            None if classes is None else tuple(classes),
            values["suppression"],
        )

    def class_ids(self, labels: Sequence[str]) -> np.ndarray | None:
        """The ids, places in `labels`, of the classes to keep; None for all.

        Raises:
            InputError: `labels` has no such name.
        """
        if self.classes is None:
            return None
        for name in self.classes:
            if name not in labels:
                near = ", ".join(difflib.get_close_matches(name, labels, n=3, cutoff=0.5))
                raise InputError(
                    f"the detector knows no class {name!r}; {f'near matches: {near}' if near else 'it knows'}"
                    f"{'' if near else ' ' + ', '.join(labels[:10])}{'' if near or len(labels) <= 10 else ' …'}",
                    code="detection-class",
                )
        wanted = set(self.classes)
        return np.array([place for place, name in enumerate(labels) if name in wanted], np.int64)


def suppressed(xyxy: np.ndarray, order: np.ndarray, limit: float, most: int) -> np.ndarray:
    """The rows of `order` that remain, at most `most`: a box goes whose IoU with a box before it is above `limit`.

    Args:
        xyxy: float [O,4].
        order: rows of `xyxy`, the best first.
        limit: 1 keeps every box.
        most: how many to keep.
    """
    kept: list[int] = []
    for row in order.tolist():
        if len(kept) == most:
            break
        if limit >= 1 or not kept or overlaps(xyxy[row], xyxy[kept]).max() <= limit:
            kept.append(row)
    return np.array(kept, np.int64)


def overlaps(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Intersection over union of one box [4] with others [O,4] → [O]; boxes of no area have none."""
    low, high = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:], others[:, 2:])
    shared = np.prod(np.clip(high - low, 0, None), axis=1)
    areas = np.prod(others[:, 2:] - others[:, :2], axis=1) + np.prod(box[2:] - box[:2])
    union = areas - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
