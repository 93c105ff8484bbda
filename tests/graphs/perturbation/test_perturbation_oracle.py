"""The oracle against cases worked by hand and against numpy's eigendecomposition."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from qpert.graphs.perturbation.oracle import key_subspaces, perturb_queries, query_map

UNIT = torch.eye(4, dtype=torch.float64)


def keys_of(rows: torch.Tensor) -> torch.Tensor:
    """[N, d] to [1, 1, 1, N, d]."""
    return rows[None, None, None]


def everywhere(keys: torch.Tensor, objects: int = 1) -> torch.Tensor:
    return torch.ones(keys.shape[0], objects, keys.shape[3])


# Eigenvalues 6, 3, 1, 0: contribution ratios 0.6, 0.9, 1.0, 1.0.
DIAGONAL = keys_of(torch.diag(torch.tensor([6.0, 3.0, 1.0, 0.0])).double().sqrt())


@pytest.mark.parametrize(
    ("threshold", "rank", "margin"),
    [(0.5, 1, 0.1), (0.6, 1, 0.0), (0.61, 1, 0.01), (0.9, 1, 0.0), (0.91, 2, 0.01), (0.99, 2, 0.01)],
)
def test_rank_is_the_number_of_ratios_below_the_threshold_and_at_least_one(threshold, rank, margin):
    found = key_subspaces(DIAGONAL, everywhere(DIAGONAL), threshold=threshold)
    assert found.ranks.item() == rank
    assert found.margins.item() == pytest.approx(margin, abs=1e-12)
    torch.testing.assert_close(found.projectors[0, 0, 0, 0], torch.diag((torch.arange(4) < rank).double()))


def test_gap_is_the_distance_of_the_eigenvalues_at_the_cut_relative_to_the_greatest():
    assert key_subspaces(DIAGONAL, everywhere(DIAGONAL), threshold=0.5).gaps.item() == pytest.approx((6 - 3) / 6)
    assert key_subspaces(DIAGONAL, everywhere(DIAGONAL), threshold=0.95).gaps.item() == pytest.approx((3 - 1) / 6)


def test_masks_weigh_eigenvalues_by_their_square():
    """K = I with m = (1, 1/2, 1/4, 0): eigenvalues 1, 1/4, 1/16; ratios 16/21, 20/21, 1."""
    mask = torch.tensor([[[1.0, 0.5, 0.25, 0.0]]])
    below, above = (
        key_subspaces(keys_of(UNIT), mask, threshold=t).projectors[0, 0, 0, 0] for t in (20 / 21 - 1e-9, 20 / 21 + 1e-9)
    )
    torch.testing.assert_close(below, torch.diag(torch.tensor([1.0, 0, 0, 0]).double()))
    torch.testing.assert_close(above, torch.diag(torch.tensor([1.0, 1, 0, 0]).double()))


def test_a_single_key_gives_the_projector_onto_it():
    key = torch.tensor([[3.0, 0.0, -4.0, 0.0]]).double()
    found = key_subspaces(keys_of(key), torch.ones(1, 1, 1), threshold=0.95)
    torch.testing.assert_close(found.projectors[0, 0, 0, 0], key.T @ key / 25)
    assert found.ranks.item() == 1


@pytest.mark.parametrize("keys", [torch.randn(1, 1, 1, 5, 4), torch.zeros(1, 1, 1, 5, 4)])
def test_an_empty_mask_or_zero_keys_give_no_subspace_and_the_identity(keys):
    mask = torch.zeros(1, 1, 5) if keys.any() else torch.ones(1, 1, 5)
    found = key_subspaces(keys, mask, threshold=0.9)
    assert found.ranks.item() == 0
    assert not found.projectors.any()
    assert math.isinf(found.margins.item())
    assert math.isinf(found.gaps.item())
    assert torch.equal(query_map(keys, mask, torch.full((1, 1), 8.0), threshold=0.9)[0, 0, 0], torch.eye(4))


def test_no_boxes_or_zero_weights_give_exactly_the_identity():
    keys = torch.randn(2, 3, 2, 5, 4)
    identity = torch.eye(4).expand(2, 3, 2, 4, 4)
    assert torch.equal(query_map(keys, torch.zeros(2, 0, 5), torch.zeros(2, 0), threshold=0.9), identity)
    assert torch.equal(query_map(keys, torch.ones(2, 3, 5), torch.zeros(2, 3), threshold=0.9), identity)


def test_boxes_add_up_with_their_weights():
    """Box 1 covers e1, box 2 covers e2 and box 3 both, where e1 dominates (16 against 1)."""
    keys = keys_of(torch.diag(torch.tensor([4.0, 1.0, 1.0, 1.0])))
    masks = torch.tensor([[[1.0, 0, 0, 0], [0, 1, 0, 0], [1, 1, 0, 0]]])
    mapped = query_map(keys, masks, torch.tensor([[2.0, 3.0, -0.5]]), threshold=0.9)
    torch.testing.assert_close(mapped[0, 0, 0], torch.diag(torch.tensor([1 + 2 - 0.5, 1 + 3, 1, 1])))


def test_layers_heads_and_images_are_independent():
    torch.manual_seed(0)
    keys, masks = torch.randn(2, 3, 2, 9, 8), torch.rand(2, 4, 9)
    whole = key_subspaces(keys, masks, threshold=0.8).projectors
    alone = key_subspaces(keys[1:, 2:, 1:], masks[1:, 3:], threshold=0.8).projectors
    torch.testing.assert_close(whole[1, 3, 2, 1], alone[0, 0, 0, 0])


@pytest.mark.parametrize("threshold", [0.5, 0.85, 0.99])
def test_projectors_agree_with_numpy(threshold):
    rng = np.random.default_rng(0)
    keys, mask = rng.standard_normal((12, 8)), rng.uniform(size=12)
    masked = mask[:, None] * keys
    eigenvalues, vectors = np.linalg.eigh(masked.T @ masked)
    rank = max(1, int((np.cumsum(eigenvalues[::-1]) / eigenvalues.sum() < threshold).sum()))
    leading = vectors[:, ::-1][:, :rank]
    found = key_subspaces(keys_of(torch.from_numpy(keys)), torch.from_numpy(mask)[None, None], threshold=threshold)
    assert found.ranks.item() == rank
    np.testing.assert_allclose(found.projectors[0, 0, 0, 0].numpy(), leading @ leading.T, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_map_has_the_dtype_of_the_keys(dtype):
    keys = torch.randn(1, 1, 2, 5, 4).to(dtype)
    assert query_map(keys, torch.ones(1, 1, 5), torch.ones(1, 1), threshold=0.9).dtype == dtype


def test_queries_are_multiplied_by_the_map():
    """q = (1, 2), M = diag(3, 1): q' = (3, 2)."""
    perturbed = perturb_queries(torch.tensor([[1.0, 2.0]]), torch.diag(torch.tensor([3.0, 1.0])), preserve_norm=False)
    assert perturbed.tolist() == [[3.0, 2.0]]


