"""Protocols of the references that a bundle's graphs are compared with."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from qpert.runtime.verification.reference import Reference

__all__ = ["ClosableReference", "MarginReference", "Reference"]


class ClosableReference(Reference, Protocol):
    """A third-party network. `close` frees it."""

    def close(self) -> None: ...


class MarginReference(Reference, Protocol):
    """A reference that also measures how clear each box's cut is, to find those that float32 can decide."""

    def cut_margins(self, image_tokens: np.ndarray, object_masks: np.ndarray) -> np.ndarray:
        """How clear each box's cut is, float64 [B, O], from [B, N, C] and [B, O, N]; infinite where there is no cut."""
        ...
