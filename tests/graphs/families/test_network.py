"""The network against itself, written out the long way. Against stock Hugging Face and LAVIS: tests/exporter."""

import pytest
import torch
from tiny_model import TINY, tiny_network
from torch import nn

from qpert.graphs.families.blip2.config import Blip2Config, QFormerConfig, VisionConfig
from qpert.graphs.families.blip2.qformer import additive_mask
from qpert.graphs.layers import LayerNorm, attention
from qpert.graphs.perturbation.choices import GraphPerturbation

# The same float32 products in batches of another shape: a few ulp an operator, over about thirty operators.
CLOSE = {"rtol": 0, "atol": 1e-5}


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def features(images, seed=0):
    return randn(images, TINY.vision.tokens, TINY.vision.width, seed=seed)


def texts(*shape, lengths=None, seed=0):
    """input_ids and attention_mask; `lengths` counts tokens, the rest is padding."""
    ids = torch.randint(1, TINY.qformer.vocab_size, shape, generator=torch.Generator().manual_seed(seed))
    counts = torch.full(shape[:-1], shape[-1]) if lengths is None else torch.tensor(lengths).expand(shape[:-1])
    mask = (torch.arange(shape[-1]) < counts[..., None]).long()
    return ids * mask, mask


def boxes(images, count, weight=3.0, seed=0):
    masks = torch.rand((images, count, TINY.vision.tokens), generator=torch.Generator().manual_seed(seed))
    masks[:, :, 0] = 0
    return masks, torch.full((images, count), weight)


@pytest.fixture(scope="module")
def network():
    return tiny_network()


@pytest.fixture(scope="module")
def perturbed():
    return tiny_network(GraphPerturbation(0.9))


def test_texts_of_an_image_in_one_call_score_as_pair_by_pair(network):
    images, (ids, mask) = features(3), texts(3, 4, 9, lengths=[9, 4, 2, 6])
    together = network.match(images, ids, mask)
    alone = [
        [
            network.match(images[i : i + 1], ids[i : i + 1, t : t + 1], mask[i : i + 1, t : t + 1]).item()
            for t in range(4)
        ]
        for i in range(3)
    ]
    assert together.shape == (3, 4)
    assert together.std() > 0.05, "scores that hardly differ would show nothing"
    torch.testing.assert_close(together, torch.tensor(alone), **CLOSE)


def test_perturbed_pairs_in_one_call_score_as_pair_by_pair(perturbed):
    images, (ids, mask), (masks, weights) = features(2), texts(2, 3, 6), boxes(2, 3)
    together = perturbed.match(images, ids, mask, masks, weights)
    for i in range(2):
        for t in range(3):
            one = slice(i, i + 1)
            alone = perturbed.match(images[one], ids[one, t : t + 1], mask[one, t : t + 1], masks[one], weights[one])
            torch.testing.assert_close(together[i, t], alone[0, 0], **CLOSE)


def test_an_image_gives_the_same_queries_alone_and_in_a_batch(network):
    images = features(4)
    together = network.encode_queries(images)
    assert together.shape == (4, TINY.qformer.queries, TINY.embed_dim)
    for i in range(4):
        torch.testing.assert_close(together[i], network.encode_queries(images[i : i + 1])[0], **CLOSE)
    assert (together[0] - together[1]).abs().max() > 0.05


def test_queries_meet_the_image_in_every_layer_that_should():
    """With frequency 2 of three layers, layers 0 and 2 have a cross-attention, and each of them matters."""
    config = Blip2Config("x", TINY.vision, QFormerConfig(32, 3, 2, 48, 2, 4, 50, 32), 16)
    model = tiny_network(config=config)
    layers = model.Qformer.layers
    assert [layer.crossattention is not None for layer in layers] == [True, False, True]
    images = features(1)
    before = model.encode_queries(images)
    for layer in (layers[0], layers[2]):
        saved = layer.crossattention.self.value.weight.clone()
        layer.crossattention.self.value.weight.zero_()
        assert (model.encode_queries(images) - before).abs().max() > 1e-2
        layer.crossattention.self.value.weight.copy_(saved)
    assert torch.equal(model.encode_queries(images), before)


def test_keys_and_values_are_each_layers_own(network):
    images = features(2)
    keys, values = network.Qformer.keys_and_values(images)
    heads, width = TINY.qformer.heads, TINY.qformer.head_dim
    for number, cross in enumerate(network.Qformer.cross_attentions):
        for found, linear in ((keys, cross.self.key), (values, cross.self.value)):
            own = linear(images).reshape(2, -1, heads, width).transpose(1, 2)  # [B, H, N, d]
            torch.testing.assert_close(found[number], own, **CLOSE)


