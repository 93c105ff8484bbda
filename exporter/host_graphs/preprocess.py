"""`preprocess.onnx`: a picture to `pixel_values`, equal to `qpert.runtime.inputs.images.preprocess_images`.

The picture is upright RGB: what decodes the file also applies its EXIF orientation, and applies no colour profile.
"""

from __future__ import annotations

import numpy as np
import onnx

from qpert.exporter.families.declare import GRAPH_NAMES, tensor
from qpert.exporter.host_graphs.expressions import HostGraph, Value
from qpert.exporter.host_graphs.geometry import picture_sides
from qpert.exporter.host_graphs.resize import resize_axis
from qpert.runtime.bundle.graph_spec import AxisRange, GraphSpec
from qpert.runtime.bundle.roles import PICTURE, PIXELS, PREPROCESS
from qpert.runtime.inputs.images import normalised_bytes
from qpert.runtime.inputs.preprocessing import ImagePreprocessing

LONGEST_SIDE = 65_535
"""Pixels: the longest side of a JPEG file."""


def preprocess_spec(image: ImagePreprocessing) -> GraphSpec:
    """`image` uint8 [H,W,3] → `pixel_values` float32 [1,3,S,S]."""
    name = GRAPH_NAMES[PREPROCESS]
    sides = AxisRange(1, LONGEST_SIDE)
    return GraphSpec(
        name,
        PREPROCESS,
        f"onnx/{name}.onnx",
        (tensor(PICTURE, "uint8", "H", "W", 3),),
        (tensor(PIXELS, "float32", 1, 3, image.size, image.size),),
        {"H": sides, "W": sides},
    )


def preprocess_graph(spec: GraphSpec, image: ImagePreprocessing) -> onnx.ModelProto:
    """The graph: columns, then rows, as `qpert.runtime.inputs.images.resize`, with 8 bits between the passes."""
    graph = HostGraph(spec)
    picture, size = graph.input(PICTURE), image.size
    shape = graph.node("Shape", picture, dtype=np.int64)
    height, width = shape.part(0, 1, axis=0), shape.part(1, 2, axis=0)  # [1] each
    across, down = picture_sides(width.cast(np.float64), height.cast(np.float64), image)
    columns = picture.transpose(1, 0, 2).reshape_to(graph.concat(width, graph.integers(-1)))  # [W, 3H]
    narrow = resize_axis(columns, across, size, image.resample)
    narrow = narrow.reshape_to(graph.concat(graph.integers(size), height, graph.integers(3)))  # [S, H, 3]
    rows = narrow.transpose(1, 0, 2).reshape_to(graph.concat(height, graph.integers(3 * size)))  # [H, 3S]
    levels = resize_axis(rows, down, size, image.resample).reshape(size, size, 3)
    graph.output(PIXELS, normalised(levels, image))
    return graph.model()


def normalised(levels: Value, image: ImagePreprocessing) -> Value:
    """uint8 [S, S, 3] → float32 [1, 3, S, S], by looking each byte up in its channel's part of a table of 3×256.

    The runtime uses the same table, so no backend's division can differ from it.
    """
    graph = levels.graph
    table = graph.constant(normalised_bytes(image).reshape(-1), np.float32)
    channels = np.array([0, 256, 512]).reshape(3, 1, 1)
    index = levels.transpose(2, 0, 1).cast(np.int32) + channels
    return graph.node("Gather", table, index, axis=0).unsqueeze(0)