def test_preserved_norms_keep_length_and_change_direction():
    """q = (3, 4), M = diag(4, 3): q' = (12, 12), rescaled to length 5."""
    perturbed = perturb_queries(torch.tensor([[3.0, 4.0]]), torch.diag(torch.tensor([4.0, 3.0])), preserve_norm=True)
    torch.testing.assert_close(perturbed, torch.full((1, 2), 5 / math.sqrt(2)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_identity_returns_the_very_queries_and_zero_rows_stay_zero(dtype):
    queries = torch.randn(2, 3, 5, 8).to(dtype)
    queries[0, 0, 0] = 0
    perturbed = perturb_queries(queries, torch.eye(8, dtype=dtype).expand(2, 3, 8, 8), preserve_norm=True)
    assert torch.equal(perturbed, queries)


def test_norms_of_half_precision_queries_do_not_overflow():
    queries = torch.full((1, 64), 300.0, dtype=torch.float16)  # 300² is beyond float16
    perturbed = perturb_queries(queries, torch.eye(64, dtype=torch.float16) * 2, preserve_norm=True)
    torch.testing.assert_close(perturbed, queries)


@pytest.mark.parametrize("threshold", [0.0, -0.1, 1.01])
def test_a_threshold_that_is_no_ratio_is_refused(threshold):
    with pytest.raises(ValueError, match="contribution ratio"):
        key_subspaces(DIAGONAL, everywhere(DIAGONAL), threshold=threshold)


def test_shapes_that_do_not_belong_together_are_refused():
    with pytest.raises(ValueError, match="differ in B or N"):
        key_subspaces(DIAGONAL, torch.ones(1, 1, 7), threshold=0.9)
    with pytest.raises(ValueError, match=r"expected \[B, A, H, N, d\]"):
        key_subspaces(DIAGONAL[0], torch.ones(1, 1, 4), threshold=0.9)
    with pytest.raises(ValueError, match="one weight per box"):
        query_map(DIAGONAL, everywhere(DIAGONAL), torch.ones(1, 2), threshold=0.9)