@pytest.mark.parametrize("branch", ["text", "pair"])
def test_padding_has_no_effect_however_long_and_whatever_it_holds(network, branch):
    ids, mask = texts(2, 5)
    junk = torch.full((2, 6), 777)
    padded = torch.cat([ids, junk], dim=1), torch.cat([mask, torch.zeros_like(junk)], dim=1)
    if branch == "text":
        plain, longer = network.encode_text(ids, mask), network.encode_text(*padded)
    else:
        images = features(1)
        plain = network.match(images, ids[None], mask[None])
        longer = network.match(images, padded[0][None], padded[1][None])
    torch.testing.assert_close(longer, plain, **CLOSE)


def test_a_token_that_is_not_masked_does_have_an_effect(network):
    ids, mask = texts(1, 5)
    other = ids.clone()
    other[0, 4] += 1
    assert (network.encode_text(ids, mask) - network.encode_text(other, mask)).abs().max() > 1e-3


def test_the_order_of_words_matters(network):
    ids, mask = texts(1, 5)
    swapped = ids[:, [0, 2, 1, 3, 4]]
    assert (network.encode_text(ids, mask) - network.encode_text(swapped, mask)).abs().max() > 1e-3


def test_embeddings_have_unit_length(network):
    ids, mask = texts(3, 5)
    for rows in (network.encode_queries(features(2)), network.encode_text(ids, mask)):
        torch.testing.assert_close(rows.norm(dim=-1), torch.ones(rows.shape[:-1]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("preserve_norm", [False, True])
def test_zero_weights_and_no_boxes_are_stock_blip2(preserve_norm, network):
    model = tiny_network(GraphPerturbation(0.9, preserve_norm))
    images, (ids, mask) = features(2), texts(2, 2, 5)
    zero, none = boxes(2, 3, weight=0.0), boxes(2, 0)
    stock_queries, stock_scores = network.encode_queries(images), network.match(images, ids, mask)
    for objects in (zero, none):
        # The map is exactly the identity, but one more product per head rounds again.
        torch.testing.assert_close(model.encode_queries(images, *objects), stock_queries, rtol=0, atol=1e-6)
        torch.testing.assert_close(model.match(images, ids, mask, *objects), stock_scores, rtol=0, atol=1e-6)


def test_boxes_of_weight_change_both_stages(perturbed):
    images, (ids, mask) = features(2), texts(2, 2, 5)
    none, some = boxes(2, 0), boxes(2, 2)
    assert (perturbed.encode_queries(images, *some) - perturbed.encode_queries(images, *none)).abs().max() > 1e-2
    assert (perturbed.match(images, ids, mask, *some) - perturbed.match(images, ids, mask, *none)).abs().max() > 1e-2


def test_boxes_of_one_image_leave_the_others_alone(perturbed):
    images = features(3)
    masks, weights = boxes(3, 2)
    weights[0] = 0
    weights[2] = 0
    some, none = perturbed.encode_queries(images, masks, weights), perturbed.encode_queries(images, *boxes(3, 0))
    torch.testing.assert_close(some[[0, 2]], none[[0, 2]], rtol=0, atol=1e-6)
    assert (some[1] - none[1]).abs().max() > 1e-2


def test_attention_is_torchs_scaled_dot_product_attention():
    queries, keys, values = (randn(2, 3, n, 8, seed=n) for n in (4, 6, 6))
    values = randn(2, 3, 6, 8, seed=9)
    mask = additive_mask(torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]))
    expected = nn.functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
    torch.testing.assert_close(attention(queries, keys, values, mask), expected, rtol=0, atol=1e-6)


def test_layer_norm_runs_in_float32_and_returns_the_dtype_it_got():
    norm = LayerNorm(64).half()
    x = (300 * randn(3, 64)).half()  # squares sum to 6e6, far above float16's 65504
    found = norm(x)
    assert found.dtype == torch.float16
    expected = nn.functional.layer_norm(x.double(), (64,))
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-3)  # rounding to 11 bits of values below 4


@pytest.mark.parametrize("family", ["eva", "clip"])
def test_both_vision_towers_give_a_token_for_cls_and_one_for_each_patch(family):
    vision = VisionConfig(family, 42, 14, 16, 2, 2, 32, 1e-6)
    model = tiny_network(config=Blip2Config("v", vision, TINY.qformer, 16))
    pixels = randn(2, 3, 42, 42)
    tokens = model.encode_image(pixels)
    assert tokens.shape == (2, 10, 16)
    torch.testing.assert_close(tokens[1], model.encode_image(pixels[1:])[0], **CLOSE)
