"""PIL's resize of one axis, bit for bit, as nodes.

Source: Pillow `src/libImaging/Resample.c`: `precompute_coeffs`, `normalize_coeffs_8bpc` and
`ImagingResampleHorizontal_8bpc`. The weights are computed in float64 from the picture's size and rounded to whole
multiples of 2^-22; each pass rounds to 8 bits.

The outputs are made in blocks. A block reads only the band of pixels that its outputs need, so the cost grows with the
picture, not with the picture times the size. A weight is cut into three digits of 8 bits; the three products with the
pixels are exact in integers, and so is their sum in float64.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from qpert.exporter.host_graphs.expressions import Value
from qpert.exporter.host_graphs.geometry import Side

LARGEST_BLOCK = 16
"""Outputs of one block at most: larger bands repeat less, smaller ones hold fewer zeros."""
FRACTION_BITS = 22
"""`PRECISION_BITS` of Resample.c."""
HIGH_ZERO = 64
"""Zero point of the highest digit. Weights are between -1 and 2, their highest digits between -64 and 127."""


def bicubic(x: Value) -> Value:
    """`bicubic_filter`: Keys' cubic with a = -0.5; `x` is not negative. The order of operations is Pillow's."""
    a = -0.5
    near = (x * (a + 2) - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return x.graph.where(x < 1, near, x.graph.where(x < 2, far, 0))


def bilinear(x: Value) -> Value:
    """`bilinear_filter`."""
    return x.graph.where(x < 1, x.beside(1) - x, 0)


def lanczos(x: Value) -> Value:
    """`lanczos_filter`: sinc(x) sinc(x/3). Its sine is ONNX Runtime's, which may be one unit of float64 off libm's."""
    return x.graph.where(x < 3, _sinc(x) * _sinc(x / 3), 0)


def _sinc(x: Value) -> Value:
    angle = x * np.pi
    is_zero = x.equals(0)
    quotient = x.graph.node("Sin", angle) / x.graph.where(is_zero, x.beside(1), angle)
    return x.graph.where(is_zero, x.beside(1), quotient)


FILTERS: dict[str, tuple[float, Callable[[Value], Value]]] = {
    "bicubic": (2.0, bicubic),
    "bilinear": (1.0, bilinear),
    "lanczos": (3.0, lanczos),
}
"""`resample` → support in output pixels, and the filter of distances."""


def block_length(size: int) -> int:
    """The largest divisor of `size` up to `LARGEST_BLOCK`."""
    return max(length for length in range(1, min(size, LARGEST_BLOCK) + 1) if size % length == 0)


def resize_axis(pixels: Value, side: Side, size: int, resample: str) -> Value:
    """uint8 [n, R] → uint8 [blocks, block, R]: n pixels along the first axis, resized; `size` of them from the crop.

    `side`: float64 scalars; its length is n.
    """
    index, weights = band_weights(side, size, resample)
    band = pixels.graph.node("Gather", pixels, index, axis=0)  # [blocks, band, R]
    rest = (weights * 2.0**-8).floor()
    low = weights - rest * 2.0**8
    high = (rest * 2.0**-8).floor()
    middle = rest - high * 2.0**8
    total = _product(high, band, HIGH_ZERO) * 2.0**16 + _product(middle, band, 0) * 2.0**8 + _product(low, band, 0)
    rounded = ((total + 2.0 ** (FRACTION_BITS - 1)) * 2.0**-FRACTION_BITS).floor()
    return rounded.at_least(0).at_most(255).cast(np.uint8)


def _product(digit: Value, band: Value, zero: int) -> Value:
    """Exact product of whole numbers [blocks, block, band] from -`zero` to 255 - `zero` with bytes, float64."""
    unsigned = (digit + zero if zero else digit).cast(np.uint8)
    inputs = (unsigned, band, unsigned.beside(zero)) if zero else (unsigned, band)
    return band.graph.node("MatMulInteger", *inputs, dtype=np.int32).cast(np.float64)


def band_weights(side: Side, size: int, resample: str) -> tuple[Value, Value]:
    """Pixels of each block int64 [blocks, band], and float64 [blocks, block, band]: their weights times 2^22.

    Weights are whole numbers. Names follow Resample.c.
    """
    graph, length = side.length.graph, side.length
    block = block_length(size)
    reach, filter_ = FILTERS[resample]
    scale = length / side.resized
    filter_scale = scale.at_least(1)
    support = filter_scale * reach
    places = np.arange(size, dtype=np.float64).reshape(size // block, block, 1)
    center = (side.offset + places + 0.5) * scale  # [blocks, block, 1]
    first = (center - support + 0.5).at_least(0).floor()
    end = (center + support + 0.5).floor().at_most(length)
    lowest, highest = first.reduce("ReduceMin", 1), end.reduce("ReduceMax", 1)  # [blocks, 1, 1]
    band = (highest - lowest).reshape(-1).reduce("ReduceMax", 0, keepdims=False)
    start = lowest.at_most(length - band)  # so that no band leaves the picture
    steps = graph.node("Range", graph.constant(0, np.float64), band, graph.constant(1, np.float64))
    position = start + steps  # [blocks, 1, band]
    inverse = filter_scale.beside(1) / filter_scale
    values = filter_(((position - center + 0.5) * inverse).absolute())  # [blocks, block, band]
    values = graph.where((first <= position) & (position < end), values, 0)
    weights = values / _sum_in_order(values) * 2.0**FRACTION_BITS
    magnitude = (weights.absolute() + 0.5).floor()  # half away from zero
    whole = graph.where(weights < 0, magnitude * -1, magnitude)
    return position.squeeze(1).cast(np.int64), whole


def _sum_in_order(values: Value) -> Value:
    """Sum over the last axis from first to last, as Resample.c adds: another order may round differently."""
    sums = values.graph.node("CumSum", values, values.graph.constant(2, np.int64))
    return sums.part(-1, np.iinfo(np.int64).max, axis=2)
