"""The perturbation of the references, against cases worked by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from qpert.exporter.families.blip2.upstream import UpstreamReference, perturbed_cross_attention, query_maps

# Two heads of two dimensions, three tokens (CLS first). Head 0 has its keys along x (length 3) and y (length 1);
# head 1 has every key along (1, 1).
KEYS = torch.tensor([[[[9.0, 9.0], [3.0, 0.0], [0.0, 1.0]], [[9.0, -9.0], [1.0, 1.0], [2.0, 2.0]]]])
BOTH = torch.tensor([[[0.0, 1.0, 1.0]]])
X, Y, DIAGONAL = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.5]).sqrt()


def onto(*directions: torch.Tensor) -> torch.Tensor:
    return sum(torch.outer(v, v) for v in directions).double()


def maps(masks: torch.Tensor, weights: torch.Tensor, threshold: float) -> torch.Tensor:
    return query_maps(KEYS, masks, weights, threshold) - torch.eye(2)


def test_the_subspace_keeps_the_dimensions_whose_share_stays_below_the_threshold():
    # Head 0: eigenvalues 9 and 1, shares 0.9 and 1. Head 1: one eigenvalue, share 1 (to rounding).
    one = torch.ones(1, 1)
    assert torch.allclose(maps(BOTH, one, 0.95)[0, 0], onto(X))  # 0.9 is below 0.95, 1 is not: one dimension
    assert torch.allclose(maps(BOTH, one, 0.5)[0, 0], onto(X))  # none is below: at least one
    assert torch.allclose(maps(BOTH, one, 1.1)[0, 0], onto(X, Y))  # both are below
    assert torch.allclose(maps(BOTH, one, 0.95)[0, 1], onto(DIAGONAL))


def test_masks_weight_the_keys_before_they_are_squared():
    third = torch.tensor([[[0.0, 1 / 3, 1.0]]])  # both keys of head 0 become 1 long: shares 0.5 and 1
    quarter = torch.tensor([[[0.0, 1 / 4, 1.0]]])  # the one along y is now the longer: 1 against 9/16
    assert torch.allclose(maps(quarter, torch.ones(1, 1), 0.5)[0, 0], onto(Y))
    assert torch.allclose(maps(third, torch.ones(1, 1), 1.1)[0, 0], onto(X, Y))


def test_boxes_add_up_with_their_weights_and_an_empty_mask_adds_nothing():
    masks = torch.tensor([[[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]])
    found = maps(masks, torch.tensor([[2.0, -0.5, 7.0]]), 0.95)
    assert torch.allclose(found[0, 0], 2 * onto(X) - 0.5 * onto(Y))
    assert torch.allclose(found[0, 1], 1.5 * onto(DIAGONAL))


def test_centred_keys_are_taken_from_the_mean_of_all_tokens():
    # The first box token: (3, 0) less head 0's mean (4, 10/3) is (-1, -10/3); (1, 1) less head 1's (4, -2) is (-3, 3).
    first = torch.tensor([[[0.0, 1.0, 0.0]]])  # one token: its own direction, whatever the threshold
    found = query_maps(KEYS, first, torch.ones(1, 1), 0.95, centre_keys=True)[0] - torch.eye(2)
    assert torch.allclose(found[0], onto(torch.tensor([-3.0, -10.0]) / 109**0.5))
    assert torch.allclose(found[1], onto(torch.tensor([-1.0, 1.0]) / 2**0.5))


def test_no_box_gives_the_identity():
    assert torch.equal(maps(torch.zeros(1, 0, 3), torch.zeros(1, 0), 0.95), torch.zeros(1, 2, 2, 2).double())


@pytest.mark.parametrize(("preserve_norm", "expected"), [(False, [9.0, 4.0, 6.0, 6.0]), (True, None)])
def test_hooks_map_the_queries_of_each_head_and_go_away(preserve_norm: bool, expected: list[float] | None):
    query, key = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    query.weight.data = torch.eye(4)
    key.weight.data = torch.eye(4)
    features = KEYS.transpose(1, 2).flatten(2)  # [1,3,4], so that the keys are KEYS
    hidden = torch.tensor([[[3.0, 4.0, 2.0, 2.0]]])
    pairs = [(query, key)]
    with torch.no_grad():
        with perturbed_cross_attention(pairs, 2, features, BOTH, torch.tensor([[2.0]]), 0.95, preserve_norm):
            found = query(hidden)
        assert torch.equal(query(hidden), hidden)
    if expected is None:  # the direction of (9, 4) at the length of (3, 4); (6, 6) has the direction of (2, 2)
        expected = [*(5 * np.array([9.0, 4.0]) / np.sqrt(97)), 2.0, 2.0]
    assert torch.allclose(found[0, 0], torch.tensor(expected, dtype=torch.float32), rtol=1e-6)


def test_inputs_that_a_stage_does_not_take_are_refused_by_name():
    reference = UpstreamReference(nn.Linear(1, 1), heads=1, stages="itc")
    masks = {"object_masks": np.zeros((1, 1, 3), np.float32), "box_weights": np.zeros((1, 1), np.float32)}
    itm = {"image_embeds": np.zeros(1), "input_ids": np.zeros(1), "attention_mask": np.zeros(1)}
    with pytest.raises(ValueError, match=r"itm was given .*object_masks.*perturbed stages: itc"):
        reference.run("itm", itm | masks)
    with pytest.raises(ValueError, match="graph is 'images', expected one of vision, image_query, text, itm"):
        reference.run("images", {})
    with pytest.raises(ValueError, match="stages is 'all', expected one of itc, both, none"):
        UpstreamReference(nn.Linear(1, 1), heads=1, stages="all")
