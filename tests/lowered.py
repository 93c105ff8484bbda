"""The lowered query map alone, as a model: for its tests and for the benchmark of its accuracy."""

from __future__ import annotations

import functools

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from qpert.graphs.perturbation.lowering import lower_query_map
from qpert.graphs.perturbation.placeholder import DOMAIN, OPERATOR


def toy_graph(head_dimension: int, threshold: float, heads: tuple[int | str, int | str] = ("A", "H")) -> gs.Graph:
    """The single node between inputs that are symbolic, but for d and, where given, layers and heads."""
    d = head_dimension
    inputs = [
        gs.Variable("keys", np.float32, ["B", *heads, "N", d]),
        gs.Variable("object_masks", np.float32, ["B", "O", "N"]),
        gs.Variable("box_weights", np.float32, ["B", "O"]),
    ]
    output = gs.Variable("query_map", np.float32, ["B", *heads, d, d])
    node = gs.Node(OPERATOR, "placeholder", {"threshold": threshold}, inputs, [output], domain=DOMAIN)
    return gs.Graph([node], inputs, [output], opset=20)


@functools.cache
def lowered_model(
    head_dimension: int, threshold: float, heads: tuple[int | str, int | str] = ("A", "H")
) -> onnx.ModelProto:
    model = gs.export_onnx(lower_query_map(toy_graph(head_dimension, threshold, heads)))
    model.ir_version = 10  # what opset 20 needs; the newest is beyond some runtimes
    return model
