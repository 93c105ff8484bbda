"""Backgrounds of scenes: ten patterns, each painted larger than a picture and then cropped."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from qpert.runtime.scenes.objects import BACKGROUNDS, Dice, Rgb

VARIANTS = 6
SIDE = 320
"""Pixels of a painted pattern; a picture shows a crop of it."""
CLUTTER = 26
"""The largest number of dashes and specks."""


def paint_background(name: str, size: tuple[int, int], dice: Dice) -> Image.Image:
    """A crop of the pattern, perhaps mirrored, with clutter in muted colours."""
    pattern = _pattern(name, dice.whole(0, VARIANTS - 1))
    x, y = dice.whole(0, SIDE - size[0]), dice.whole(0, SIDE - size[1])
    canvas = pattern.crop((x, y, x + size[0], y + size[1]))
    if dice.chance(0.5):
        canvas = canvas.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    _litter(canvas, BACKGROUNDS[name].base, dice)
    return canvas


def _litter(canvas: Image.Image, base: Rgb, dice: Dice) -> None:
    """Thin dashes and specks, half-way between the background's colour and a random grey or earth tone."""
    pen = ImageDraw.Draw(canvas)
    for _ in range(dice.whole(0, CLUTTER)):
        tone = dice.pick(((60, 60, 60), (200, 200, 200), (150, 120, 90), (110, 130, 100)))
        red, green, blue = (round(0.5 * a + 0.5 * b) for a, b in zip(base, tone, strict=True))
        x, y = dice.whole(0, canvas.width), dice.whole(0, canvas.height)
        if dice.chance(0.5):
            end = (x + dice.whole(-14, 14), y + dice.whole(-14, 14))
            pen.line([(x, y), end], fill=(red, green, blue), width=dice.whole(1, 3))
        else:
            radius = dice.whole(1, 3)
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(red, green, blue))


@cache
def _pattern(name: str, variant: int) -> Image.Image:
    """SIDE×SIDE, RGB: base colour, fine noise, and the marks of its kind. Shared: do not modify."""
    dice = Dice(f"background {name} {variant}")
    noise = np.random.Generator(np.random.PCG64(variant)).random((SIDE, SIDE, 1)) - 0.5
    base = np.asarray(BACKGROUNDS[name].base, np.float64) + dice.between(-8, 8)
    pixels: npt.NDArray[np.float64] = base + noise * _NOISE.get(name, 14)
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    _MARKS[name](ImageDraw.Draw(image), dice)
    return image


def _scattered(
    pen: ImageDraw.ImageDraw, dice: Dice, count: int, colours: tuple[Rgb, ...], length: tuple[int, int]
) -> None:
    for _ in range(count):
        x, y = dice.whole(0, SIDE), dice.whole(0, SIDE)
        pen.line([(x, y), (x + dice.whole(-2, 2), y - dice.whole(*length))], fill=dice.pick(colours), width=2)


def _rows(pen: ImageDraw.ImageDraw, dice: Dice, height: int, width: int, line: Rgb, thickness: int) -> None:
    """Courses of bricks or planks: joints between rows, and shifted joints within them."""
    for row, y in enumerate(range(-dice.whole(0, height), SIDE, height)):
        pen.line([(0, y), (SIDE, y)], fill=line, width=thickness)
        for x in range(-(row % 2) * width // 2, SIDE, width):
            pen.line([(x, y), (x, y + height)], fill=line, width=thickness)


def _grass(pen: ImageDraw.ImageDraw, dice: Dice) -> None:
    _scattered(pen, dice, 900, ((70, 135, 45), (130, 200, 90)), (4, 10))


def _sand(pen: ImageDraw.ImageDraw, dice: Dice) -> None:
    _scattered(pen, dice, 500, ((205, 178, 122), (240, 218, 170)), (0, 2))


def _bricks(pen: ImageDraw.ImageDraw, dice: Dice) -> None:
    _rows(pen, dice, 20, 44, (222, 205, 190), 3)


def _night(pen: ImageDraw.ImageDraw, dice: Dice) -> None:
    for _ in range(130):
        x, y = dice.whole(0, SIDE), dice.whole(0, SIDE)
        pen.rectangle((x, y, x + dice.whole(0, 1), y + 1), fill=(225, 225, 190))


def _snow(pen: ImageDraw.ImageDraw, dice: Dice) -> None:
    for _ in range(60):
        x, y = dice.whole(-20, SIDE), dice.whole(0, SIDE)
        pen.arc((x, y, x + dice.whole(20, 60), y + dice.whole(8, 20)), 180, 360, fill=(212, 222, 240), width=2)


def _water(pen: ImageDraw.ImageDraw, dice: Dice) -> None:
    for y in range(dice.whole(0, 12), SIDE, 15):
        for x in range(-dice.whole(0, 24), SIDE, 24):
            pen.arc((x, y, x + 24, y + 10), 0, 180, fill=(165, 212, 245), width=2)


def _wood(pen: ImageDraw.ImageDraw, dice: Dice) -> None:
    _rows(pen, dice, 34, 150, (105, 68, 36), 2)
    for _ in range(120):
        x, y = dice.whole(0, SIDE), dice.whole(0, SIDE)
        pen.line([(x, y), (x + dice.whole(10, 50), y)], fill=(150, 100, 58), width=1)


def _tiles(pen: ImageDraw.ImageDraw, dice: Dice) -> None:
    start = dice.whole(0, 30)
    for at in range(start - 40, SIDE, 40):
        pen.line([(at, 0), (at, SIDE)], fill=(130, 134, 138), width=3)
        pen.line([(0, at), (SIDE, at)], fill=(130, 134, 138), width=3)


def _carpet(pen: ImageDraw.ImageDraw, dice: Dice) -> None:
    start = dice.whole(0, 24)
    for x in range(start - 24, SIDE, 24):
        for y in range(start - 24, SIDE, 24):
            pen.polygon([(x, y - 5), (x + 5, y), (x, y + 5), (x - 5, y)], fill=(178, 140, 200))


def _road(pen: ImageDraw.ImageDraw, dice: Dice) -> None:
    _scattered(pen, dice, 400, ((66, 66, 70), (104, 104, 108)), (0, 2))
    for y in range(dice.whole(0, 60), SIDE, 110):
        for x in range(0, SIDE, 64):
            pen.rectangle((x, y, x + 30, y + 5), fill=(205, 205, 195))


_NOISE = {"sand": 24.0, "road": 22.0, "night": 6.0, "snow": 8.0}
_MARKS: dict[str, Callable[[ImageDraw.ImageDraw, Dice], None]] = {
    "grass": _grass,
    "sand": _sand,
    "bricks": _bricks,
    "night": _night,
    "snow": _snow,
    "water": _water,
    "wood": _wood,
    "tiles": _tiles,
    "carpet": _carpet,
    "road": _road,
}
