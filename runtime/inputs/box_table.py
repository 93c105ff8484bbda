"""The boxes of many images, by image name: what a box file holds before the images themselves are seen."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from qpert.runtime.errors import BoxError
from qpert.runtime.inputs.boxes import Boxes, BoxWarning, outside_by
from qpert.runtime.inputs.names import NameIndex


@dataclass(frozen=True)
class BoxRow:
    """One box of a file, in pixels, 0-based and half-open, not yet clipped.

    `names` are the object's names: none or one in most formats, the chain ids in Flickr30k Entities. `image_size` is
    the (width, height) that the file itself states for the image, or None. `source` is `file:line` or the like.
    """

    image: str
    xyxy: tuple[float, float, float, float]
    source: str
    score: float | None = None
    names: tuple[str, ...] = ()
    image_size: tuple[int, int] | None = None


@dataclass(frozen=True)
class BoxTable:
    """The boxes of many images, by image name.

    Names match as `qpert.runtime.inputs.names` says: equal names first, then equal last components, then stems, then
    COCO's bare `image_id`. A match that is not the only one is an error. After `require` or `of_images`, `exact` is
    true and only equal names match. With `skip_bad_boxes`, boxes that lie outside their image are left out with a
    warning instead of being an error. `most`: of more boxes on an image, these of the highest score are kept.
    """

    rows: tuple[BoxRow, ...]
    source: str = "boxes"
    exact: bool = False
    skip_bad_boxes: bool = False
    most: int | None = None

    @cached_property
    def images(self) -> tuple[str, ...]:
        """The image names of the table, in order of appearance."""
        return tuple(self._by_image)

    def for_image(self, name: str, size: tuple[int, int]) -> Boxes:
        """The boxes of image `name`, clipped to its `size` (width, height) in pixels; none give `Boxes.empty`.

        `scores` are there if all rows have one, `labels` if all have a name (several are joined by a space). Raises
        `BoxError` if the name matches several of the table's, or for what `Boxes` refuses, with file and line. A size
        stated in the file that is not `size` gives a `QpertWarning`.
        """
        rows: Sequence[BoxRow] = self._by_image.get(self._own_name(name) or "", [])
        if rows:
            _warn_of_size(rows[0], len(rows), name, size)
        if rows and self.skip_bad_boxes:
            rows = _inside(rows, name, size)
        if not rows:
            return Boxes.empty(size)
        scores = [row.score for row in rows if row.score is not None]
        labels = tuple(" ".join(row.names) for row in rows if row.names)
        boxes = Boxes(
            np.array([row.xyxy for row in rows], np.float64),
            size,
            scores=np.array(scores) if len(scores) == len(rows) else None,
            labels=labels if len(labels) == len(rows) else None,
            sources=tuple(row.source for row in rows),
        )
        return boxes if self.most is None else boxes.best(self.most)

    def require(self, names: Iterable[str]) -> BoxTable:
        """The same boxes under the names of the images that are about to be encoded.

        Raises `BoxError` if the table has boxes for an image that is not among `names` (near matches are listed,
        `box-image-unknown`), if one of its names matches several of them (`box-image-ambiguous`), or if two of its
        names match the same one (`box-image-twice`).
        """
        known = tuple(dict.fromkeys(names))
        index = NameIndex(known, "image")
        renamed: dict[str, str] = {}
        taken: dict[str, str] = {}
        for own in self.images:
            _, target = self._target(own, index)
            if target is None:
                raise self._unknown(own, known)
            if first := taken.get(target):
                raise self._twice(first, own, target)
            renamed[own], taken[target] = target, own
        return self._renamed(renamed)

    def of_images(self, names: Iterable[str]) -> TableOfImages:
        """The boxes of the images `names` under those names, where the table may know more images than these.

        An image that two of the table's names match gets the boxes of the closer one. Raises `BoxError` where a name
        matches several images (`box-image-ambiguous`) or two names match one image equally well (`box-image-twice`).
        """
        index = NameIndex(dict.fromkeys(names), "image")
        taken: dict[str, tuple[int, str]] = {}
        for own in self.images:
            level, target = self._target(own, index)
            if target is None:
                continue
            other = taken.get(target)
            if other is not None and other[0] == level:
                raise self._twice(other[1], own, target)
            if other is None or level < other[0]:
                taken[target] = (level, own)
        renamed = {own: target for target, (_, own) in taken.items()}
        return TableOfImages(self._renamed(renamed), tuple(own for own in self.images if own not in renamed))

    def select(self, keep: Callable[[BoxRow], bool]) -> BoxTable:
        """The rows for which `keep` is true: those above a score, say, or those whose chain a sentence names."""
        return replace(self, rows=tuple(row for row in self.rows if keep(row)))

    def _renamed(self, renamed: Mapping[str, str]) -> BoxTable:
        rows = (replace(row, image=renamed[row.image]) for row in self.rows if row.image in renamed)
        return replace(self, rows=tuple(rows), exact=True)

    def _target(self, own: str, index: NameIndex) -> tuple[int, str | None]:
        """The image that a name of the table means, with the level of the match; None where it means none."""
        level, hits = index.find(own)
        if len(hits) > 1:
            raise BoxError(
                f"{self._by_image[own][0].source}: the image {own!r} is ambiguous: it matches "
                f"{', '.join(hits[:5])}; write it with its folder, as the image is given",
                code="box-image-ambiguous",
            )
        return level, hits[0] if hits else None

    def _unknown(self, own: str, known: Sequence[str]) -> BoxError:
        near = difflib.get_close_matches(own, known, n=3, cutoff=0.5)
        hint = f"near matches: {', '.join(near)}" if near else "no image has a name like it"
        return BoxError(
            f"{self._by_image[own][0].source}: boxes for the image {own!r}, which is not among the {len(known)} "
            f"images; {hint}",
            code="box-image-unknown",
        )

    def _twice(self, first: str, second: str, target: str) -> BoxError:
        return BoxError(
            f"{self.source}: {first!r} and {second!r} both match the image {target!r}; use one name",
            code="box-image-twice",
        )

    def _own_name(self, name: str) -> str | None:
        """The table's name for an image, or None where it has no boxes."""
        if self.exact:
            return name
        _, hits = self._index.find(name)
        if len(hits) > 1:
            raise BoxError(
                f"{self.source}: which boxes are those of {name} is ambiguous: it matches {', '.join(hits[:5])}; "
                "write image names with their folder",
                code="box-image-ambiguous",
            )
        return hits[0] if hits else None

    @cached_property
    def _by_image(self) -> Mapping[str, list[BoxRow]]:
        groups: dict[str, list[BoxRow]] = {}
        for row in self.rows:
            groups.setdefault(row.image, []).append(row)
        return groups

    @cached_property
    def _index(self) -> NameIndex:
        return NameIndex(self.images, "annotation")


