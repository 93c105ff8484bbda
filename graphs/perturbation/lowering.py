"""`qpert::QueryMap` in standard ONNX operators (opset 20, default domain), float32 in every precision of the graph.

For every image, box and head, some layers at a time: C_b = K_bᵀ K_b, its projector P_b (`purification`),
M = I + Σ_b w_b P_b.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx_graphsurgeon as gs

from qpert.graphs.perturbation.names import PREFIX, THRESHOLD
from qpert.graphs.perturbation.operators import Operators
from qpert.graphs.perturbation.placeholder import DOMAIN, OPERATOR
from qpert.graphs.perturbation.purification import Projectors, leading_projectors

HEADS_AT_ONCE = 24
"""Layers × heads whose matrices are computed together. An iteration reads whole tensors many times: with 24 heads and 8
boxes each takes 3 MB, and the few live ones stay in a CPU's cache; on an EPYC, all 72 of BLIP-2 at once took 50 %
longer. Smaller groups need more operators, which take time even without boxes: `image_query` on a Xeon, for 0, 1 and 8
boxes, takes 120, 145 and 292 ms with 24 and 126, 151 and 263 ms with 12, which TensorRT-RTX compiles in 116 s instead
of 30."""


def lower_query_map(graph: gs.Graph) -> gs.Graph:
    """Replace each `qpert::QueryMap` node by standard operators.

    Inputs of the node are float32: keys [B, A, H, N, d], object_masks [B, O, N], box_weights [B, O]; its output is
    [B, A, H, d, d]. All but d may be symbolic, and O may be 0: M is then exactly I, as with zero weights. M is also I
    if the head's keys, or one of the image's masks, hold NaN or infinity.

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
    threshold = ops.constant(THRESHOLD, node.attrs["threshold"])
    weights = ops("Unsqueeze", box_weights, ops.constant("weight_axes", [1, 2, 4, 5], np.int64))  # [B, 1, 1, O, 1, 1]
    masks = _squared_masks(ops, object_masks)
    maps = []
    for number, part in enumerate(_parts(ops, keys)):
        with ops.scope(f"part_{number}"):
            maps.append(_map(ops, leading_projectors(ops, _grams(ops, part, masks), threshold), weights))
    result = maps[0] if len(maps) == 1 else ops("Concat", *maps, axis=1)
    (output,) = node.outputs
    node.outputs.clear()
    result.inputs[0].outputs = [output]


