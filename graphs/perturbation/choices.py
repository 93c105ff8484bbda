"""The choices of the query perturbation that are fixed inside a graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

QueryMap = Callable[..., Tensor]
"""(keys [B,A,H,N,d], object_masks [B,O,N], box_weights [B,O], *, threshold) → [B,A,H,d,d]: the `eigh` oracle or the
placeholder that tracing leaves."""


@dataclass(frozen=True)
class GraphPerturbation:
    """What a graph cannot be told from outside; the rest is decided by the host."""

    threshold: float = 0.95
    preserve_norm: bool = False
