"""From a stock Hugging Face folder to a bundle in ONNX Runtime, against the stock model's own forward."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from stock_models import SHAPES, small_hf_folder, small_inputs

from qpert.exporter.export import ExportRequest, export_bundle
from qpert.exporter.families.blip2.reference_huggingface import HuggingFaceReference
from qpert.exporter.references.open import live_samples
from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.inputs.perturbation import Perturbation
from qpert.runtime.retrieval.encoder import Encoder
from qpert.runtime.retrieval.scores import itc_scores
from qpert.runtime.verification import verify_tensors

pytestmark = pytest.mark.slow

CLOSE = {"rtol": 0, "atol": 1e-4}  # the contract for fp32 graphs; measured here: below 1e-5


@pytest.fixture(scope="module", params=sorted(SHAPES))
def shape(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(shape: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_hf_folder(tmp_path_factory.mktemp("stock"), shape)


@pytest.fixture(scope="module")
def bundle(folder: Path) -> Bundle:
    choices = {"preserve_norm": folder.name.startswith("hf-c"), "centre_keys": folder.name.startswith("hf-b")}
    settings = Perturbation.paper(stages="both", **choices)
    return export_bundle(
        ExportRequest("blip2", checkpoint=str(folder), out=folder.parent / "bundle", perturbation=settings)
    )


@pytest.fixture(scope="module")
def encoder(bundle: Bundle) -> Iterator[Encoder]:
    encoder = Encoder(bundle, "cpu")
    yield encoder
    encoder.close()


@pytest.fixture(scope="module")
def inputs(shape: str) -> dict[str, torch.Tensor]:
    return small_inputs(shape, images=4, texts=4)


def no_boxes(features: np.ndarray) -> dict[str, np.ndarray]:
    count, tokens, _ = features.shape
    return {"object_masks": np.zeros((count, 0, tokens), np.float32), "box_weights": np.zeros((count, 0), np.float32)}


def test_itc_scores_are_those_of_the_stock_forward(
    encoder: Encoder, folder: Path, inputs: dict[str, torch.Tensor]
) -> None:
    stock = HuggingFaceReference.open(folder).model(**inputs, use_image_text_matching_head=False)
    features = encoder.sessions["vision"].run({"pixel_values": inputs["pixel_values"].numpy()})["image_embeds"]
    queries = encoder.sessions["image_query"].run({"image_embeds": features} | no_boxes(features))["query_embeds"]
    texts = {name: inputs[name].numpy() for name in ("input_ids", "attention_mask")}
    scores = itc_scores(queries, encoder.sessions["text"].run(texts)["text_embeds"])
    np.testing.assert_allclose(scores, stock.logits_per_image.numpy(), **CLOSE)
    assert scores.std() > 0.01, "scores that hardly differ would show nothing"


def test_itm_scores_are_those_of_the_stock_forward(
    encoder: Encoder, folder: Path, inputs: dict[str, torch.Tensor]
) -> None:
    features = encoder.sessions["vision"].run({"pixel_values": inputs["pixel_values"].numpy()})["image_embeds"]
    texts = {
        name: np.ascontiguousarray(np.broadcast_to(inputs[name].numpy(), (4, *inputs[name].shape)))
        for name in ("input_ids", "attention_mask")
    }
    found = encoder.sessions["itm"].run({"image_embeds": features} | texts | no_boxes(features))["itm_scores"]
    stock = HuggingFaceReference.open(folder).model
    for shift in range(4):  # the stock forward takes image i with text i
        shifted = {name: value.roll(-shift, 0) for name, value in inputs.items() if name != "pixel_values"}
        logits = stock(inputs["pixel_values"], **shifted, use_image_text_matching_head=True).logits_per_image
        np.testing.assert_allclose([found[i, (i + shift) % 4] for i in range(4)], logits[:, 1].numpy(), **CLOSE)


def test_perturbed_outputs_are_the_papers_formula_on_the_stock_network(bundle: Bundle, encoder: Encoder) -> None:
    samples = bundle.samples()
    live = live_samples(bundle.manifest, "hf", None, samples, seed=5)
    cases = live.cases
    verification = verify_tensors(encoder, cases, live, reference="hf", provider="cpu")
    assert verification.passed, [gate for gate in verification.gates if not gate.passed]
    moved = {case.name: case.expected["query_embeds"] for case in cases if case.graph == "image_query"}
    assert np.abs(moved["many_boxes"] - moved["no_boxes"]).max() > 0.01, "boxes that change nothing would show nothing"
