"""Object boxes in memory: pixels of one image, 0-based, half-open. `box_files.py` reads files of them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from qpert.runtime.errors import BoxError, QpertWarning


@dataclass(frozen=True, eq=False)
class Boxes:
    """The O boxes of one image.

    `xyxy` float64 [O,4]: x1, y1, x2, y2 in pixels, 0-based and half-open: a box over the whole image is
    (0, 0, width, height). `size`: (width, height) of the image, in pixels, after EXIF orientation. `scores` float64 [O]
    and `labels` (O strings) are carried along, or None. `sources`: where each box was read (`file:line`), for messages.

    Coordinates outside the image are clipped, with one `QpertWarning`. Raises `BoxError`, naming the box, for a wrong
    shape, NaN or infinity, an inverted or empty box, and a box that lies outside the image entirely.
    """

    xyxy: npt.NDArray[np.float64]
    size: tuple[int, int]
    scores: npt.NDArray[np.float64] | None = None
    labels: tuple[str, ...] | None = None
    sources: tuple[str, ...] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        size = _checked_size(self.size)
        xyxy = _float_array(self.xyxy, "boxes")
        if xyxy.ndim != 2 or xyxy.shape[1] != 4:
            raise BoxError(
                f"boxes have shape {list(xyxy.shape)}; expected [O,4]: x1, y1, x2, y2 (Boxes.empty for none)"
            )
        self._set("sources", _checked_strings(self.sources, "sources", len(xyxy)))
        for index, box in enumerate(xyxy):
            check_box(box, self._name(index))
        self._set("size", size)
        self._set("xyxy", _frozen(self._clipped(xyxy, size)))
        self._set("scores", None if self.scores is None else _frozen(self._checked_scores(len(xyxy))))
        self._set("labels", _checked_strings(self.labels, "labels", len(xyxy)))

    @classmethod
    def empty(cls, size: tuple[int, int]) -> Boxes:
        """No boxes (O = 0) on an image of `size` (width, height)."""
        return cls(np.zeros((0, 4)), size)

    def __len__(self) -> int:
        return len(self.xyxy)

    @property
    def areas(self) -> npt.NDArray[np.float64]:
        """float64 [O]: box area over image area, the paper's normalised area (section 4.3), in (0, 1]."""
        width, height = self.size
        x1, y1, x2, y2 = self.xyxy.T
        return np.asarray((x2 - x1) * (y2 - y1) / (width * height))

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _name(self, index: int) -> str:
        return f"box {index}" if self.sources is None else f"{self.sources[index]}: box"

    def _clipped(self, xyxy: npt.NDArray[np.float64], size: tuple[int, int]) -> npt.NDArray[np.float64]:
        width, height = size
        clipped = np.clip(xyxy, 0, [width, height, width, height])
        outside = (clipped[:, 0] >= clipped[:, 2]) | (clipped[:, 1] >= clipped[:, 3])
        for index in np.flatnonzero(outside).tolist():
            raise BoxError(
                f"{self._name(index)} {_shown(xyxy[index])} lies outside the image of {width}×{height} pixels; "
                "are these pixels of this image, as it is after EXIF orientation?"
            )
        changed = np.flatnonzero((clipped != xyxy).any(axis=1)).tolist()
        if changed:
            first = f"{self._name(changed[0])} {_shown(xyxy[changed[0]])}"
            others = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
            message = f"{first}{others} reached out of the image of {width}×{height} pixels: clipped to it"
            warnings.warn(message, QpertWarning, stacklevel=4)
        return np.asarray(clipped)

    def _checked_scores(self, count: int) -> npt.NDArray[np.float64]:
        scores = _float_array(self.scores, "scores")
        if scores.shape != (count,) or not np.isfinite(scores).all():
            raise BoxError(f"scores are {scores.tolist()}; expected {count} finite numbers, one for each box")
        return scores


def check_box(box: Sequence[float] | npt.NDArray[np.float64], name: str) -> None:
    """Raises `BoxError`, calling the box `name`, unless x1, y1, x2, y2 are finite with x1 < x2 and y1 < y2."""
    x1, y1, x2, y2 = map(float, box)
    if not np.isfinite([x1, y1, x2, y2]).all():
        raise BoxError(f"{name} {_shown(box)} is not finite; expected four numbers x1, y1, x2, y2")
    if x1 > x2 or y1 > y2:
        raise BoxError(
            f"{name} {_shown(box)} is inverted; expected x1 < x2 and y1 < y2 (corners, not width and height)"
        )
    if x1 == x2 or y1 == y2:
        raise BoxError(f"{name} {_shown(box)} is empty; expected x1 < x2 and y1 < y2 (x2 and y2 are exclusive)")


def _checked_size(size: Any) -> tuple[int, int]:
    try:
        width, height = size
        whole = all(isinstance(v, int | np.integer) and not isinstance(v, bool) for v in (width, height))
    except (TypeError, ValueError):
        whole = False
    if not whole or min(width, height) < 1:
        raise BoxError(f"size is {size!r}; expected the image's (width, height) in pixels, two whole numbers above 0")
    return int(width), int(height)


def _checked_strings(values: Any, name: str, count: int) -> tuple[str, ...] | None:
    if values is None:
        return None
    if isinstance(values, Iterator):
        values = list(values)
    sized = isinstance(values, Sequence | np.ndarray) and not isinstance(values, str)
    if not sized or len(values) != count or not all(isinstance(v, str) for v in values):
        raise BoxError(f"{name} are {values!r}; expected {count} strings, one for each box")
    return tuple(values)


def _float_array(values: Any, name: str) -> npt.NDArray[np.float64]:
    """A float64 copy of something numeric."""
    if isinstance(values, Iterator):
        values = [list(row) if isinstance(row, Iterator) else row for row in values]
    try:
        array = np.asarray(values)
    except ValueError as error:  # rows of different lengths
        raise BoxError(f"{name} are {values!r}; expected an array of numbers") from error
    if array.dtype.kind not in "iuf":
        raise BoxError(f"{name} have dtype {array.dtype}; expected numbers")
    return array.astype(np.float64)


def _frozen(array: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    array.flags.writeable = False
    return array


def _shown(box: Sequence[float] | npt.NDArray[np.float64]) -> str:
    return "(" + ", ".join(f"{float(v):g}" for v in box) + ")"
