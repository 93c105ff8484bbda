"""`centre_keys`: subspaces that no vector common to all keys can change, in both families that take boxes."""

import pytest
import torch
from our_towers import our_siglip
from stock_towers import pixels, stock_siglip
from tiny_model import TINY, tiny_network, tiny_state

from qpert.graphs.families.blip2.model import Blip2Retrieval
from qpert.graphs.perturbation.choices import GraphPerturbation
from qpert.graphs.perturbation.oracle import key_subspaces

THRESHOLD = 0.9
CENTRED, PLAIN = GraphPerturbation(THRESHOLD, centre_keys=True), GraphPerturbation(THRESHOLD)
SAME = {"rtol": 0, "atol": 1e-4}
"""fp32's tolerance of `qpert verify`: float32 keys with another bias round otherwise."""
DIFFERENT = 1e-2
DECIDED = 1e-4
"""Cuts nearer than this to the threshold may fall to either side in float32."""


def test_the_mean_is_over_all_tokens_of_an_image_a_layer_and_a_head():
    keys = torch.tensor([[9.0, 0.0], [1.0, 2.0], [2.0, 4.0]])  # mean (4, 2)
    expected = torch.tensor([[5.0, -2.0], [-3.0, 0.0], [-2.0, 2.0]])
    assert torch.equal(CENTRED.subspace_keys(keys), expected)
    many = torch.stack([keys, keys + 7, 2 * keys, -keys]).reshape(2, 1, 2, 3, 2)  # [B, A, H, N, d]
    wanted = torch.stack([expected, expected, 2 * expected, -expected]).reshape(2, 1, 2, 3, 2)
    assert torch.equal(CENTRED.subspace_keys(many), wanted)
    assert torch.equal(PLAIN.subspace_keys(many), many)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keys_are_centred_in_float32(dtype):
    keys = (1000 * torch.ones(300, 4)).to(dtype)  # their sum is beyond float16
    keys[0] += 8
    centred = CENTRED.subspace_keys(keys)
    assert centred.dtype == torch.float32
    torch.testing.assert_close(centred[0], torch.full((4,), 8 - 8 / 300), rtol=0, atol=1e-3)


def blip2_with_bias(perturbation, scale):
    """The tiny network with a random vector added to every cross-attention's key bias."""
    state, generator = tiny_state(), torch.Generator().manual_seed(8)
    names = [name for name in state if name.endswith("crossattention.self.key.bias")]
    assert len(names) == len(TINY.qformer.cross_layers)
    for name in names:
        state[name] = state[name] + scale * torch.randn(state[name].shape, generator=generator)
    model = Blip2Retrieval(TINY, perturbation)
    model.load_state_dict(state, strict=True)
    return model.eval().requires_grad_(False)


def siglip_with_bias(perturbation, scale):
    """The same for SigLIP's pooling head, whose key bias is the middle third of `in_proj_bias`."""
    model = our_siglip(stock_siglip("a"), perturbation)
    width, generator = model.config.vision.width, torch.Generator().manual_seed(8)
    added = scale * torch.randn(width, generator=generator)
    model.vision_model.head.attention.in_proj_bias[width : 2 * width] += added
    return model


def clear_boxes(model, tokens, keys):
    """Four boxes an image; those whose cut float32 may not decide weigh 0."""
    generator = torch.Generator().manual_seed(1)
    shape = (len(tokens), 4, tokens.shape[1])
    masks = torch.rand(shape, generator=generator) * (torch.rand(shape, generator=generator) < 0.4)
    cuts = key_subspaces(keys, masks, threshold=THRESHOLD)
    clear = torch.minimum(cuts.margins, cuts.gaps).flatten(2).amin(-1) > DECIDED
    assert clear.float().mean() > 0.5
    return masks, 3.0 * clear


def outputs(model, tokens, *boxes):
    """Query embeddings, and match logits where there is a pair stage."""
    found = [model.encode_queries(tokens, *boxes)]
    if isinstance(model, Blip2Retrieval):
        ids = torch.randint(1, 1000, (len(tokens), 3, 6), generator=torch.Generator().manual_seed(3))
        found.append(model.match(tokens, ids, torch.ones_like(ids), *boxes))
    return found


def keys_of(model, tokens):
    if isinstance(model, Blip2Retrieval):
        return model.subspace_keys(model.Qformer.keys_and_values(tokens)[0])
    return model.keys(tokens)


@pytest.fixture(params=[blip2_with_bias, siglip_with_bias], ids=["blip2", "siglip"])
def biased(request):
    return request.param


@pytest.fixture
def tokens(biased):
    if biased is blip2_with_bias:
        return torch.randn(3, TINY.vision.tokens, TINY.vision.width, generator=torch.Generator().manual_seed(2))
    model = biased(None, 0.0)
    return model.encode_image(pixels(model.config.vision.image_size, 3))


def test_a_vector_added_to_every_key_changes_neither_stock_nor_centred_outputs(biased, tokens):
    """q·b is the same for every token and leaves the softmax; only the uncentred subspaces depend on b."""
    before, after = biased(CENTRED, 0.0), biased(CENTRED, 2.0)
    boxes = clear_boxes(before, tokens, keys_of(before, tokens))
    stock, centred = outputs(before, tokens), outputs(before, tokens, *boxes)
    for one, other in zip(stock, outputs(after, tokens), strict=True):
        torch.testing.assert_close(other, one, **SAME)
    for one, other, unperturbed in zip(centred, outputs(after, tokens, *boxes), stock, strict=True):
        torch.testing.assert_close(other, one, **SAME)
        assert (one - unperturbed).abs().max() > DIFFERENT, "boxes that change nothing would show nothing"
    plain = [outputs(biased(PLAIN, scale), tokens, *boxes) for scale in (0.0, 2.0)]
    for one, other, moved in zip(*plain, centred, strict=True):
        assert (one - other).abs().max() > DIFFERENT, "without centring, the key bias decides"
        assert (one - moved).abs().max() > DIFFERENT, "centring makes a difference"


def test_zero_weights_and_no_boxes_are_stock(biased, tokens):
    stock, model = outputs(biased(None, 0.0), tokens), biased(CENTRED, 0.0)
    masks = torch.rand(len(tokens), 4, tokens.shape[1], generator=torch.Generator().manual_seed(1))
    for count in (4, 0):
        boxes = masks[:, :count], torch.zeros(len(tokens), count)
        for one, other in zip(outputs(model, tokens, *boxes), stock, strict=True):
            # The map is exactly the identity, but one more product per head rounds again.
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_a_familys_keys_are_those_of_the_subspaces():
    """The references judge by them which cuts float32 decides."""
    from qpert.exporter.families.blip2.family import FAMILY

    features = torch.randn(2, TINY.vision.tokens, TINY.vision.width, generator=torch.Generator().manual_seed(2))
    plain, centred = (FAMILY.keys(tiny_network(choices), features) for choices in (PLAIN, CENTRED))
    torch.testing.assert_close(centred.mean(-2), torch.zeros_like(centred[..., 0, :]), rtol=0, atol=1e-5)
    torch.testing.assert_close(centred, plain - plain.mean(-2, keepdim=True))
    assert plain.mean(-2).abs().max() > 0.1
