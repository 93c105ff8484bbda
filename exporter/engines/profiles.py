"""Optimisation profiles, from the inputs that the manifest declares."""

from __future__ import annotations

from qpert.runtime.bundle.graph_spec import AxisRange, GraphSpec, TensorSpec
from qpert.runtime.sessions.tensorrt.engines import Profile, Shape

LEAST = {"O": 1}
"""Where an engine starts later than its graph. An image without boxes goes in with one box of weight zero, which is
stock BLIP-2 exactly; so nothing rests on what a library makes of tensors without elements."""

COMMONEST = {"I": 1, "O": 8, "L": 16}
"""What engines are tuned for, where that is not the most: re-ranking pairs one image with many texts, a detector gives
a handful of boxes, a caption has about a dozen words. Images and texts are encoded in full batches."""


def profile_of(spec: GraphSpec) -> Profile:
    """The profile of one graph: every declared input, every named axis within its declared range.

    A text graph of at most 64 texts gets `{"input_ids": ((1, 2), (64, 16), (64, 35)), …}`.
    """
    lengths = {axis: lengths_of(axis, declared) for axis, declared in spec.ranges.items()}
    return {tensor.name: shapes_of(tensor, lengths) for tensor in spec.inputs}


def shapes_of(tensor: TensorSpec, lengths: dict[str, tuple[int, int, int]]) -> tuple[Shape, Shape, Shape]:
    smallest, commonest, largest = (
        tuple(lengths[axis][end] if isinstance(axis, str) else axis for axis in tensor.shape) for end in range(3)
    )
    return smallest, commonest, largest


def lengths_of(axis: str, declared: AxisRange) -> tuple[int, int, int]:
    """Shortest, commonest and longest length of one named axis."""
    longest = declared.max
    shortest = min(max(declared.min, LEAST.get(axis, 0)), longest)
    commonest = min(COMMONEST.get(axis, longest), longest)
    return shortest, max(shortest, commonest), longest
