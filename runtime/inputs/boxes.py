"""Object boxes in memory: pixels of one image, 0-based, half-open. `box_files.py` reads files of them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from qpert.runtime.errors import BoxError, QpertWarning

EDGE_TOLERANCE = 1.0
"""Pixels. A box that misses its image by less is a detector's rounding, and is left out with a warning; one that misses
it by more was drawn on another image or at another scale, and is an error."""

BAD_BOX = frozenset(
    {"box-bbox", "box-column-missing", "box-empty", "box-inverted", "box-not-finite", "box-number", "box-outside"}
)
"""Codes of the errors that are about one box alone, so that `--skip-bad-boxes` can leave that box out."""


class BoxWarning(QpertWarning):
    """Something about the boxes of one image. `code` is its kind, `boxes` how many it is about."""

    def __init__(self, message: str, *, code: str, boxes: int) -> None:
        super().__init__(message)
        self.code, self.boxes = code, boxes


@contextmanager
def one_warning_a_kind() -> Iterator[None]:
    """Of the `BoxWarning`s given inside, the first of each kind is given, with the counts of all; others pass."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", QpertWarning)
        yield
    kinds: dict[str, list[BoxWarning]] = {}
    for one in caught:
        if isinstance(one.message, BoxWarning):
            kinds.setdefault(one.message.code, []).append(one.message)
        else:
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
    for code, found in kinds.items():
        boxes = sum(one.boxes for one in found)
        more = f" (in all {boxes} boxes of {len(found)} images)" if len(found) > 1 else ""
        warnings.warn(BoxWarning(f"{found[0]}{more}", code=code, boxes=boxes), stacklevel=3)


