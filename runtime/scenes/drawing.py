"""Painting a scene with Pillow: background, clutter, then the objects from back to front."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

from qpert.runtime.scenes.backgrounds import paint_background
from qpert.runtime.scenes.objects import COLOURS, KINDS, LIGHTENED, Dice, Part, Rgb

if TYPE_CHECKING:
    from qpert.runtime.scenes.scene import Scene, SceneObject

JITTER = 12
"""By how much each channel of an object's colour may differ from the table's."""


def draw_scene(scene: Scene, *, markers: Sequence[Rgb] | None = None) -> Image.Image:
    """The picture, RGB. `markers`: paint each object's whole silhouette in one flat colour instead (for tests)."""
    dice = Dice(f"{scene.seed}/paint")
    canvas = paint_background(scene.background, scene.size, dice)
    for index, item in enumerate(scene.objects):
        x, y, width, height = item.place
        mask = silhouette(item.kind, width, height, mirrored=item.mirrored)
        tile = _tile(item, dice) if markers is None else Image.new("RGB", mask.size, markers[index])
        canvas.paste(tile, (x, y), mask)
    return canvas


def object_map(scene: Scene) -> Image.Image:
    """Mode L, the picture's size: for each pixel 1 + the index of the object seen there, 0 for the background."""
    seen = Image.new("L", scene.size)
    for index, item in enumerate(scene.objects):
        x, y, width, height = item.place
        seen.paste(index + 1, (x, y), silhouette(item.kind, width, height, mirrored=item.mirrored))
    return seen


def visible_shares(scene: Scene) -> list[float]:
    """For each object, the share of its silhouette's pixels that no object in front hides."""
    seen = object_map(scene).histogram()
    shares = []
    for index, item in enumerate(scene.objects):
        own = silhouette(item.kind, *item.place[2:], mirrored=item.mirrored).histogram()[255]
        shares.append(seen[index + 1] / own)
    return shares


@lru_cache(maxsize=4096)
def silhouette(kind: str, width: int, height: int, *, mirrored: bool) -> Image.Image:
    """Mode L, 255 where the object is. Shared between calls: do not modify."""
    mask = Image.new("L", (width, height))
    pen = ImageDraw.Draw(mask)
    for part in KINDS[kind].parts:
        if part.role != "detail":
            _draw(pen, part, (width, height), mirrored, 0 if part.role == "hole" else 255)
    return mask


def _tile(item: SceneObject, dice: Dice) -> Image.Image:
    """The object's paint over its whole rectangle; the silhouette masks it."""
    _, _, width, height = item.place
    body = _textured(item, _jittered(COLOURS[item.colour], dice), dice)
    pen = ImageDraw.Draw(body)
    for part in KINDS[item.kind].parts:
        if part.paint is not None:
            _draw(pen, part, (width, height), item.mirrored, part.paint)
    return body


def _textured(item: SceneObject, colour: Rgb, dice: Dice) -> Image.Image:
    _, _, width, height = item.place
    tile = Image.new("RGB", (width, height), colour)
    if item.texture == "plain":
        return tile
    pen, other = ImageDraw.Draw(tile), _second_shade(item.colour, colour)
    period = max(10, round(min(width, height) / dice.between(3.0, 4.5)))
    half, start = period // 2, -dice.whole(0, period - 1)
    across, down = range(start, width, period), range(start, height, period)
    if item.texture == "striped":
        for x in range(start - height, width, period):  # at 45 degrees
            pen.polygon([(x, 0), (x + half, 0), (x + half + height, height), (x + height, height)], fill=other)
    elif item.texture == "spotted":
        for x, y in ((x, y) for x in across for y in down):
            pen.ellipse((x, y, x + 0.62 * period, y + 0.62 * period), fill=other)
    else:
        for x, y in ((x, y) for x in across for y in down):
            pen.rectangle((x, y, x + half, y + half), fill=other)
            pen.rectangle((x + half, y + half, x + period, y + period), fill=other)
    return tile


def _second_shade(name: str, colour: Rgb) -> Rgb:
    red, green, blue = ((0.3 * v + 0.7 * 255) if name in LIGHTENED else 0.4 * v for v in colour)
    return round(red), round(green), round(blue)


def _jittered(colour: Rgb, dice: Dice) -> Rgb:
    red, green, blue = (int(np.clip(v + dice.between(-JITTER, JITTER), 0, 255)) for v in colour)
    return red, green, blue


def _draw(pen: ImageDraw.ImageDraw, part: Part, size: tuple[int, int], mirrored: bool, fill: int | Rgb) -> None:
    width, height = size[0] - 1, size[1] - 1  # Pillow's corners are pixels that are painted
    points = [(round((1 - x if mirrored else x) * width), round(y * height)) for x, y in part.points]
    if part.shape == "polygon":
        pen.polygon(points, fill=fill)
        return
    (x1, y1), (x2, y2) = points
    corners = (min(x1, x2), y1, max(x1, x2), y2)
    pen.ellipse(corners, fill=fill) if part.shape == "ellipse" else pen.rectangle(corners, fill=fill)
