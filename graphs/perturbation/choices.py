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
