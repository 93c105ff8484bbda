"""SigLIP's modules against stock transformers."""

import pytest
import torch
from our_towers import SIGLIP_UNUSED, our_siglip, siglip_config, siglip_texts
from stock_towers import SIGLIP_SHAPES, pixels, stock_siglip
from torch.nn import functional as F

from qpert.graphs.families.blip2.model import GraphPerturbation
from qpert.graphs.families.siglip.config import SiglipConfig

CLOSE = {"rtol": 0, "atol": 1e-5}


@pytest.fixture(params=SIGLIP_SHAPES)
def stock(request):
    return stock_siglip(request.param)


def test_image_tokens_and_vectors_equal_stock(stock):
    images = pixels(stock.config.vision_config.image_size)
    expected = stock.vision_model(images)
    model = our_siglip(stock)
    tokens = model.encode_image(images)
    assert tokens.shape == (3, model.config.tokens, model.config.vision.width)
    torch.testing.assert_close(tokens, expected.last_hidden_state, **CLOSE)
    vectors = model.encode_queries(tokens)
    assert vectors.shape == (3, 1, model.config.embed_dim)
    pooled = F.normalize(expected.pooler_output, dim=-1)
    assert (pooled[0] - pooled[1]).abs().max() > 0.01, "images that look alike would show nothing"
    torch.testing.assert_close(vectors[:, 0], pooled, **CLOSE)


def test_text_vectors_equal_stock(stock):
    ids = siglip_texts(stock)
    expected = F.normalize(stock.get_text_features(ids).pooler_output, dim=-1)
    assert (expected[0] - expected[1]).abs().max() > 0.01
    torch.testing.assert_close(our_siglip(stock).encode_text(ids), expected, **CLOSE)


def test_scores_rank_as_stock_scores_do(stock):
    images, ids = pixels(stock.config.vision_config.image_size, 7), siglip_texts(stock, 11)
    expected = stock(input_ids=ids, pixel_values=images).logits_per_image
    model = our_siglip(stock)
    scores = model.encode_queries(model.encode_image(images))[:, 0] @ model.encode_text(ids).T
    torch.testing.assert_close(scores * stock.logit_scale.exp() + stock.logit_bias, expected, rtol=0, atol=1e-4)
    assert (scores.argsort(1) == expected.argsort(1)).all()
    assert (scores.argsort(0) == expected.argsort(0)).all()


def test_a_text_of_another_length_is_another_text(stock):
    ids = siglip_texts(stock)
    model = our_siglip(stock)
    assert (model.encode_text(ids[:, :-1]) - model.encode_text(ids)).abs().max() > 0.01


@pytest.mark.parametrize(("shape", "size"), [("a", 77), ("a", 28), ("b", 87), ("c", 40)])
def test_another_image_size_interpolates_positions_as_stock_does(shape, size):
    stock = stock_siglip(shape)
    images = pixels(size)
    expected = stock.get_image_features(images, interpolate_pos_encoding=True).pooler_output
    model = our_siglip(stock, image_size=size)
    vectors = model.encode_queries(model.encode_image(images))[:, 0]
    torch.testing.assert_close(vectors, F.normalize(expected, dim=-1), **CLOSE)


@pytest.mark.parametrize("preserve_norm", [False, True])
def test_without_weights_boxes_change_nothing(stock, preserve_norm):
    model = our_siglip(stock, GraphPerturbation(0.9, preserve_norm))
    tokens = model.encode_image(pixels(model.config.vision.image_size))
    masks = torch.rand(3, 4, model.config.tokens, generator=torch.Generator().manual_seed(1))
    plain = model.encode_queries(tokens)
    assert torch.equal(model.encode_queries(tokens, masks, torch.zeros(3, 4)), plain)
    assert torch.equal(model.encode_queries(tokens, masks[:, :0], torch.zeros(3, 0)), plain)
    assert (model.encode_queries(tokens, masks, torch.ones(3, 4)) - plain).abs().max() > 1e-3


def test_keys_are_the_projection_of_the_head(stock):
    model = our_siglip(stock)
    tokens = model.encode_image(pixels(model.config.vision.image_size))
    heads, width = model.config.vision.heads, model.config.vision.width
    packed = stock.vision_model.head.attention
    flat = tokens @ packed.in_proj_weight[width : 2 * width].T + packed.in_proj_bias[width : 2 * width]
    keys = model.keys(tokens)
    assert keys.shape == (3, 1, heads, model.config.tokens, width // heads)
    torch.testing.assert_close(keys[:, 0, heads - 1], flat[..., -(width // heads) :], **CLOSE)


def test_config_survives_its_dictionary():
    config = siglip_config(stock_siglip("b"))
    assert SiglipConfig.from_dict(config.to_dict()) == config
    assert config.vision.grid == 5
    assert config.tokens == 25


def test_parameters_are_all_that_stock_has_but_scale_and_bias(stock):
    model = our_siglip(stock)
    left_out = stock.state_dict().keys() - model.state_dict().keys()
    assert sorted(left_out) == SIGLIP_UNUSED
    assert all(stock.state_dict()[name].shape == tensor.shape for name, tensor in model.state_dict().items())
