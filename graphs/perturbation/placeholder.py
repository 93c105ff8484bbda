"""The custom operator that tracing leaves in the graph where the eigendecomposition would be.

One node stands for all cross-attention layers, heads and boxes: `qpert::QueryMap(keys, object_masks, box_weights)` with
the attribute `threshold`. No runtime knows it: a lowering puts standard operators in its place.
"""

from __future__ import annotations

import torch
from torch import Tensor

DOMAIN = "qpert"
OPERATOR = "QueryMap"
VERSION = 1


def query_map_placeholder(keys: Tensor, object_masks: Tensor, box_weights: Tensor, *, threshold: float) -> Tensor:
    """Stand for `qpert.graphs.perturbation.oracle.query_map` while tracing.

    Args:
        keys: float32 [B, A, H, N, d].
        object_masks: float32 [B, O, N].
        box_weights: float32 [B, O].
        threshold: τ, kept as an attribute of the node.

    Returns:
        float32 [B, A, H, d, d]; only its shape and dtype mean anything.
    """
    batch, layers, heads, _, size = keys.shape
    mapped: Tensor = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{OPERATOR}",
        (keys, object_masks, box_weights),
        attrs={"threshold": float(threshold)},
        dtype=torch.float32,
        shape=(batch, layers, heads, size, size),
        version=VERSION,
    )
    return mapped
