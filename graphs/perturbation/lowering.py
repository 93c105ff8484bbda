"""`qpert::QueryMap` in standard ONNX operators (opset 20, default domain), float32 whatever the surrounding precision.

For every image, box, layer and head at once: C_b = K_bᵀ K_b, its projector P_b (`purification`), M = I + Σ_b w_b P_b.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from qpert.graphs.perturbation.operators import Operators
from qpert.graphs.perturbation.placeholder import DOMAIN, OPERATOR
from qpert.graphs.perturbation.purification import leading_projectors

PREFIX = "query_map"
"""Names of what this pass adds start with it; the initializer `query_map/threshold` is τ and may be overwritten."""


def lower_query_map(graph: gs.Graph) -> gs.Graph:
    """Replace each `qpert::QueryMap` node by standard operators.

    Inputs of the node are float32: keys [B, A, H, N, d], object_masks [B, O, N], box_weights [B, O]; its output is
    [B, A, H, d, d]. All but d may be symbolic, and O may be 0: M is then exactly I, as it is with zero weights.

    Raises:
        ValueError: the head dimension d of a node's keys is not a number.
    """
    nodes = [node for node in graph.nodes if node.op == OPERATOR and node.domain == DOMAIN]
    for index, node in enumerate(nodes):
        prefix = PREFIX if index == 0 else f"{PREFIX}_{index}"
        _lower(Operators(graph, prefix, _head_dimension(node)), node)
    return graph.cleanup().toposort()


def _lower(ops: Operators, node: gs.Node) -> None:
    keys, object_masks, box_weights = node.inputs
    threshold = ops.constant("threshold", node.attrs["threshold"])
    projectors = leading_projectors(ops, _grams(ops, keys, object_masks), threshold)
    weights = ops("Unsqueeze", box_weights, ops.constant("box_axes", [1, 2, 4, 5], np.int64))
    weighted = ops("Mul", projectors, weights)  # [B, A, H, O, d, d]
    total = ops("ReduceSum", weighted, ops.constant("object_axis", [3], np.int64), keepdims=0)
    # Exactly symmetric, whatever order a backend adds in.
    total = ops("Mul", ops("Add", total, ops("Transpose", total, perm=[0, 1, 2, 4, 3])), 0.5)
    result = ops("Add", total, ops.constant("identity", np.eye(ops.size)))
    (output,) = node.outputs
    node.outputs.clear()
    result.inputs[0].outputs = [output]


def _head_dimension(node: gs.Node) -> int:
    for tensor in (node.outputs[0], node.inputs[0]):
        if tensor.shape is not None and isinstance(tensor.shape[-1], int):
            return tensor.shape[-1]
    raise ValueError(
        f"node {node.name!r}: the head dimension of {node.inputs[0].name!r} is not a number "
        f"(shape {node.inputs[0].shape}); export with a fixed last dimension"
    )


def _grams(ops: Operators, keys: gs.Tensor, object_masks: gs.Tensor) -> gs.Tensor:
    """C_b = (diag(m_b) K)ᵀ diag(m_b) K: [B, A, H, N, d] and [B, O, N] to [B, A, H, O, d, d].

    Both factors have the axis O: to ONNX Runtime a product of none and one is an error, not none.
    """
    boxed_keys = ops("Unsqueeze", keys, ops.constant("object_axis", [3], np.int64))  # [B, A, H, 1, N, d]
    masks = ops("Unsqueeze", object_masks, ops.constant("mask_axes", [1, 2, 5], np.int64))  # [B, 1, 1, O, N, 1]
    masked = ops("Mul", masks, boxed_keys)
    return ops("MatMul", ops("Transpose", masked, perm=[0, 1, 2, 3, 5, 4]), masked)
