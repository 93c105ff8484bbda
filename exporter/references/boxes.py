"""Reference masks and weights of boxes: cell by cell and box by box, directly from the definition.

`qpert verify` compares `qpert.runtime.inputs.perturbation` (separable, whole batches) with this, so they share no code.
"""

from __future__ import annotations

import numpy as np
import torch

from qpert.runtime.bundle.samples import BoxSample
from qpert.runtime.inputs.perturbation import Perturbation
from qpert.runtime.inputs.token_grid import TokenGrid

PICTURES: tuple[tuple[tuple[int, int], tuple[tuple[float, float, float, float], ...]], ...] = (
    ((640, 480), ((0, 0, 640, 480), (13, 20, 45, 61), (300.5, 200.25, 310.75, 215.5), (600, 1, 640, 479))),
    ((97, 311), ((10, 10, 20, 300), (0, 150, 97, 151))),
)
"""(width, height), and boxes (x1, y1, x2, y2) in pixels: whole, small, fractional, at the edge, thin."""


def box_samples(perturbation: Perturbation, grid: TokenGrid) -> tuple[BoxSample, ...]:
    """The boxes of `PICTURES` with their masks [O, N] and weights [O]."""
    samples = []
    for size, boxes in PICTURES:
        masks = np.stack([mask(box, size, perturbation.coverage, grid) for box in boxes])
        weights = [weight(box, size, perturbation, len(boxes)) for box in boxes]
        samples.append(
            BoxSample(np.array(boxes, np.float64), np.array(size), masks, np.array(weights, dtype=np.float32))
        )
    return tuple(samples)


def weight(box: tuple[float, ...], size: tuple[int, int], perturbation: Perturbation, count: int) -> float:
    """α (β + γ S), divided by the number of boxes if they are averaged."""
    if perturbation.stages == "none":
        return 0.0
    share = (box[2] - box[0]) * (box[3] - box[1]) / (size[0] * size[1])
    value = perturbation.alpha * (perturbation.beta + perturbation.gamma * share)
    return value / count if perturbation.reduction == "mean" else value


def mask(box: tuple[float, ...], size: tuple[int, int], coverage: str, grid: TokenGrid) -> np.ndarray:
    """float32 [N]: 0 for the prefix (CLS), then the cells row by row."""
    cells = dilated(box, size, grid) if coverage == "dilated" else overlap(box, size, grid)
    if coverage == "binary":
        cells = cells > 0
    return np.concatenate([np.zeros(grid.prefix), np.asarray(cells, dtype=np.float32).ravel()]).astype(np.float32)


def resized_size(size: tuple[int, int], grid: TokenGrid) -> tuple[int, int]:
    """Width and height of an image after the resize, before any crop."""
    side, short = grid.image.size, grid.image.shortest_side
    if grid.image.fit == "squash":
        return side, side
    return tuple(short if length == min(size) else int(short * length / min(size)) for length in size)  # type: ignore[return-value]


def crop_start(length: int, grid: TokenGrid) -> int:
    """Start of the crop along a resized side."""
    if grid.image.fit == "squash":
        return 0
    spare = length - grid.image.size
    return spare // 2 if grid.image.rounding == "floor" else round(spare / 2)


def overlap(box: tuple[float, ...], size: tuple[int, int], grid: TokenGrid) -> np.ndarray:
    """The share of each cell that the box covers, in the image's own pixels."""
    resized = resized_size(size, grid)
    width, height = (grid.patch * length / new for length, new in zip(size, resized, strict=True))
    left, top = (crop_start(new, grid) * length / new for length, new in zip(size, resized, strict=True))
    shares = np.zeros((grid.rows, grid.columns))
    for row in range(grid.rows):
        for column in range(grid.columns):
            across = min(box[2], left + (column + 1) * width) - max(box[0], left + column * width)
            down = min(box[3], top + (row + 1) * height) - max(box[1], top + row * height)
            shares[row, column] = max(across, 0) * max(down, 0) / (width * height)
    return shares


def dilated(box: tuple[float, ...], size: tuple[int, int], grid: TokenGrid) -> np.ndarray:
    """As in the authors' release: whole-pixel corners, mask resized, nonzero pixels set to 1, averaged per patch.

    The mask excludes what a crop removes, and pixels that do not fill a patch.
    """
    x1, y1, x2, y2 = (int(value) for value in box)
    pixels = torch.zeros(1, 1, size[1], size[0], dtype=torch.float64)
    pixels[..., y1:y2, x1:x2] = 1
    width, height = resized_size(size, grid)
    resized = torch.nn.functional.interpolate(pixels, (height, width), mode="bilinear", align_corners=False)
    top, left = crop_start(height, grid), crop_start(width, grid)
    seen = resized[..., top : top + grid.rows * grid.patch, left : left + grid.columns * grid.patch]
    least = 1 / (2 * width) / (2 * height)  # the smallest share of a pixel that has one; torch rounds others to 1e-16
    touched = (seen > least / 2).double()
    return torch.nn.functional.avg_pool2d(touched, grid.patch)[0, 0].numpy()
