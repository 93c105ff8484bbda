"""The query perturbation directly from its definition, by eigendecomposition. Every lowering must match it.

Source: object-aware query perturbation, ECCV 2024, sections 4.2 to 4.4 and supplement A.2. For the keys K [N, d] of one
head and the token mask m of one box, K_b = diag(m) K and C = K_bᵀ K_b = Φ Λ Φᵀ with descending eigenvalues; the
contribution ratio is c_p = (λ_1 + … + λ_p) / (λ_1 + … + λ_d), the rank p = max(1, #{p : c_p < τ}), P = Φ_1..p Φ_1..pᵀ.

Symbols in shapes: B images, O boxes an image, A cross-attention layers, H heads, N image tokens, d head dimension,
Q queries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class KeySubspaces:
    """Key subspaces of every box, layer and head, with measures of how clear each cut is."""

    projectors: Tensor
    """[B, O, A, H, d, d] float64: P, zero if nothing is covered."""
    ranks: Tensor
    """[B, O, A, H] int64: p, zero if nothing is covered."""
    margins: Tensor
    """[B, O, A, H] float64: min(|c_p − τ|, |c_{p+1} − τ|), the two ratios that decide the cut; +inf if nothing is
    covered. c_1 counts too, although p is one on either side of it: a method steered by energy is undecided there."""
    gaps: Tensor
    """[B, O, A, H] float64: (λ_p − λ_{p+1}) / λ_1, with λ_{d+1} = 0; +inf if nothing is covered."""


def key_subspaces(keys: Tensor, object_masks: Tensor, *, threshold: float) -> KeySubspaces:
    """Projector onto the leading eigenvectors of each masked key Gram matrix (paper, section 4.3).

    Args:
        keys: [B, A, H, N, d], any float dtype; computed in float64.
        object_masks: [B, O, N] in [0, 1], the share of each token's cell that the box covers (0 for CLS).
        threshold: τ in (0, 1], the upper bound of the kept eigenvalues' contribution ratio.

    Raises:
        ValueError: τ outside (0, 1], or shapes that do not match.
    """
    _check(keys, object_masks, threshold)
    eigenvalues, eigenvectors = torch.linalg.eigh(_masked_gram(keys, object_masks))
    # Rank-deficient matrices have eigenvalues of about ±1e-16 λ_1 in float64: those count as zeros.
    eigenvalues = eigenvalues.flip(-1).clamp(min=0)  # [B, O, A, H, d]
    eigenvectors = eigenvectors.flip(-1)
    total = eigenvalues.sum(-1, keepdim=True)
    covered = total[..., 0] > 0
    ratios = eigenvalues.cumsum(-1) / torch.where(total > 0, total, 1.0)
    ranks = (ratios < threshold).sum(-1).clamp(min=1) * covered
    kept = torch.arange(keys.shape[-1], device=keys.device) < ranks[..., None]
    leading = eigenvectors * kept[..., None, :]
    return KeySubspaces(
        projectors=leading @ leading.mT,
        ranks=ranks,
        margins=torch.where(covered, _margins(ratios, ranks, threshold), torch.inf),
        gaps=torch.where(covered, _gaps(eigenvalues, ranks), torch.inf),
    )


def query_map(keys: Tensor, object_masks: Tensor, box_weights: Tensor, *, threshold: float) -> Tensor:
    """M = I + Σ_b w_b P_b, the matrix by which a head's queries are multiplied (paper, section 4.4).

    Args:
        keys: [B, A, H, N, d], any float dtype.
        object_masks: [B, O, N]; O may be 0.
        box_weights: [B, O], the final weight of each box; 0 for padding.
        threshold: τ in (0, 1].

    Returns:
        [B, A, H, d, d] in the dtype of `keys`; exactly I without boxes or with zero weights.

    Raises:
        ValueError: τ outside (0, 1], or shapes that do not match.
    """
    if box_weights.shape != object_masks.shape[:2]:
        raise ValueError(
            f"box_weights has shape {tuple(box_weights.shape)}, expected {tuple(object_masks.shape[:2])} "
            "([B, O] of object_masks); pass one weight per box"
        )
    projectors = key_subspaces(keys, object_masks, threshold=threshold).projectors
    weighted = torch.einsum("bo,boahij->bahij", box_weights.double(), projectors)
    identity = torch.eye(keys.shape[-1], dtype=torch.float64, device=keys.device)
    return (identity + weighted).to(keys.dtype)


def perturb_queries(queries: Tensor, query_map: Tensor, *, preserve_norm: bool) -> Tensor:
    """q' = q M, optionally with each query's norm restored: q'_i ← ‖q_i‖ q'_i / ‖q'_i‖.

    Args:
        queries: [..., Q, d], after the query projection and bias, before the 1/√d scaling.
        query_map: [..., d, d] in the dtype of `queries`; leading dimensions broadcast.
        preserve_norm: restore norms; rows of zeros stay zero, and M = I returns exactly `queries`.

    Returns:
        [..., Q, d] in the dtype of `queries`.
    """
    perturbed = queries @ query_map
    if not preserve_norm:
        return perturbed
    # Squares of half-precision queries overflow float16 from 256 on, and lose half their digits in bfloat16.
    norm = queries.float().square().sum(-1, keepdim=True).sqrt()
    perturbed_norm = perturbed.float().square().sum(-1, keepdim=True).sqrt()
    ratio = norm / torch.where(perturbed_norm > 0, perturbed_norm, 1.0)
    return perturbed * ratio.to(perturbed.dtype)


def _check(keys: Tensor, object_masks: Tensor, threshold: float) -> None:
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold is {threshold}, expected a contribution ratio in (0, 1]")
    if keys.ndim != 5 or object_masks.ndim != 3:
        raise ValueError(
            f"keys {tuple(keys.shape)} and object_masks {tuple(object_masks.shape)}: "
            "expected [B, A, H, N, d] and [B, O, N]"
        )
    if (keys.shape[0], keys.shape[3]) != (object_masks.shape[0], object_masks.shape[2]):
        raise ValueError(
            f"keys {tuple(keys.shape)} and object_masks {tuple(object_masks.shape)} differ in B or N: "
            "expected [B, A, H, N, d] and [B, O, N]"
        )


def _masked_gram(keys: Tensor, object_masks: Tensor) -> Tensor:
    masked = object_masks.double()[:, :, None, None, :, None] * keys.double()[:, None]  # [B, O, A, H, N, d]
    return masked.mT @ masked


def _margins(ratios: Tensor, ranks: Tensor, threshold: float) -> Tensor:
    """min over c_p and c_{p+1} of |c − τ|, without c_{d+1}."""
    distance = torch.nn.functional.pad((ratios - threshold).abs(), (0, 1), value=torch.inf)
    at_rank = distance.gather(-1, (ranks - 1).clamp(min=0)[..., None])[..., 0]
    after = distance.gather(-1, ranks[..., None])[..., 0]
    return torch.minimum(at_rank, after)


def _gaps(eigenvalues: Tensor, ranks: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(eigenvalues, (0, 1))
    last_kept = padded.gather(-1, (ranks - 1).clamp(min=0)[..., None])[..., 0]
    first_dropped = padded.gather(-1, ranks[..., None])[..., 0]
    return (last_kept - first_dropped) / torch.where(padded[..., 0] > 0, padded[..., 0], 1.0)
