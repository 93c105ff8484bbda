"""OrQ-Pert: queries projected on the orthogonal complement of the boxes' key subspaces, in the graph as it is.

q̂ = (I − ΦΦᵀ) q (Sogi, Shibata, Terao, ECCV 2024, supplement B.1). The graph computes q' = q (I + Σ_b w_b P_b), so with
one box it is the weight −1. For several boxes see `Choices.several_boxes`. The joint subspace of all boxes has the Gram
matrix Σ_b C_b = Kᵀ diag(Σ_b m_b²) K: that of one box whose mask is √(Σ_b m_b²), which the graph takes like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from qpert.runtime.bundle.roles import BOX_WEIGHTS, OBJECT_MASKS
from qpert.runtime.evaluation.methods.choices import SeveralBoxes
from qpert.runtime.inputs.boxes import Boxes
from qpert.runtime.inputs.perturbation import Perturbation
from qpert.runtime.retrieval.encoder import Encoder


class ComplementEncoder(Encoder):
    """An opened encoder that removes the boxes' key subspaces instead of strengthening them. It shares its sessions
    with the encoder that it was made from: close that one."""

    several: SeveralBoxes

    def __init__(self, encoder: Encoder, several: SeveralBoxes) -> None:
        """Raises InputError for `each` where the bundle perturbs ITM too."""
        vars(self).update(vars(encoder))
        self.several = several
        self.perturbation = complement_settings(encoder.perturbation, several)

    def box_slots(self, boxes: Sequence[Boxes | None]) -> dict[str, npt.NDArray[np.float32]]:
        """`object_masks` [B, O, N] (O = 1 for the joint subspace) and `box_weights` [B, O] by slot."""
        slots = super().box_slots(boxes)
        return joint_slots(slots[OBJECT_MASKS]) if self.several == "span" else slots


def complement_settings(exported: Perturbation, several: SeveralBoxes) -> Perturbation:
    """The bundle's settings with the weight −1 for a box alone, in place of α(β + γS)."""
    reduction = "sum" if several == "span" else several
    return replace(exported, alpha=-1.0, beta=1.0, gamma=0.0, reduction=reduction, keep_stock=False)


def joint_slots(masks: npt.NDArray[np.float32]) -> dict[str, npt.NDArray[np.float32]]:
    """Masks of boxes [B, O, N] → one mask [B, 1, N] of their joint subspace, with the weight −1.

    A mask may exceed 1 where boxes overlap; subspaces do not depend on its scale. Without boxes it is 0, and so is its
    subspace.
    """
    joint = np.sqrt(np.square(masks).sum(axis=1, keepdims=True))
    return {OBJECT_MASKS: joint.astype(np.float32), BOX_WEIGHTS: np.full(joint.shape[:2], -1, np.float32)}
