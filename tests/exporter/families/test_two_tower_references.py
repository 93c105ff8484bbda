"""The stock references against the stock models' own forward, and our modules with boxes against the reference."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from stock_towers import CLIP_SHAPES, SIGLIP_SHAPES, pixels, stock_clip, stock_siglip

from qpert.exporter.families.clip.hub_config import UNUSED as CLIP_UNUSED
from qpert.exporter.families.clip.hub_config import read_config as read_clip
from qpert.exporter.families.clip.reference_huggingface import HuggingFaceReference as ClipReference
from qpert.exporter.families.siglip.hub_config import UNUSED as SIGLIP_UNUSED
from qpert.exporter.families.siglip.hub_config import read_config as read_siglip
from qpert.exporter.families.siglip.reference_huggingface import HuggingFaceReference as SiglipReference
from qpert.graphs.families.blip2.model import GraphPerturbation
from qpert.graphs.families.clip import model as clip_model
from qpert.graphs.families.siglip import model as siglip_model
from qpert.graphs.perturbation.oracle import key_subspaces
from qpert.runtime.errors import CheckpointError

CLOSE = {"rtol": 0, "atol": 2e-6}
"""The same float32 operations, in batches put together otherwise."""
DECIDED = 1e-4
"""Cuts nearer than this to the threshold may fall to either side in float32."""


def saved(stock, folder):
    stock.save_pretrained(folder)
    return folder


def ours(folder, family, perturbation=None):
    state = load_file(folder / "model.safetensors")
    if family == "clip":
        model, unused = clip_model.ClipRetrieval(read_clip(folder, name="t")[0]), CLIP_UNUSED
    else:
        model, unused = siglip_model.SiglipRetrieval(read_siglip(folder, name="t")[0], perturbation), SIGLIP_UNUSED
    model.load_state_dict({k: v for k, v in state.items() if k not in unused}, strict=True)
    return model.eval().requires_grad_(False)


def stage(module, model, graph, inputs):
    return module.STAGES[graph](model)(**{k: torch.from_numpy(v) for k, v in inputs.items()}).numpy()


def ids_for(stock, family, count=6):
    text = stock.config.text_config
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(3, min(40, text.vocab_size - 2), (count, text.max_position_embeddings), generator=generator)
    end = text.vocab_size - 1 if text.eos_token_id == 2 else text.eos_token_id
    if family == "clip":
        ids[torch.arange(count), torch.randint(1, ids.shape[1], (count,), generator=generator)] = end
        ids[:, -1] = end
    return ids


CASES = [("clip", shape) for shape in CLIP_SHAPES] + [("siglip", shape) for shape in SIGLIP_SHAPES]


@pytest.mark.parametrize(("family", "shape"), CASES)
def test_graph_by_graph_equals_the_stock_forward_and_our_modules(family, shape, tmp_path):
    stock = (stock_clip if family == "clip" else stock_siglip)(shape)
    folder = saved(stock, tmp_path)
    module = clip_model if family == "clip" else siglip_model
    model = ours(folder, family)
    images, ids = pixels(stock.config.vision_config.image_size, 5), ids_for(stock, family)
    forward = stock(input_ids=ids, pixel_values=images)
    with (ClipReference if family == "clip" else SiglipReference).open(folder) as reference:
        tokens = reference.run("vision", {"pixel_values": images.numpy()})
        queries = reference.run("image_query", tokens)["query_embeds"]
        texts = reference.run("text", {"input_ids": ids.numpy()})["text_embeds"]
    np.testing.assert_allclose(queries[:, 0], forward.image_embeds.numpy(), **CLOSE)
    np.testing.assert_allclose(texts, forward.text_embeds.numpy(), **CLOSE)
    for graph, inputs, expected in (
        ("vision", {"pixel_values": images.numpy()}, tokens["image_embeds"]),
        ("image_query", tokens, queries),
        ("text", {"input_ids": ids.numpy()}, texts),
    ):
        largest = np.abs(expected).max()  # CLIP's image tokens are not normalised: rounding grows with them
        np.testing.assert_allclose(stage(module, model, graph, inputs), expected, rtol=0, atol=1e-5 * max(1, largest))


def boxes(tokens, images=4, count=3, seed=0):
    """Rectangles of tokens with fractional borders; the last box of the last image covers nothing."""
    generator = np.random.default_rng(seed)
    masks = generator.random((images, count, tokens)) * (generator.random((images, count, tokens)) < 0.4)
    masks[-1, -1] = 0
    return masks.astype(np.float32), generator.uniform(-2, 6, (images, count)).astype(np.float32)


@pytest.mark.parametrize(("preserve_norm", "centre_keys"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("threshold", [0.8, 0.95])
@pytest.mark.parametrize("shape", SIGLIP_SHAPES)
def test_boxes_move_the_vector_as_the_independent_reference_says(
    shape, threshold, preserve_norm, centre_keys, tmp_path
):
    stock = stock_siglip(shape)
    folder = saved(stock, tmp_path)
    model = ours(folder, "siglip", GraphPerturbation(threshold, preserve_norm, centre_keys))
    choices = {"threshold": threshold, "preserve_norm": preserve_norm, "centre_keys": centre_keys}
    reference = SiglipReference.open(folder, **choices)
    tokens = model.encode_image(pixels(stock.config.vision_config.image_size, 4))
    masks, weights = boxes(model.config.tokens)
    cuts = key_subspaces(model.keys(tokens), torch.from_numpy(masks), threshold=threshold)
    clear = torch.minimum(cuts.margins, cuts.gaps).flatten(2).amin(-1) > DECIDED  # [B, O]
    assert clear.float().mean() > 0.5
    inputs = {"image_embeds": tokens.numpy(), "object_masks": masks, "box_weights": weights * clear.numpy()}
    expected = reference.run("image_query", inputs)["query_embeds"]
    plain = reference.run("image_query", {"image_embeds": tokens.numpy()})["query_embeds"]
    assert np.abs(expected - plain).max() > 1e-2, "boxes that change nothing would show nothing"
    np.testing.assert_allclose(stage(siglip_model, model, "image_query", inputs), expected, rtol=0, atol=1e-4)


def test_the_reference_without_weights_is_stock_and_leaves_the_model_as_it_was(tmp_path):
    stock = stock_siglip("a")
    reference = SiglipReference.open(saved(stock, tmp_path))
    before = {name: tensor.clone() for name, tensor in reference.model.state_dict().items()}
    tokens = reference.run("vision", {"pixel_values": pixels(49, 4).numpy()})
    masks, weights = boxes(49)
    with_boxes = tokens | {"object_masks": masks, "box_weights": np.zeros_like(weights)}
    plain = reference.run("image_query", tokens)["query_embeds"]
    np.testing.assert_allclose(reference.run("image_query", with_boxes)["query_embeds"], plain, **CLOSE)
    reference.run("image_query", with_boxes | {"box_weights": weights})
    assert all(torch.equal(before[name], tensor) for name, tensor in reference.model.state_dict().items())


def test_clip_takes_no_boxes(tmp_path):
    reference = ClipReference.open(saved(stock_clip("a"), tmp_path))
    tokens = reference.run("vision", {"pixel_values": pixels(49).numpy()})
    masks, weights = boxes(50, images=3)
    with pytest.raises(ValueError, match="expected \\['image_embeds'\\]"):
        reference.run("image_query", tokens | {"object_masks": masks, "box_weights": weights})


def test_siglip_exported_without_boxes_takes_none(tmp_path):
    folder = saved(stock_siglip("c"), tmp_path)
    reference = SiglipReference.open(folder, stages="none")
    tokens = reference.run("vision", {"pixel_values": pixels(24).numpy()})
    masks, weights = boxes(9, images=3)
    with pytest.raises(ValueError, match="expected \\['image_embeds'\\]"):
        reference.run("image_query", tokens | {"object_masks": masks, "box_weights": weights})
    with pytest.raises(ValueError, match="stages is 'both'"):
        SiglipReference.open(folder, stages="both")


def test_other_tensors_than_the_models_are_refused(tmp_path):
    folder = saved(stock_siglip("c"), tmp_path)
    state = load_file(folder / "model.safetensors")
    state["vision_model.head.probe2"] = state.pop("vision_model.head.probe")
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError) as caught:
        SiglipReference.open(folder)
    assert caught.value.code == "checkpoint-tensors"
    assert "1 missing (vision_model.head.probe)" in str(caught.value)