def _parts(ops: Operators, keys: gs.Tensor) -> list[gs.Tensor]:
    """[B, A, H, N, d] split along the layers, if their number is known, into parts of at most `HEADS_AT_ONCE`."""
    layers, heads = (keys.shape or [None] * 5)[1:3]
    if not isinstance(layers, int) or not isinstance(heads, int):
        return [keys]
    count = min(layers, -(-layers * heads // HEADS_AT_ONCE))
    if count == 1:
        return [keys]
    groups = np.array_split(np.arange(layers), count)
    stack = keys.inputs[0] if keys.inputs else None
    if stack is not None and (stack.op, stack.attrs.get("axis"), len(stack.inputs)) == ("Concat", 1, layers):
        # Use the stack's inputs instead of splitting it again.
        return [_stacked(ops, [stack.inputs[i] for i in group], keys.shape) for group in groups]
    return ops.split(keys, ops.constant("part_sizes", [len(group) for group in groups], np.int64), axis=1)


def _stacked(ops: Operators, layers: list[gs.Tensor], shape: list[int | str]) -> gs.Tensor:
    """Tensors [B, 1, H, N, d] as one [B, A, H, N, d]; `shape` is right except for A."""
    if len(layers) == 1:
        return layers[0]
    stacked = ops("Concat", *layers, axis=1)
    stacked.shape = [shape[0], len(layers), *shape[2:]]
    return stacked


def _map(ops: Operators, projectors: Projectors, weights: gs.Tensor) -> gs.Tensor:
    """I + Σ_b w_b P_b: [B, A, H, O, d, d] and [B, 1, 1, O, 1, 1] to [B, A, H, d, d]."""
    resolved = ops("Mul", projectors.resolved, ops("Mul", projectors.resolved_weight, weights))
    soft = ops("Mul", projectors.soft, ops("Mul", projectors.soft_weight, weights))
    weighted = ops("Add", resolved, soft)
    total = ops("ReduceSum", weighted, ops.constant("object_axis", [3], np.int64), keepdims=0)
    # NaN and infinity must not reach a query, not even multiplied by zero.
    finite = ops.less(ops("Abs", total), ops.constant("greatest", np.finfo(np.float32).max))
    total = ops("Where", finite, total, 0.0)
    # Exactly symmetric, in any order of addition.
    total = ops("Mul", ops("Add", total, ops("Transpose", total, perm=[0, 1, 2, 4, 3])), 0.5)
    return ops("Add", total, ops.constant("identity", np.eye(ops.size)))


def _head_dimension(node: gs.Node) -> int:
    for tensor in (node.outputs[0], node.inputs[0]):
        if tensor.shape is not None and isinstance(tensor.shape[-1], int):
            return tensor.shape[-1]
    raise ValueError(
        f"node {node.name!r}: the head dimension of {node.inputs[0].name!r} is not a number "
        f"(shape {node.inputs[0].shape}); export with a fixed last dimension"
    )


class _Masks(NamedTuple):
    squared: gs.Tensor  # [B, 1, 1, O, 1, N]
    stacked: gs.Tensor  # int64 [5], the shape [B, A, H, O d, N]
    apart: gs.Tensor  # int64 [6], the shape [B, A, H, O, d, d]
    objects: int | str | None  # O


def _squared_masks(ops: Operators, object_masks: gs.Tensor) -> _Masks:
    """In the shapes, 0 copies the length of an axis, including O = 0."""
    squared = ops("Unsqueeze", ops("Mul", object_masks, object_masks), ops.constant("mask_axes", [1, 2, 4], np.int64))
    lengths = ops("Shape", object_masks, start=1, dtype=np.int64)  # O, N
    lead, square = (
        ops.constant(name, values, np.int64) for name, values in (("lead", [0] * 3), ("one", [ops.size, 1]))
    )
    stacked = ops("Concat", lead, ops("Mul", lengths, square, dtype=np.int64), axis=0, dtype=np.int64)
    boxes = ops("Shape", object_masks, start=1, end=2, dtype=np.int64)
    apart = ops("Concat", lead, boxes, ops.constant("sides", [ops.size] * 2, np.int64), axis=0, dtype=np.int64)
    return _Masks(squared, stacked, apart, object_masks.shape[1] if object_masks.shape else None)


def _grams(ops: Operators, keys: gs.Tensor, masks: _Masks) -> gs.Tensor:
    """C_b = Kᵀ diag(m_b)² K: [B, A, H, N, d] to [B, A, H, O, d, d].

    The boxes of a head are stacked, so that its keys are a factor of a single product. ONNX Runtime also
    rejects a product of 0 matrices with 1.
    """
    turned = ops("Transpose", keys, perm=[0, 1, 2, 4, 3])
    turned = ops("Unsqueeze", turned, ops.constant("object_axis", [3], np.int64))  # [B, A, H, 1, d, N]
    masked = ops("Reshape", ops("Mul", masks.squared, turned), masks.stacked)  # [B, A, H, O d, N]
    grams = ops("Reshape", ops("MatMul", masked, keys), masks.apart)
    if keys.shape and masks.objects is not None:
        # ONNX Runtime cannot infer a computed shape. It would then not know which tensors have the same size, reuse no
        # memory from here on, and take a second and a half to open while looking for them.
        grams.shape = [*keys.shape[:3], masks.objects, ops.size, ops.size]
    return grams
