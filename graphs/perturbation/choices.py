"""The choices of the query perturbation that are fixed inside a graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

QueryMap = Callable[..., Tensor]
"""(keys [B,A,H,N,d], object_masks [B,O,N], box_weights [B,O], *, threshold) → [B,A,H,d,d]: the `eigh` oracle or the
tracing placeholder."""


@dataclass(frozen=True)
class GraphPerturbation:
    """Settings that are fixed inside a graph; the host decides the others."""

    threshold: float = 0.95
    preserve_norm: bool = False
    centre_keys: bool = False

    def subspace_keys(self, keys: Tensor) -> Tensor:
        """The keys whose subspaces the boxes span: `keys`, or with `centre_keys` K̃ = K − mean of K over the N tokens.

        The mean is that of one image, layer and head, over all its tokens, prefix (CLS) included. Stock attention
        ignores a vector that is added to every key: q·b is the same for all tokens and cancels in the softmax. The
        uncentred subspace of a box does not, and a large common vector dominates it. Ours; the paper does not centre.

        Args:
            keys: [..., N, d], any float dtype.

        Returns:
            [..., N, d] float32.
        """
        keys = keys.float()
        return keys - keys.mean(dim=-2, keepdim=True) if self.centre_keys else keys
