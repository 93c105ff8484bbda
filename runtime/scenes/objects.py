"""Tables of the demonstration's world: kinds, colours, textures, backgrounds, and dice to choose them.

Shapes are in unit coordinates of the object's box: x from 0 (left) to 1, y from 0 (top) to 1.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

Rgb = tuple[int, int, int]
T = TypeVar("T")


class Dice:
    """Choices from a seed. Only `random.random` is used: Python guarantees that its sequence stays the same."""

    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed).random

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * self._random()

    def whole(self, low: int, high: int) -> int:
        """A whole number from `low` to `high`, both included."""
        return low + int(self._random() * (high - low + 1))

    def chance(self, probability: float) -> bool:
        return self._random() < probability

    def pick(self, values: Sequence[T]) -> T:
        return values[int(self._random() * len(values))]

    def weighted(self, weights: Sequence[float]) -> int:
        """An index, with a probability proportional to its weight."""
        left = self._random() * sum(weights)
        for index, weight in enumerate(weights):
            left -= weight
            if left < 0:
                return index
        return len(weights) - 1

    def shuffled(self, values: Sequence[T]) -> list[T]:
        return [values[index] for _, index in sorted((self._random(), index) for index in range(len(values)))]


@dataclass(frozen=True)
class Part:
    """A piece of a kind's drawing.

    `shape` with its `points`: the corners of a polygon, or the two corners of a rectangle or ellipse. `paint` None is
    the object's own colour and texture, else a fixed colour. `role`: `outline` belongs to the silhouette, `detail` is
    painted where the silhouette already is, `hole` is cut out of it.
    """

    shape: Literal["polygon", "ellipse", "rectangle"]
    points: tuple[tuple[float, float], ...]
    paint: Rgb | None = None
    role: Literal["outline", "detail", "hole"] = "outline"


@dataclass(frozen=True)
class Kind:
    """A kind of object: its nouns (singular, plural), its Flickr30k-Entities type, width over height, and drawing."""

    name: str
    nouns: tuple[tuple[str, str], ...]
    entity: str
    aspect: float
    parts: tuple[Part, ...]


def _ellipse(
    x1: float, y1: float, x2: float, y2: float, paint: Rgb | None = None, **role: Literal["detail", "hole"]
) -> Part:
    return Part("ellipse", ((x1, y1), (x2, y2)), paint, role.get("role", "outline"))


def _rectangle(x1: float, y1: float, x2: float, y2: float, paint: Rgb | None = None, **role: Literal["detail"]) -> Part:
    return Part("rectangle", ((x1, y1), (x2, y2)), paint, role.get("role", "outline"))


def _polygon(
    *points: tuple[float, float], paint: Rgb | None = None, role: Literal["outline", "detail"] = "outline"
) -> Part:
    return Part("polygon", points, paint, role)


def _star() -> tuple[tuple[float, float], ...]:
    """Ten corners, stretched so that the star touches all four sides of its box."""
    corners = []
    for step in range(10):
        radius = 1.0 if step % 2 == 0 else 0.42
        angle = math.pi * step / 5
        corners.append((radius * math.sin(angle), -radius * math.cos(angle)))
    left, right = min(x for x, _ in corners), max(x for x, _ in corners)
    top, bottom = min(y for _, y in corners), max(y for _, y in corners)
    return tuple(((x - left) / (right - left), (y - top) / (bottom - top)) for x, y in corners)


def _dome() -> tuple[tuple[float, float], ...]:
    """A half circle over the upper 60 % of the box, in sixteen chords."""
    angles = [math.pi * step / 16 for step in range(17)]
    return tuple((0.5 - 0.5 * math.cos(angle), 0.6 - 0.6 * math.sin(angle)) for angle in angles)


def _petals() -> tuple[Part, ...]:
    """Six petals around the middle of a flower."""
    places = [(0.5 + 0.32 * math.sin(math.pi * k / 3), 0.5 - 0.32 * math.cos(math.pi * k / 3)) for k in range(6)]
    return tuple(_ellipse(x - 0.2, y - 0.2, x + 0.2, y + 0.2) for x, y in places)


_BLACK, _DARK, _WHITE = (20, 20, 20), (70, 40, 30), (250, 250, 250)
_TRUNK, _GLASS, _CORE = (95, 60, 30), (175, 220, 245), (90, 55, 15)

KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("ball", (("ball", "balls"),), "other", 1.0, (
            _ellipse(0, 0, 1, 1),
            _ellipse(0.18, 0.14, 0.46, 0.42, _WHITE, role="detail"),
        )),
        Kind("star", (("star", "stars"),), "other", 1.05, (_polygon(*_star()),)),
        Kind("heart", (("heart", "hearts"),), "other", 1.1, (
            _ellipse(0, 0, 0.54, 0.58),
            _ellipse(0.46, 0, 1, 0.58),
            _polygon((0.03, 0.4), (0.97, 0.4), (0.5, 1)),
        )),
        Kind("house", (("house", "houses"), ("cottage", "cottages")), "other", 1.0, (
            _rectangle(0.08, 0.4, 0.92, 1),
            _polygon((0, 0.44), (0.5, 0), (1, 0.44), paint=_DARK),
            _rectangle(0.4, 0.64, 0.6, 1, _DARK, role="detail"),
            _rectangle(0.16, 0.55, 0.32, 0.73, _WHITE, role="detail"),
            _rectangle(0.68, 0.55, 0.84, 0.73, _WHITE, role="detail"),
        )),
        Kind("tree", (("tree", "trees"),), "other", 0.75, (
            _rectangle(0.39, 0.55, 0.61, 1, _TRUNK),
            _polygon((0, 0.72), (0.5, 0), (1, 0.72)),
        )),
        Kind("car", (("car", "cars"), ("automobile", "automobiles")), "vehicles", 1.6, (
            _rectangle(0, 0.36, 1, 0.8),
            _polygon((0.18, 0.4), (0.3, 0), (0.72, 0), (0.86, 0.4)),
            _polygon((0.27, 0.36), (0.35, 0.08), (0.68, 0.08), (0.77, 0.36), paint=_GLASS, role="detail"),
            _ellipse(0.08, 0.56, 0.36, 1, _BLACK),
            _ellipse(0.64, 0.56, 0.92, 1, _BLACK),
        )),
        Kind("boat", (("boat", "boats"), ("sailboat", "sailboats")), "vehicles", 1.0, (
            _polygon((0, 0.62), (1, 0.62), (0.8, 1), (0.2, 1)),
            _rectangle(0.46, 0, 0.53, 0.62, _TRUNK),
            _polygon((0.55, 0.03), (0.55, 0.56), (0.96, 0.56), paint=_WHITE),
        )),
        Kind("fish", (("fish", "fishes"),), "animals", 1.5, (
            _ellipse(0, 0.06, 0.78, 0.94),
            _polygon((0.62, 0.5), (1, 0), (1, 1)),
            _ellipse(0.1, 0.26, 0.3, 0.54, _WHITE, role="detail"),
            _ellipse(0.14, 0.34, 0.24, 0.48, _BLACK, role="detail"),
        )),
        Kind("flower", (("flower", "flowers"), ("blossom", "blossoms")), "other", 1.0, (
            *_petals(),
            _ellipse(0.3, 0.3, 0.7, 0.7, _CORE),
        )),
        Kind("clock", (("clock", "clocks"),), "other", 1.0, (
            _ellipse(0, 0, 1, 1),
            _ellipse(0.2, 0.2, 0.8, 0.8, _WHITE, role="detail"),
            _rectangle(0.46, 0.24, 0.54, 0.52, _BLACK, role="detail"),
            _rectangle(0.46, 0.46, 0.72, 0.54, _BLACK, role="detail"),
        )),
        Kind("cup", (("cup", "cups"), ("mug", "mugs")), "other", 1.2, (
            _ellipse(0.5, 0.15, 1, 0.8),
            _ellipse(0.63, 0.31, 0.88, 0.64, role="hole"),
            _polygon((0, 0), (0.72, 0), (0.64, 1), (0.08, 1)),
            _ellipse(0.03, 0, 0.69, 0.2, _DARK, role="detail"),
        )),
        Kind("umbrella", (("umbrella", "umbrellas"), ("parasol", "parasols")), "other", 1.0, (
            _rectangle(0.46, 0.4, 0.54, 1, _BLACK),
            _polygon(*_dome()),
        )),
    )
}  # fmt: skip

COLOURS: dict[str, Rgb] = {
    "red": (215, 30, 35),
    "orange": (248, 135, 20),
    "yellow": (250, 228, 45),
    "green": (35, 150, 55),
    "blue": (35, 75, 215),
    "purple": (130, 40, 170),
    "pink": (252, 150, 195),
    "brown": (120, 70, 30),
    "white": (246, 246, 246),
    "black": (24, 24, 24),
}
LIGHTENED = ("blue", "purple", "brown", "black")
"""Colours whose texture is painted in a lighter shade; that of the others is darker."""

TEXTURES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "plain": ((), ()),
    "striped": (("striped",), ("stripes",)),
    "spotted": (("spotted", "dotted"), ("spots", "dots")),
    "checked": (("checked", "checkered"), ("checks",)),
}
"""Texture → its adjectives and its plural nouns ("with stripes")."""


@dataclass(frozen=True)
class Background:
    """A place: its phrases (preposition, then the Entities phrase), its base colour, and the object colours that would
    not be visible there."""

    name: str
    phrases: tuple[tuple[str, str], ...]
    base: Rgb
    unfit: tuple[str, ...]


_GRASS = (("on", "the grass"), ("on", "a lawn"), ("in", "a meadow"))
_SAND = (("on", "the sand"), ("on", "a sandy beach"))
_BRICKS = (("in front of", "a brick wall"), ("against", "red bricks"))
_NIGHT = (("in", "the night sky"), ("under", "a dark night sky"))
_SNOW = (("in", "the snow"), ("on", "fresh snow"))
_WATER = (("on", "the water"), ("in", "the blue sea"))
_WOOD = (("on", "a wooden floor"), ("on", "wooden planks"))
_TILES = (("on", "grey tiles"), ("on", "a tiled floor"))
_CARPET = (("on", "a purple carpet"), ("on", "the violet rug"))
_ROAD = (("on", "a dark road"), ("on", "the asphalt"))

BACKGROUNDS: dict[str, Background] = {
    place.name: place
    for place in (
        Background("grass", _GRASS, (105, 175, 70), ("green",)),
        Background("sand", _SAND, (226, 200, 145), ("orange", "yellow")),
        Background("bricks", _BRICKS, (175, 85, 65), ("red", "brown")),
        Background("night", _NIGHT, (18, 22, 60), ("black", "blue", "purple")),
        Background("snow", _SNOW, (236, 240, 248), ("white",)),
        Background("water", _WATER, (80, 150, 215), ("blue",)),
        Background("wood", _WOOD, (172, 120, 72), ("brown", "orange")),
        Background("tiles", _TILES, (185, 188, 190), ("white",)),
        Background("carpet", _CARPET, (150, 105, 175), ("purple",)),
        Background("road", _ROAD, (82, 82, 86), ("black",)),
    )
}
