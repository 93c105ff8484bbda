"""From a picture's size to its resized size and crop, as nodes: `ImagePreprocessing.resized` and `crop_offset`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qpert.exporter.host_graphs.expressions import Value
from qpert.runtime.inputs.preprocessing import ImagePreprocessing


@dataclass(frozen=True)
class Side:
    """One side of a picture: `length` pixels, resized to `resized`, of which those from `offset` on are used.

    All are float64 tensors of one shape that hold whole numbers.
    """

    length: Value
    resized: Value
    offset: Value


def picture_sides(width: Value, height: Value, image: ImagePreprocessing) -> tuple[Side, Side]:
    """The horizontal and the vertical side. `width` and `height`: float64, at least 1.

    Whole numbers below 2^53 are exact in float64, and a quotient of two of them is rounded as Python rounds it.
    """
    graph = width.graph
    if image.fit == "squash":
        zero, size = graph.constant(0, np.float64), graph.constant(image.size, np.float64)
        return Side(width, size, zero), Side(height, size, zero)
    shorter = width.at_most(height)
    across, down = (_resized(length, shorter, image) for length in (width, height))
    return Side(width, across, _offset(across, image)), Side(height, down, _offset(down, image))


def _resized(length: Value, shorter: Value, image: ImagePreprocessing) -> Value:
    """The shorter side becomes `shortest_side` exactly, the longer one keeps the proportion and is rounded down."""
    return (length * image.shortest_side / shorter).floor()


def _offset(resized: Value, image: ImagePreprocessing) -> Value:
    half = (resized - image.size) / 2
    return half.floor() if image.rounding == "floor" else half.graph.node("Round", half)  # Round is half to even