@dataclass(frozen=True, eq=False)
class Boxes:
    """The O boxes of one image.

    `xyxy` float64 [O,4]: x1, y1, x2, y2 in pixels, 0-based and half-open: a box over the whole image is
    (0, 0, width, height). `size`: (width, height) of the image, in pixels, after EXIF orientation. `scores` float64 [O]
    and `labels` (O strings) are carried along, or None. `sources`: where each box was read (`file:line`), for messages.

    Coordinates outside the image are clipped, with one `QpertWarning`. A box that misses the image by less than
    `EDGE_TOLERANCE` has nothing left then: it is left out, with a `QpertWarning`. Raises `BoxError`, naming the box,
    for a wrong shape (`box-shape`), NaN or infinity (`box-not-finite`), an inverted or empty box (`box-inverted`,
    `box-empty`), and a box further outside the image (`box-outside`).
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
                f"boxes have shape {list(xyxy.shape)}; expected [O,4]: x1, y1, x2, y2 (Boxes.empty for none)",
                code="box-shape",
            )
        self._set("sources", _checked_strings(self.sources, "sources", len(xyxy)))
        self._set("scores", None if self.scores is None else _frozen(self._checked_scores(len(xyxy))))
        self._set("labels", _checked_strings(self.labels, "labels", len(xyxy)))
        for index, box in enumerate(xyxy):
            check_box(box, self._name(index))
        self._set("size", size)
        self._set("xyxy", _frozen(self._clipped(xyxy, size)))

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

    def best(self, most: int) -> Boxes:
        """The `most` boxes of the highest score, in their order here; of equal ones the first. All, if there are fewer.

        Raises:
            BoxError: there are more boxes, and they have no scores (code `boxes-without-scores`).
        """
        if len(self) <= most:
            return self
        if self.scores is None:
            raise BoxError(
                f"{self._name(0)}: the image has {len(self)} boxes without scores, at most {most} are to be kept; give "
                "each box a score, or leave the lesser ones out",
                code="boxes-without-scores",
            )
        kept = np.sort(np.argsort(-self.scores, kind="stable")[:most])
        labels, sources = (
            None if names is None else tuple(names[row] for row in kept.tolist())
            for names in (self.labels, self.sources)
        )
        return Boxes(self.xyxy[kept], self.size, scores=self.scores[kept], labels=labels, sources=sources)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _name(self, index: int) -> str:
        return f"box {index}" if self.sources is None else f"{self.sources[index]}: box"

    def _clipped(self, xyxy: npt.NDArray[np.float64], size: tuple[int, int]) -> npt.NDArray[np.float64]:
        width, height = size
        gaps = outside_by(xyxy, size)
        for index in np.flatnonzero(gaps >= EDGE_TOLERANCE).tolist():
            raise BoxError(
                f"{self._name(index)} {_shown(xyxy[index])} lies outside the image of {width}×{height} pixels; "
                "are these pixels of this image, as it is after EXIF orientation?",
                code="box-outside",
            )
        clipped = np.clip(xyxy, 0, [width, height, width, height])
        kept = gaps < 0
        changed = kept & (clipped != xyxy).any(axis=1)
        image = f"the image of {width}×{height} pixels"
        self._warn(xyxy, changed, f"reached out of {image}: clipped to it", code="box-clipped")
        self._warn(xyxy, ~kept, f"lay just outside {image}: left out", code="box-left-out")
        if not kept.all():
            self._keep(kept)
        return np.asarray(clipped[kept])

    def _warn(self, xyxy: npt.NDArray[np.float64], which: npt.NDArray[np.bool_], what: str, *, code: str) -> None:
        """One warning for all of the boxes of which `which` is true."""
        indices = np.flatnonzero(which).tolist()
        if indices:
            others = f" and {len(indices) - 1} more" if len(indices) > 1 else ""
            message = f"{self._name(indices[0])} {_shown(xyxy[indices[0]])}{others} {what}"
            warnings.warn(BoxWarning(message, code=code, boxes=len(indices)), stacklevel=5)

    def _keep(self, kept: npt.NDArray[np.bool_]) -> None:
        """Take scores, labels and sources of the other boxes out."""
        if self.scores is not None:
            self._set("scores", _frozen(self.scores[kept]))
        for name in ("labels", "sources"):
            values = getattr(self, name)
            if values is not None:
                self._set(name, tuple(value for value, keep in zip(values, kept.tolist(), strict=True) if keep))

    def _checked_scores(self, count: int) -> npt.NDArray[np.float64]:
        scores = _float_array(self.scores, "scores")
        if scores.shape != (count,) or not np.isfinite(scores).all():
            raise BoxError(
                f"scores are {scores.tolist()}; expected {count} finite numbers, one for each box", code="box-scores"
            )
        return scores


def check_box(box: Sequence[float] | npt.NDArray[np.float64], name: str) -> None:
    """Raises `BoxError`, calling the box `name`, unless x1, y1, x2, y2 are finite with x1 < x2 and y1 < y2."""
    x1, y1, x2, y2 = map(float, box)
    if not np.isfinite([x1, y1, x2, y2]).all():
        raise BoxError(
            f"{name} {_shown(box)} is not finite; expected four numbers x1, y1, x2, y2", code="box-not-finite"
        )
    if x1 > x2 or y1 > y2:
        raise BoxError(
            f"{name} {_shown(box)} is inverted; expected x1 < x2 and y1 < y2 (corners, not width and height)",
            code="box-inverted",
        )
    if x1 == x2 or y1 == y2:
        raise BoxError(
            f"{name} {_shown(box)} is empty; expected x1 < x2 and y1 < y2 (x2 and y2 are exclusive)", code="box-empty"
        )


def outside_by(xyxy: npt.NDArray[np.float64], size: tuple[int, int]) -> npt.NDArray[np.float64]:
    """float64 [O]: by how many pixels each box of [O,4] misses the image of `size` (width, height).

    0 for a box that begins exactly where the image ends, below 0 for one that has pixels in common with it.
    """
    width, height = size
    x1, y1, x2, y2 = xyxy.T
    return np.asarray(np.max([-x2, -y2, x1 - width, y1 - height], axis=0))


def _checked_size(size: Any) -> tuple[int, int]:
    try:
        width, height = size
        whole = all(isinstance(v, int | np.integer) and not isinstance(v, bool) for v in (width, height))
    except (TypeError, ValueError):
        whole = False
    if not whole or min(width, height) < 1:
        raise BoxError(
            f"size is {size!r}; expected the image's (width, height) in pixels, two whole numbers above 0",
            code="box-image-size",
        )
    return int(width), int(height)


def _checked_strings(values: Any, name: str, count: int) -> tuple[str, ...] | None:
    if values is None:
        return None
    if isinstance(values, Iterator):
        values = list(values)
    sized = isinstance(values, Sequence | np.ndarray) and not isinstance(values, str)
    if not sized or len(values) != count or not all(isinstance(v, str) for v in values):
        raise BoxError(f"{name} are {values!r}; expected {count} strings, one for each box", code=f"box-{name}")
    return tuple(values)


def _float_array(values: Any, name: str) -> npt.NDArray[np.float64]:
    """A float64 copy of something numeric."""
    if isinstance(values, Iterator):
        values = [list(row) if isinstance(row, Iterator) else row for row in values]
    try:
        array = np.asarray(values)
    except ValueError as error:  # rows of different lengths
        raise BoxError(f"{name} are {values!r}; expected an array of numbers", code="box-shape") from error
    if array.dtype.kind not in "iuf":
        raise BoxError(f"{name} have dtype {array.dtype}; expected numbers", code="box-dtype")
    return array.astype(np.float64)


def _frozen(array: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    array.flags.writeable = False
    return array


def _shown(box: Sequence[float] | npt.NDArray[np.float64]) -> str:
    return "(" + ", ".join(f"{float(v):.10g}" for v in box) + ")"
