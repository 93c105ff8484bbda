"""Building blocks shared by the vision tower and the Q-Former, written to trace to few, plain operators.

Matrix products run in the dtype of their weights; LayerNorm and softmax always run in float32, because half-precision
variance and exponent sums overflow on real activations (TensorRT issues 2564 and 4493).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

AttentionKernel = Callable[..., Tensor]
"""(queries, keys, values, additive_mask=None) → context; shapes as in `attention`."""


class LayerNorm(nn.LayerNorm):
    """LayerNorm in float32 over the last axis; the result has the dtype of `x`."""

    def forward(self, x: Tensor) -> Tensor:
        normalised = nn.functional.layer_norm(
            x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps
        )
        return normalised.to(x.dtype)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, N, H*d] → [B, H, N, d]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[B, H, N, d] → [B, N, H*d]."""
    return x.transpose(1, 2).flatten(-2)


def attention(queries: Tensor, keys: Tensor, values: Tensor, additive_mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention, written out.

    Args:
        queries: [B, H, Q, d], not yet scaled by 1/√d.
        keys, values: [B, H, N, d].
        additive_mask: float32, broadcastable to [B, H, Q, N]; 0 where attended, a large negative number elsewhere.

    Returns:
        [B, H, Q, d] in the dtype of `values`.
    """
    scores = (queries * queries.shape[-1] ** -0.5) @ keys.transpose(-1, -2)  # [B, H, Q, N]
    scores = scores.float()
    if additive_mask is not None:
        scores = scores + additive_mask
    return torch.softmax(scores, dim=-1).to(values.dtype) @ values


class AttentionModule(nn.Module):
    """A module with attention, computed by `kernel`: `attention` unless `use_kernel` replaces it."""

    kernel: AttentionKernel

    def __init__(self) -> None:
        super().__init__()
        self.kernel = attention


def use_kernel(network: nn.Module, kernel: AttentionKernel) -> None:
    """Make every attention of a network use `kernel`, to compare kernels."""
    for module in network.modules():
        if isinstance(module, AttentionModule):
            module.kernel = kernel
