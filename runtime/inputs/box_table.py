"""The boxes of many images, by image name: what a box file holds before the images themselves are seen."""

from __future__ import annotations

import difflib
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeAlias

import numpy as np

from qpert.runtime.errors import BoxError, QpertWarning
from qpert.runtime.inputs.boxes import Boxes


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

    A name in the table and the name of an image match if they are equal; failing that, if their last path components
    are; failing that, if these are equal without their extensions; and where the table's name is a bare number (COCO's
    `image_id`), if it is the number at the end of the image's stem. A match that is not the only one is an error.
    After `require`, `exact` is true and only equal names match.
    """

    rows: tuple[BoxRow, ...]
    source: str = "boxes"
    exact: bool = False

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
        rows = self._by_image.get(self._own_name(name) or "", [])
        if not rows:
            return Boxes.empty(size)
        stated = rows[0].image_size
        if stated is not None and stated != tuple(size):
            warnings.warn(
                f"{rows[0].source}: drawn on an image of {stated[0]}×{stated[1]} pixels, "
                f"but {name} has {size[0]}×{size[1]}",
                QpertWarning,
                stacklevel=2,
            )
        scores = [row.score for row in rows if row.score is not None]
        labels = tuple(" ".join(row.names) for row in rows if row.names)
        return Boxes(
            np.array([row.xyxy for row in rows], np.float64),
            size,
            scores=np.array(scores) if len(scores) == len(rows) else None,
            labels=labels if len(labels) == len(rows) else None,
            sources=tuple(row.source for row in rows),
        )

    def require(self, names: Iterable[str]) -> BoxTable:
        """The same boxes under the names of the images that are about to be encoded.

        Raises `BoxError` if the table has boxes for an image that is not among `names` (near matches are listed), if
        one of its names matches several of them, or if two of its names match the same one.
        """
        known = list(dict.fromkeys(names))
        levels = [_level(known, key) for key in _IMAGE_KEYS]
        renamed: dict[str, str] = {}
        taken: dict[str, str] = {}
        for own in self.images:
            target = self._only(own, _matches(own, _TABLE_KEYS, levels), known)
            if first := taken.get(target):
                raise BoxError(f"{self.source}: {first!r} and {own!r} both match the image {target!r}; use one name")
            renamed[own], taken[target] = target, own
        return replace(self, rows=tuple(replace(row, image=renamed[row.image]) for row in self.rows), exact=True)

    def select(self, keep: Callable[[BoxRow], bool]) -> BoxTable:
        """The rows for which `keep` is true: those above a score, say, or those whose chain a sentence names."""
        return replace(self, rows=tuple(row for row in self.rows if keep(row)))

    def _only(self, own: str, hits: list[str], known: list[str]) -> str:
        row = self._by_image[own][0]
        if not hits:
            near = difflib.get_close_matches(own, known, n=3, cutoff=0.5)
            hint = f"near matches: {', '.join(near)}" if near else "no image has a name like it"
            raise BoxError(
                f"{row.source}: boxes for the image {own!r}, which is not among the {len(known)} images; {hint}"
            )
        if len(hits) > 1:
            raise BoxError(
                f"{row.source}: the image name {own!r} is ambiguous: it matches {', '.join(hits[:5])}; "
                "write it with its folder, as the image is given"
            )
        return hits[0]

    def _own_name(self, name: str) -> str | None:
        """The table's name for an image, or None where it has no boxes."""
        if self.exact:
            return name
        hits = _matches(name, _IMAGE_KEYS, self._levels)
        if len(hits) > 1:
            raise BoxError(
                f"{self.source}: which boxes are those of {name} is ambiguous: it matches {', '.join(hits[:5])}; "
                "write image names with their folder"
            )
        return hits[0] if hits else None

    @cached_property
    def _by_image(self) -> Mapping[str, list[BoxRow]]:
        groups: dict[str, list[BoxRow]] = {}
        for row in self.rows:
            groups.setdefault(row.image, []).append(row)
        return groups

    @cached_property
    def _levels(self) -> list[_Level]:
        return [_level(self.images, key) for key in _TABLE_KEYS]


def image_stem(name: str) -> str:
    """The last component of an image's name, without its extension."""
    stem, _, _ = _file_name(name).rpartition(".")
    return stem or _file_name(name)


def _file_name(name: str) -> str:
    return name.replace("\\", "/").rsplit("/", 1)[-1]


def _final_number(name: str) -> str | None:
    digits = re.search(r"[0-9]+$", image_stem(name))
    return (digits[0].lstrip("0") or "0") if digits else None


def _bare_number(name: str) -> str | None:
    return _final_number(name) if name.isdigit() else None


_Key: TypeAlias = Callable[[str], str | None]
_Level: TypeAlias = Mapping[str, list[str]]
_TABLE_KEYS: tuple[_Key, ...] = (str, _file_name, image_stem, _bare_number)
_IMAGE_KEYS: tuple[_Key, ...] = (str, _file_name, image_stem, _final_number)
"""What is compared of a table's name with what of an image's, in this order, until something is equal."""


def _level(names: Iterable[str], key: _Key) -> _Level:
    level: dict[str, list[str]] = defaultdict(list)
    for name in names:
        if (value := key(name)) is not None:
            level[value].append(name)
    return dict(level)


def _matches(name: str, keys: tuple[_Key, ...], levels: list[_Level]) -> list[str]:
    """The names of the first level that has any with the same key."""
    for key, level in zip(keys, levels, strict=True):
        if (value := key(name)) is not None and value in level:
            return level[value]
    return []
