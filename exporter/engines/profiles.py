"""Optimisation profiles, from the inputs that the manifest declares."""

from __future__ import annotations

from qpert.runtime.bundle.graph_spec import AxisRange, GraphSpec, TensorSpec
from qpert.runtime.sessions.tensorrt.engines import Profile, Shape

LEAST = {"O": 1}
"""Minimum lengths above the graph's own. An image without boxes is passed with one box of weight zero, which is exactly
stock BLIP-2; so nothing depends on how a library handles empty tensors."""

OPTIMAL = {"I": 1, "O": 8, "L": 16}
"""Lengths that engines are tuned for, where that is not the maximum: re-ranking pairs one image with many texts, a
detector gives a handful of boxes, a caption has about a dozen words. Images and texts are encoded in full batches."""


def profile_of(spec: GraphSpec) -> Profile:
    """The profile of one graph: all declared inputs, with each named axis in its declared range.

    A text graph of at most 64 texts gets `{"input_ids": ((1, 2), (64, 16), (64, 35)), …}`.
    """
    lengths = {axis: lengths_of(axis, declared) for axis, declared in spec.ranges.items()}
    return {tensor.name: shapes_of(tensor, lengths) for tensor in spec.inputs}


def shapes_of(tensor: TensorSpec, lengths: dict[str, tuple[int, int, int]]) -> tuple[Shape, Shape, Shape]:
    smallest, optimal, largest = (
        tuple(lengths[axis][end] if isinstance(axis, str) else axis for axis in tensor.shape) for end in range(3)
    )
    return smallest, optimal, largest


def lengths_of(axis: str, declared: AxisRange) -> tuple[int, int, int]:
    """Shortest, optimal and longest length of one named axis."""
    longest = declared.max
    shortest = min(max(declared.min, LEAST.get(axis, 0)), longest)
    optimal = min(OPTIMAL.get(axis, longest), longest)
    return shortest, max(shortest, optimal), longest
