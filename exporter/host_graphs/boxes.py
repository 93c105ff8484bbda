"""`boxes.onnx`: boxes in pixels to `object_masks` and `box_weights`, equal to `qpert.runtime.inputs.perturbation`.

A row that is no box of the picture is padding: it covers nothing, weighs 0 and does not count for reduction `mean`.
All-zero rows are meant for that, so that pictures with different numbers of boxes fit into one call. Boxes are clipped
to the picture first, so one that lies wholly outside, an inverted one and one with NaN are padding too: a graph cannot
raise the error that `qpert.runtime.inputs.boxes.Boxes` raises.

With reduction `each` the weights are those of `sum`: giving each box a query set of its own is the caller's task.
"""

from __future__ import annotations

import numpy as np
import onnx

from qpert.exporter.families.declare import GRAPH_NAMES, box_tensors, tensor
from qpert.exporter.host_graphs.expressions import HostGraph, Value
from qpert.exporter.host_graphs.geometry import Side, picture_sides
from qpert.runtime.bundle.graph_spec import AxisRange, GraphSpec
from qpert.runtime.bundle.roles import BOX_CORNERS, BOX_WEIGHTS, BOXES, IMAGE_SIZE, OBJECT_MASKS
from qpert.runtime.inputs.perturbation import Perturbation
from qpert.runtime.inputs.token_grid import TokenGrid

MOST = 65_535
"""Pictures, and boxes of one, in a call. The graphs that take the result have narrower limits of their own."""


def boxes_spec(grid: TokenGrid) -> GraphSpec:
    """`boxes` float32 [B,O,4] (x1, y1, x2, y2) and `image_size` float32 [B,2] (width, height), both in pixels, →
    `object_masks` float32 [B,O,N] and `box_weights` float32 [B,O]."""
    name = GRAPH_NAMES[BOXES]
    inputs = (tensor(BOX_CORNERS, "float32", "B", "O", 4), tensor(IMAGE_SIZE, "float32", "B", 2))
    ranges = {"B": AxisRange(1, MOST), "O": AxisRange(0, MOST)}
    return GraphSpec(name, BOXES, f"onnx/{name}.onnx", inputs, box_tensors("B", grid.tokens), ranges)


def boxes_graph(spec: GraphSpec, grid: TokenGrid, perturbation: Perturbation) -> onnx.ModelProto:
    """The graph, with the perturbation's coverage, reduction, α, β and γ as constants. It computes in float64."""
    graph = HostGraph(spec)
    corners, sizes = graph.input(BOX_CORNERS).cast(np.float64), graph.input(IMAGE_SIZE).cast(np.float64)
    sizes = sizes.unsqueeze(1)  # [B, 1, 2]
    width, height = (sizes.part(place, place + 1, axis=2) for place in (0, 1))  # [B, 1, 1]
    x1, y1, x2, y2 = (
        corners.part(place, place + 1, axis=2).at_least(0).at_most((width, height)[place % 2]) for place in range(4)
    )  # [B, O, 1]
    real = (x1 < x2) & (y1 < y2)
    x1, y1, x2, y2 = (graph.where(real, corner, 0) for corner in (x1, y1, x2, y2))  # NaN of padding goes no further
    width, height = (graph.where(length >= 1, length, 1) for length in (width, height))
    across, down = picture_sides(width, height, grid.image)
    columns = profile(x1, x2, across, grid.columns, grid, perturbation.coverage)  # [B, O, columns]
    rows = profile(y1, y2, down, grid.rows, grid, perturbation.coverage)
    cells = rows.unsqueeze(3) * columns.unsqueeze(2)
    masks = cells.reshape(0, 0, grid.rows * grid.columns).cast(np.float32)
    if grid.prefix:
        masks = graph.node("Pad", masks, graph.integers(0, 0, grid.prefix, 0, 0, 0), masks.beside(0))
    graph.output(OBJECT_MASKS, masks)
    share = (x2 - x1) * (y2 - y1) / (width * height)
    weights = box_weights(share, real, perturbation)
    graph.output(BOX_WEIGHTS, weights.squeeze(2).cast(np.float32))
    return graph.model()


def box_weights(share: Value, real: Value, perturbation: Perturbation) -> Value:
    """float64 [B, O, 1]: α(β + γS), divided by the number of boxes for `mean`; 0 for padding."""
    weights = (share * perturbation.gamma + perturbation.beta) * perturbation.alpha
    if perturbation.reduction == "mean":
        weights = weights / real.cast(np.float64).reduce("ReduceSum", 1).at_least(1)
    return share.graph.where(real, weights, 0)


def profile(low: Value, high: Value, side: Side, cells: int, grid: TokenGrid, coverage: str) -> Value:
    """float64 [B, O, cells]: the share of each patch along one side that [low, high) covers."""
    if coverage == "dilated":
        return dilated_profile(low, high, side, cells, grid)
    graph, seen = low.graph, cells * grid.patch
    pixel = side.length / side.resized
    start = side.offset * pixel
    window = graph.where(side.resized.equals(seen), side.length, pixel * seen)
    begin, end = ((edge - start) * cells / window for edge in (low, high))  # [B, O, 1], in cells
    places = np.arange(cells, dtype=np.float64)
    overlap = (end.at_most(places + 1) - begin.at_least(places)).at_least(0).at_most(1)
    return overlap if coverage == "exact" else (overlap > 0).cast(np.float64)


def dilated_profile(low: Value, high: Value, side: Side, cells: int, grid: TokenGrid) -> Value:
    """The release's mask along one side, in whole numbers as in the runtime: a position may fall on a centre.

    The whole numbers are float64, which is exact below 2^53. ONNX Runtime 1.31's Max and Min of int64 compare the lower
    32 bits alone on some processors, and numerators of long pictures pass 2^31.
    """
    length, resized, offset = side.length, side.resized, side.offset
    start, end = low.floor(), high.floor()  # [B, O, 1]
    pixels = offset + np.arange(cells * grid.patch, dtype=np.float64)
    numerator = ((pixels * 2 + 1) * length - resized).at_least(0)
    divisor = resized * 2
    quotient = (numerator / divisor).floor()
    rest = numerator - quotient * divisor
    last = length - 1
    left, right = quotient.at_most(last), (quotient.at_most(last) + 1).at_most(last)  # original pixels
    touches_left = (start <= left) & (left < end)
    touches_right = (start <= right) & (right < end) & (rest > 0)
    touched = (touches_left | touches_right).cast(np.float64)  # [B, O, pixels]
    return touched.reshape(0, 0, cells, grid.patch).reduce("ReduceSum", 3, keepdims=False) / grid.patch
