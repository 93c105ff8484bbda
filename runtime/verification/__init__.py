"""Does a bundle compute what its reference computes? By tensors, by ranks, by recall; gates that fail."""

from __future__ import annotations

from qpert.runtime.verification.result import Comparison, Gate, Verification
from qpert.runtime.verification.tensors import (
    batch_axes,
    compare,
    cosine_distance,
    run_selected,
    select,
    selections,
    verify_tensors,
)
from qpert.runtime.verification.tolerances import TOLERANCES, Tolerance

__all__ = [
    "TOLERANCES",
    "Comparison",
    "Gate",
    "Tolerance",
    "Verification",
    "batch_axes",
    "compare",
    "cosine_distance",
    "run_selected",
    "select",
    "selections",
    "verify_tensors",
]
