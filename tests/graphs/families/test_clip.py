"""CLIP's modules against stock transformers."""

import pytest
import torch
from our_towers import CLIP_UNUSED, clip_config, clip_texts, our_clip
from stock_towers import CLIP_SHAPES, pixels, stock_clip
from torch.nn import functional as F

from qpert.graphs.families.clip.config import ClipConfig
from qpert.graphs.families.clip.model import end_of_text

CLOSE = {"rtol": 0, "atol": 1e-5}


@pytest.fixture(params=CLIP_SHAPES)
def stock(request):
    return stock_clip(request.param)


def test_image_vectors_equal_stock(stock):
    images = pixels(stock.config.vision_config.image_size)
    expected = F.normalize(stock.get_image_features(images).pooler_output, dim=-1)
    model = our_clip(stock)
    tokens = model.encode_image(images)
    assert tokens.shape == (3, model.config.tokens, model.config.vision.width)
    torch.testing.assert_close(tokens, stock.vision_model(images).last_hidden_state, **CLOSE)
    vectors = model.encode_queries(tokens)
    assert vectors.shape == (3, 1, model.config.embed_dim)
    assert (expected[0] - expected[1]).abs().max() > 0.01, "images that look alike would show nothing"
    torch.testing.assert_close(vectors[:, 0], expected, **CLOSE)


def test_text_vectors_equal_stock_with_and_without_its_mask(stock):
    ids, mask = clip_texts(stock)
    vectors = our_clip(stock).encode_text(ids)
    for stock_mask in (None, mask):
        expected = F.normalize(stock.get_text_features(ids, attention_mask=stock_mask).pooler_output, dim=-1)
        assert (expected[0] - expected[1]).abs().max() > 0.01
        torch.testing.assert_close(vectors, expected, **CLOSE)


def test_scores_rank_as_stock_scores_do(stock):
    images, (ids, mask) = pixels(stock.config.vision_config.image_size, 7), clip_texts(stock, 11)
    expected = stock(input_ids=ids, attention_mask=mask, pixel_values=images).logits_per_image
    model = our_clip(stock)
    scores = model.encode_queries(model.encode_image(images))[:, 0] @ model.encode_text(ids).T
    torch.testing.assert_close(scores * stock.logit_scale.exp(), expected, rtol=0, atol=1e-4)
    assert (scores.argsort(1) == expected.argsort(1)).all()
    assert (scores.argsort(0) == expected.argsort(0)).all()


def test_padding_beyond_the_end_of_text_changes_nothing(stock):
    ids, _ = clip_texts(stock)
    ids, width = ids[2:], ids.shape[1] - 1
    short = ids[:, : end_of_text(ids, stock.config.text_config.eos_token_id).max() + 1]
    other = torch.where(torch.arange(ids.shape[1]) < short.shape[1], ids, 0)
    model = our_clip(stock)
    assert short.shape[1] <= width + 1
    torch.testing.assert_close(model.encode_text(short), model.encode_text(ids), **CLOSE)
    torch.testing.assert_close(model.encode_text(other), model.encode_text(ids), **CLOSE)


@pytest.mark.parametrize(("shape", "size"), [("a", 77), ("a", 28), ("b", 87), ("c", 40)])
def test_another_image_size_interpolates_positions_as_stock_does(shape, size):
    stock = stock_clip(shape)
    images = pixels(size)
    expected = stock.get_image_features(images, interpolate_pos_encoding=True).pooler_output
    model = our_clip(stock, size)
    vectors = model.encode_queries(model.encode_image(images))[:, 0]
    torch.testing.assert_close(vectors, F.normalize(expected, dim=-1), **CLOSE)


def test_text_is_pooled_at_the_first_end_or_at_the_largest_id():
    ids = torch.tensor([[5, 9, 7, 9, 9], [9, 1, 2, 3, 4], [1, 2, 3, 4, 5]])
    assert end_of_text(ids, 9).tolist() == [1, 0, 0]
    assert end_of_text(ids, 2).tolist() == [1, 0, 4]


def test_config_survives_its_dictionary():
    config = clip_config(stock_clip("b"))
    assert ClipConfig.from_dict(config.to_dict()) == config
    assert config.vision.grid == 5
    assert config.tokens == 26


def test_parameters_are_all_that_stock_has_but_the_scale(stock):
    model = our_clip(stock)
    left_out = stock.state_dict().keys() - model.state_dict().keys()
    assert sorted(left_out) == CLIP_UNUSED
    assert all(stock.state_dict()[name].shape == tensor.shape for name, tensor in model.state_dict().items())
