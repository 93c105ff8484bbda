"""The Hugging Face reference against the model's own forward, and what it refuses to load."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import small_lavis
import torch
from safetensors.torch import load_file, save_file
from stock_models import SHAPES, small_hf_folder, small_inputs

from qpert.exporter.families.blip2.checkpoint import open_checkpoint
from qpert.exporter.families.blip2.reference_huggingface import HuggingFaceReference
from qpert.runtime.errors import CheckpointError, UnavailableError

# The same float32 operations in the same order, except that batches are put together otherwise.
CLOSE = {"rtol": 0, "atol": 2e-6}


@pytest.fixture(scope="module", params=sorted(SHAPES))
def shape(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(shape: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_hf_folder(tmp_path_factory.mktemp("hf"), shape)


@pytest.fixture(scope="module")
def inputs(shape: str) -> dict[str, torch.Tensor]:
    return small_inputs(shape, images=3, texts=3)


def arrays(inputs: dict[str, torch.Tensor]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Inputs of `vision` and of `text`."""
    found = {name: value.numpy() for name, value in inputs.items()}
    return {"pixel_values": found.pop("pixel_values")}, found


def pairs(embeds: dict[str, np.ndarray], texts: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Inputs of `itm`: every text with every image."""
    images = len(embeds["image_embeds"])
    return embeds | {name: np.broadcast_to(value, (images, *value.shape)) for name, value in texts.items()}


def boxes(tokens: int, weight: float) -> dict[str, np.ndarray]:
    """Two boxes for each of three images, one of them covering nothing in the last."""
    masks = np.random.default_rng(0).random((3, 2, tokens)).astype(np.float32)
    masks[:, :, 0], masks[2, 1] = 0, 0
    return {"object_masks": masks, "box_weights": np.full((3, 2), weight, np.float32)}


def test_stage_by_stage_equals_the_stock_contrastive_forward(folder: Path, inputs: dict[str, torch.Tensor]):
    reference = HuggingFaceReference.open(folder)
    stock = reference.model(**inputs)
    vision, texts = arrays(inputs)
    embeds = reference.run("vision", vision)
    queries = reference.run("image_query", embeds)["query_embeds"]
    captions = reference.run("text", texts)["text_embeds"]
    np.testing.assert_allclose(queries, stock.image_embeds.numpy(), **CLOSE)
    np.testing.assert_allclose(captions, stock.text_embeds.numpy(), **CLOSE)
    scores = np.einsum("iqe,te->itq", queries, captions).max(-1)
    np.testing.assert_allclose(scores, stock.logits_per_image.numpy(), **CLOSE)
    assert scores.std() > 0.01, "scores that hardly differ would show nothing"


def test_every_pair_equals_the_stock_matching_forward(folder: Path, inputs: dict[str, torch.Tensor]):
    reference = HuggingFaceReference.open(folder)
    vision, texts = arrays(inputs)
    scores = reference.run("itm", pairs(reference.run("vision", vision), texts))["itm_scores"]
    for shift in range(3):  # the stock forward takes image i with text i
        shifted = {name: value.roll(-shift, 0) for name, value in inputs.items() if name != "pixel_values"}
        stock = reference.model(inputs["pixel_values"], **shifted, use_image_text_matching_head=True)
        found = [scores[i, (i + shift) % 3] for i in range(3)]
        np.testing.assert_allclose(found, stock.logits_per_image[:, 1].numpy(), **CLOSE)
    assert scores.std() > 0.05, "scores that hardly differ would show nothing"


@pytest.mark.parametrize("graph", ["image_query", "itm"])
def test_zero_weights_are_the_stock_network(graph: str, folder: Path, inputs: dict[str, torch.Tensor]):
    reference = HuggingFaceReference.open(folder, stages="both")
    vision, texts = arrays(inputs)
    embeds = reference.run("vision", vision)
    given = embeds if graph == "image_query" else pairs(embeds, texts)
    tokens = embeds["image_embeds"].shape[1]
    (stock,) = reference.run(graph, given).values()
    (zero,) = reference.run(graph, given | boxes(tokens, 0.0)).values()
    (eight,) = reference.run(graph, given | boxes(tokens, 8.0)).values()
    np.testing.assert_array_equal(zero, stock)
    assert np.abs(eight - stock).max() > 0.01


@pytest.mark.parametrize("graph", ["image_query", "itm"])
def test_a_box_that_spans_every_dimension_scales_the_queries(graph: str, tmp_path: Path):
    # With a threshold above 1 every dimension is kept, P = I (26 tokens span the head's 16) and M = (1 + w) I: the
    # network whose cross-attention query layers are 1 + w times as large.
    reference = HuggingFaceReference.open(small_hf_folder(tmp_path, "b"), threshold=1.1, stages="both")
    vision, texts = arrays(small_inputs("b", images=3, texts=3))
    embeds = reference.run("vision", vision)
    given = embeds if graph == "image_query" else pairs(embeds, texts)
    whole = np.ones((3, 1, embeds["image_embeds"].shape[1]), np.float32)
    (found,) = reference.run(
        graph, given | {"object_masks": whole, "box_weights": np.full((3, 1), 0.75, np.float32)}
    ).values()
    for layer in reference.model.qformer.encoder.layer:
        layer.crossattention.attention.query.weight.mul_(1.75)
        layer.crossattention.attention.query.bias.mul_(1.75)
    (expected,) = reference.run(graph, given).values()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_another_image_size_interpolates_the_position_embedding(folder: Path, shape: str):
    spec = SHAPES[shape].vision
    size = spec["image_size"] + 2 * spec["patch_size"]
    pixels = np.random.default_rng(0).normal(size=(1, 3, size, size)).astype(np.float32)
    found = HuggingFaceReference.open(folder).run("vision", {"pixel_values": pixels})["image_embeds"]
    assert found.shape == (1, (size // spec["patch_size"]) ** 2 + 1, spec["hidden_size"])


def changed(folder: Path, to: Path, change) -> Path:
    """A copy of `folder` with `change` applied to its tensors."""
    to.mkdir()
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("itm_head.bias"), r"1 missing \(itm_head.bias\)"),
        (lambda t: t.update({"qformer.extra": torch.zeros(2)}), r"1 unexpected \(qformer.extra\)"),
        (lambda t: t.update(query_tokens=torch.zeros(1, 3, 4)), r"1 mismatched \(query_tokens\)"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, message: str, folder: Path, tmp_path: Path):
    with pytest.raises(CheckpointError, match=message):
        HuggingFaceReference.open(changed(folder, tmp_path / "changed", change))


def test_a_folder_that_is_no_checkpoint_says_so(tmp_path: Path):
    with pytest.raises(CheckpointError, match="cannot be loaded as Blip2ForImageTextRetrieval"):
        HuggingFaceReference.open(tmp_path)


def test_without_transformers_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UnavailableError, match=r"pip install 'qpert\[hf\]'"):
        HuggingFaceReference.open(tmp_path)


def test_a_lavis_checkpoint_gives_the_stock_model_its_numbers(folder: Path, inputs: dict[str, torch.Tensor]):
    """The stock folder, read under LAVIS's names and written back under Hugging Face's, is the same model."""
    with open_checkpoint(str(folder)) as checkpoint:
        rebuilt = HuggingFaceReference.from_lavis(checkpoint.tensors, checkpoint.config, stages="both")
    stock = HuggingFaceReference.open(folder, stages="both")
    vision, texts = arrays(inputs)
    embeds = stock.run("vision", vision)
    objects = boxes(embeds["image_embeds"].shape[1], 2.0)
    named = {"vision": vision, "image_query": embeds | objects, "text": texts, "itm": pairs(embeds, texts) | objects}
    for graph, given in named.items():
        (found,), (expected,) = (list(reference.run(graph, given).values()) for reference in (rebuilt, stock))
        # The stock model's random bias of the keys is lost: softmax does not see it, rounding does.
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5, err_msg=graph)


def test_a_lavis_file_is_a_reference_too(tmp_path: Path):
    """Position ids and the temperature are no parameters of the stock model; LAVIS's eps after the blocks is kept."""
    path = small_lavis.save(tmp_path / "small.pth", small_lavis.random_state() | small_lavis.unused_state())
    with open_checkpoint(str(path), options=small_lavis.HEADS) as checkpoint:
        model = HuggingFaceReference.from_lavis(checkpoint.tensors, checkpoint.config).model
        torch.testing.assert_close(model.query_tokens.data, checkpoint.tensors.get("query_tokens"))
        q_bias, v_bias = (checkpoint.tensors.get(f"visual_encoder.blocks.1.attn.{kind}_bias") for kind in "qv")
    bias = model.vision_model.encoder.layers[1].self_attn.qkv.bias.data
    torch.testing.assert_close(bias, torch.cat([q_bias, torch.zeros_like(q_bias), v_bias]))
    assert model.vision_model.post_layernorm.eps == checkpoint.config.ln_vision_eps


def test_lavis_tensors_that_are_missing_are_named(tmp_path: Path):
    state = small_lavis.random_state()
    del state["itm_head.bias"]
    with pytest.raises(CheckpointError, match=r"nothing for 1 parameters .*: itm_head\.bias"):
        HuggingFaceReference.from_lavis(_Named(state), small_lavis.EVA)


def test_clip_has_no_stock_hugging_face_model():
    with pytest.raises(UnavailableError, match=r"no vision transformer of the 'clip' family.*--reference lavis"):
        HuggingFaceReference.from_lavis(_Named(small_lavis.random_state(small_lavis.CLIP)), small_lavis.CLIP)


class _Named(dict[str, torch.Tensor]):
    def names(self) -> set[str]:
        return set(self)

    def get(self, name: str) -> torch.Tensor:  # type: ignore[override]
        return self[name]