@dataclass(frozen=True)
class TableOfImages:
    """What `BoxTable.of_images` gives: the table under the images' names, and its names that are no image of these."""

    table: BoxTable
    others: tuple[str, ...]


def _warn_of_size(row: BoxRow, boxes: int, name: str, size: tuple[int, int]) -> None:
    stated = row.image_size
    if stated is not None and stated != tuple(size):
        message = (
            f"{row.source}: drawn on an image of {stated[0]}×{stated[1]} pixels, but {name} has {size[0]}×{size[1]}"
        )
        warnings.warn(BoxWarning(message, code="box-image-size", boxes=boxes), stacklevel=3)


def _inside(rows: Sequence[BoxRow], name: str, size: tuple[int, int]) -> list[BoxRow]:
    """The rows that reach into the image; the others are named in one warning."""
    gaps = outside_by(np.array([row.xyxy for row in rows], np.float64), size)
    bad = [row for row, gap in zip(rows, gaps.tolist(), strict=True) if gap >= 0]
    if bad:
        message = (
            f"{len(bad)} boxes outside {name} ({size[0]}×{size[1]} pixels) are left out (--skip-bad-boxes): "
            + ", ".join(row.source for row in bad[:3])
        )
        warnings.warn(BoxWarning(message, code="box-left-out", boxes=len(bad)), stacklevel=3)
    return [row for row, gap in zip(rows, gaps.tolist(), strict=True) if gap < 0]
