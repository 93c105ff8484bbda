"""The custom operator that represents the eigendecomposition in a traced graph.

One node covers all cross-attention layers, heads and boxes: `qpert::QueryMap(keys, object_masks, box_weights)` with
the attribute `threshold`. No runtime supports it; the lowering replaces it with standard operators.
"""

from __future__ import annotations

import torch
from torch import Tensor

DOMAIN = "qpert"
OPERATOR = "QueryMap"
VERSION = 1


def query_map_placeholder(keys: Tensor, object_masks: Tensor, box_weights: Tensor, *, threshold: float) -> Tensor:
    """Replace `qpert.graphs.perturbation.oracle.query_map` while tracing.

    Args:
        keys: float32 [B, A, H, N, d].
        object_masks: float32 [B, O, N].
        box_weights: float32 [B, O].
        threshold: τ, kept as an attribute of the node.

    Returns:
        float32 [B, A, H, d, d]; only its shape and dtype are meaningful.
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
