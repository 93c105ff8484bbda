"""A scene as plain data, and its sampling: objects from tiny to full-frame, some partly hidden by others.

Pixels are 0-based and boxes half-open, as everywhere in qpert. Objects are listed from back to front.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from qpert.runtime.scenes.objects import BACKGROUNDS, COLOURS, KINDS, TEXTURES, Dice

PICTURE_SIZES = ((240, 208), (208, 240))
LARGEST_AREA_WEIGHTS = (14, 18, 16, 13, 10, 8, 7, 5, 5, 4)
"""How often the largest object's box has an area of 0–0.1, 0.1–0.2, … 0.9–1 of the picture."""
LEAST_SIDE = 18
"""Pixels: the shorter side of the smallest object."""
LEAST_VISIBLE = 0.5
"""The least share of an object's own pixels that must stay visible."""

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class SceneObject:
    """One drawn object. `place` is x, y, width, height of the rectangle it is drawn into; `group` numbers its chain:
    objects of a group are of the same kind, colour and texture ("two red stars")."""

    kind: str
    colour: str
    texture: str
    place: Box
    mirrored: bool
    group: int

    @cached_property
    def box(self) -> Box:
        """x1, y1, x2, y2 around all pixels of its silhouette, also those hidden by another object (full extent)."""
        from qpert.runtime.scenes.drawing import silhouette

        x, y, width, height = self.place
        extent = silhouette(self.kind, width, height, mirrored=self.mirrored).getbbox()
        if extent is None:
            raise ValueError(f"a {self.kind} of {width}×{height} pixels has no silhouette")
        return x + extent[0], y + extent[1], x + extent[2], y + extent[3]


@dataclass(frozen=True)
class Scene:
    """A picture before it is painted. `seed` decides colour jitter, clutter and the crop of the background."""

    size: tuple[int, int]
    background: str
    objects: tuple[SceneObject, ...]
    seed: str

    @cached_property
    def groups(self) -> tuple[tuple[SceneObject, ...], ...]:
        """The objects by chain, in order of the chains' numbers."""
        count = max(item.group for item in self.objects) + 1
        return tuple(tuple(item for item in self.objects if item.group == group) for group in range(count))

    def area(self, item: SceneObject) -> float:
        """Box area over picture area."""
        x1, y1, x2, y2 = item.box
        return (x2 - x1) * (y2 - y1) / (self.size[0] * self.size[1])

    @cached_property
    def largest_area(self) -> float:
        return max(self.area(item) for item in self.objects)

    def centre(self, item: SceneObject) -> tuple[float, float]:
        """Of its box, each in 0…1."""
        x1, y1, x2, y2 = item.box
        return (x1 + x2) / 2 / self.size[0], (y1 + y2) / 2 / self.size[1]


def sample_scene(seed: str) -> Scene:
    """The scene of a seed; attempts that hide an object too much, or miss their size bin, are discarded."""
    from qpert.runtime.scenes.drawing import visible_shares

    bin_ = Dice(f"{seed}/bin").weighted(LARGEST_AREA_WEIGHTS)
    for attempt in range(200):
        scene = _attempt(Dice(f"{seed}/{attempt}"), bin_, seed)
        if scene and int(scene.largest_area * 10) == min(bin_, 9) and min(visible_shares(scene)) >= LEAST_VISIBLE:
            return scene
    raise RuntimeError(f"no scene could be arranged for the seed {seed!r}")


def _attempt(dice: Dice, bin_: int, seed: str) -> Scene | None:
    size = PICTURE_SIZES[dice.weighted((3, 1))]
    background = dice.pick(tuple(BACKGROUNDS))
    colours = dice.shuffled([colour for colour in COLOURS if colour not in BACKGROUNDS[background].unfit])
    low, high = max(bin_ / 10, 0.03), (bin_ + 1) / 10
    areas = [dice.between(low + 0.004, high - 0.004)]
    for _ in range(dice.weighted((0, 3, 4, 3))):
        areas.append(math.exp(dice.between(math.log(0.009), math.log(max(min(0.75 * areas[0], 0.16), 0.012)))))
    areas.sort(reverse=True)
    items: list[SceneObject] = []
    for group, area in enumerate(areas):
        members = _group(dice, items, area, colours[group], group, size)
        if members is None:
            return None
        items += members
    return Scene(size, background, tuple(items), seed)


def _group(
    dice: Dice, items: list[SceneObject], area: float, colour: str, group: int, size: tuple[int, int]
) -> list[SceneObject] | None:
    """One object, or two or three alike if they are small, each at a free place; None if there is none."""
    kind = dice.pick(tuple(KINDS))
    texture = tuple(TEXTURES)[dice.weighted((5, 2, 2, 2))]
    count = 1 if group == 0 or area > 0.08 or dice.chance(0.78) else dice.whole(2, 3)
    width, height = _measures(dice, kind, area, size)
    members: list[SceneObject] = []
    for _ in range(count):
        place = _free_place(dice, [*items, *members], width, height, size)
        if place is None:
            return None
        members.append(SceneObject(kind, colour, texture, (*place, width, height), dice.chance(0.5), group))
    return members


def _measures(dice: Dice, kind: str, area: float, size: tuple[int, int]) -> tuple[int, int]:
    """Width and height in pixels for an area in shares of the picture; if one does not fit, the other grows."""
    pixels = area * size[0] * size[1]
    aspect = KINDS[kind].aspect * dice.between(0.9, 1.1)
    width = min(max(round(math.sqrt(pixels * aspect)), LEAST_SIDE), size[0])
    height = min(max(round(pixels / width), LEAST_SIDE), size[1])
    return min(max(round(pixels / height), LEAST_SIDE), size[0]), height


def _free_place(
    dice: Dice, items: list[SceneObject], width: int, height: int, size: tuple[int, int]
) -> tuple[int, int] | None:
    """A corner (x, y) that hides no object of similar size by more than a random share."""
    allowed = dice.between(0.1, 0.4) if dice.chance(0.35) else 0.0
    for _ in range(25):
        x, y = dice.whole(0, size[0] - width), dice.whole(0, size[1] - height)
        if all(_overlap(item.place, (x, y, width, height)) <= allowed for item in items):
            return x, y
    return None


def _overlap(behind: Box, front: Box) -> float:
    """The shared area over the smaller of the two areas; 0 if the one behind is more than three times as large."""
    (x1, y1, w1, h1), (x2, y2, w2, h2) = behind, front
    if w1 * h1 > 3 * w2 * h2:
        return 0.0
    across = min(x1 + w1, x2 + w2) - max(x1, x2)
    down = min(y1 + h1, y2 + h2) - max(y1, y2)
    return max(across, 0) * max(down, 0) / min(w1 * h1, w2 * h2)
