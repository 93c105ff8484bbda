"""Masks and weights of boxes, written the long way: cell by cell, box by box, as the definition reads.

What `qpert.runtime.inputs.perturbation` computes separably and for whole batches is compared with this by
`qpert verify`, so it shares nothing with it.
"""

from __future__ import annotations

import numpy as np
import torch

from qpert.runtime.bundle.samples import BoxSample
from qpert.runtime.inputs.perturbation import Perturbation

PICTURES: tuple[tuple[tuple[int, int], tuple[tuple[float, float, float, float], ...]], ...] = (
    ((640, 480), ((0, 0, 640, 480), (13, 20, 45, 61), (300.5, 200.25, 310.75, 215.5), (600, 1, 640, 479))),
    ((97, 311), ((10, 10, 20, 300), (0, 150, 97, 151))),
)
"""(width, height), and boxes (x1, y1, x2, y2) in pixels: whole, small, fractional, at the edge, thin."""


def box_samples(perturbation: Perturbation, *, grid: int, image_size: int) -> tuple[BoxSample, ...]:
    """The boxes of `PICTURES` with their masks [O, N] and weights [O]."""
    samples = []
    for size, boxes in PICTURES:
        masks = np.stack([mask(box, size, perturbation.coverage, grid, image_size) for box in boxes])
        weights = [weight(box, size, perturbation, len(boxes)) for box in boxes]
        samples.append(
            BoxSample(np.array(boxes, np.float64), np.array(size), masks, np.array(weights, dtype=np.float32))
        )
    return tuple(samples)


def weight(box: tuple[float, ...], size: tuple[int, int], perturbation: Perturbation, count: int) -> float:
    """α (β + γ S), over the number of boxes where they are averaged."""
    if perturbation.stages == "none":
        return 0.0
    share = (box[2] - box[0]) * (box[3] - box[1]) / (size[0] * size[1])
    value = perturbation.alpha * (perturbation.beta + perturbation.gamma * share)
    return value / count if perturbation.reduction == "mean" else value


def mask(box: tuple[float, ...], size: tuple[int, int], coverage: str, grid: int, image_size: int) -> np.ndarray:
    """float32 [N]: 0 for CLS, then the cells row by row."""
    cells = dilated(box, size, grid, image_size) if coverage == "dilated" else overlap(box, size, grid)
    if coverage == "binary":
        cells = cells > 0
    return np.concatenate([[0], np.asarray(cells, dtype=np.float32).ravel()]).astype(np.float32)


def overlap(box: tuple[float, ...], size: tuple[int, int], grid: int) -> np.ndarray:
    """The share of each cell that the box covers, in the picture's own pixels."""
    width, height = size[0] / grid, size[1] / grid
    shares = np.zeros((grid, grid))
    for row in range(grid):
        for column in range(grid):
            across = min(box[2], (column + 1) * width) - max(box[0], column * width)
            down = min(box[3], (row + 1) * height) - max(box[1], row * height)
            shares[row, column] = max(across, 0) * max(down, 0) / (width * height)
    return shares


def dilated(box: tuple[float, ...], size: tuple[int, int], grid: int, image_size: int) -> np.ndarray:
    """The authors' release: whole-pixel corners, mask resized, every pixel that is not 0 set to 1, averaged a patch."""
    x1, y1, x2, y2 = (int(value) for value in box)
    pixels = torch.zeros(1, 1, size[1], size[0], dtype=torch.float64)
    pixels[..., y1:y2, x1:x2] = 1
    resized = torch.nn.functional.interpolate(pixels, (image_size, image_size), mode="bilinear", align_corners=False)
    touched = (resized > 0).double()
    return torch.nn.functional.avg_pool2d(touched, image_size // grid)[0, 0].numpy()
