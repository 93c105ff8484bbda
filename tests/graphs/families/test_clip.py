"""CLIP's modules against stock transformers."""

import pytest
import torch
from stock_towers import CLIP_SHAPES, pixels, stock_clip
from torch.nn import functional as F

from qpert.graphs.families.clip.config import ClipConfig
from qpert.graphs.families.clip.model import ClipRetrieval, end_of_text
from qpert.graphs.transformer import TextConfig, VisionConfig, interpolate_positions

CLOSE = {"rtol": 0, "atol": 1e-5}
UNUSED = ["logit_scale"]


def config_of(stock):
    def encoder(part):
        return (
            part.hidden_size,
            part.num_hidden_layers,
            part.num_attention_heads,
            part.intermediate_size,
            part.hidden_act,
            part.layer_norm_eps,
        )

    vision, text = stock.config.vision_config, stock.config.text_config
    return ClipConfig(
        "small",
        VisionConfig(*encoder(vision), vision.image_size, vision.patch_size),
        TextConfig(*encoder(text), text.vocab_size, text.max_position_embeddings),
        stock.config.projection_dim,
        text.eos_token_id,
    )


def ours(stock, image_size=None):
    config = config_of(stock)
    state = {name: tensor for name, tensor in stock.state_dict().items() if name not in UNUSED}
    if image_size is not None:
        config = config.with_image_size(image_size)
        name = "vision_model.embeddings.position_embedding.weight"
        state[name] = interpolate_positions(state[name], config.vision.grid, prefix_tokens=1)
    model = ClipRetrieval(config)
    model.load_state_dict(state, strict=True)
    return model.eval().requires_grad_(False)


def texts(stock, count=5, seed=0):
    """Rows that start, end at different places, and are padded with the end-of-text token; and the mask of each."""
    text = stock.config.text_config
    end = text.vocab_size - 1 if text.eos_token_id == 2 else text.eos_token_id
    length = text.max_position_embeddings
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, min(40, text.vocab_size - 2), (count, length), generator=generator)
    ends = torch.randint(1, length, (count,), generator=generator)
    ends[0], ends[1] = length - 1, 1
    places = torch.arange(length)
    return torch.where(places >= ends[:, None], end, ids), (places <= ends[:, None]).long()


@pytest.fixture(params=CLIP_SHAPES)
def stock(request):
    return stock_clip(request.param)


def test_image_vectors_equal_stock(stock):
    images = pixels(stock.config.vision_config.image_size)
    expected = F.normalize(stock.get_image_features(images).pooler_output, dim=-1)
    model = ours(stock)
    tokens = model.encode_image(images)
    assert tokens.shape == (3, model.config.tokens, model.config.vision.width)
    torch.testing.assert_close(tokens, stock.vision_model(images).last_hidden_state, **CLOSE)
    vectors = model.encode_queries(tokens)
    assert vectors.shape == (3, 1, model.config.embed_dim)
    assert (expected[0] - expected[1]).abs().max() > 0.01, "images that look alike would show nothing"
    torch.testing.assert_close(vectors[:, 0], expected, **CLOSE)


def test_text_vectors_equal_stock_with_and_without_its_mask(stock):
    ids, mask = texts(stock)
    vectors = ours(stock).encode_text(ids)
    for stock_mask in (None, mask):
        expected = F.normalize(stock.get_text_features(ids, attention_mask=stock_mask).pooler_output, dim=-1)
        assert (expected[0] - expected[1]).abs().max() > 0.01
        torch.testing.assert_close(vectors, expected, **CLOSE)


def test_scores_rank_as_stock_scores_do(stock):
    images, (ids, mask) = pixels(stock.config.vision_config.image_size, 7), texts(stock, 11)
    expected = stock(input_ids=ids, attention_mask=mask, pixel_values=images).logits_per_image
    model = ours(stock)
    scores = model.encode_queries(model.encode_image(images))[:, 0] @ model.encode_text(ids).T
    torch.testing.assert_close(scores * stock.logit_scale.exp(), expected, rtol=0, atol=1e-4)
    assert (scores.argsort(1) == expected.argsort(1)).all()
    assert (scores.argsort(0) == expected.argsort(0)).all()


def test_padding_beyond_the_end_of_text_changes_nothing(stock):
    ids, _ = texts(stock)
    ids, width = ids[2:], ids.shape[1] - 1
    short = ids[:, : end_of_text(ids, stock.config.text_config.eos_token_id).max() + 1]
    other = torch.where(torch.arange(ids.shape[1]) < short.shape[1], ids, 0)
    model = ours(stock)
    assert short.shape[1] <= width + 1
    torch.testing.assert_close(model.encode_text(short), model.encode_text(ids), **CLOSE)
    torch.testing.assert_close(model.encode_text(other), model.encode_text(ids), **CLOSE)


@pytest.mark.parametrize(("shape", "size"), [("a", 77), ("a", 28), ("b", 87), ("c", 40)])
def test_another_image_size_interpolates_positions_as_stock_does(shape, size):
    stock = stock_clip(shape)
    images = pixels(size)
    expected = stock.get_image_features(images, interpolate_pos_encoding=True).pooler_output
    model = ours(stock, size)
    vectors = model.encode_queries(model.encode_image(images))[:, 0]
    torch.testing.assert_close(vectors, F.normalize(expected, dim=-1), **CLOSE)


def test_text_is_pooled_at_the_first_end_or_at_the_largest_id():
    ids = torch.tensor([[5, 9, 7, 9, 9], [9, 1, 2, 3, 4], [1, 2, 3, 4, 5]])
    assert end_of_text(ids, 9).tolist() == [1, 0, 0]
    assert end_of_text(ids, 2).tolist() == [1, 0, 4]


def test_config_survives_its_dictionary():
    config = config_of(stock_clip("b"))
    assert ClipConfig.from_dict(config.to_dict()) == config
    assert config.vision.grid == 5
    assert config.tokens == 26


def test_parameters_are_all_that_stock_has_but_the_scale(stock):
    model = ours(stock)
    left_out = stock.state_dict().keys() - model.state_dict().keys()
    assert sorted(left_out) == UNUSED
    assert all(stock.state_dict()[name].shape == tensor.shape for name, tensor in model.state_dict().items())
