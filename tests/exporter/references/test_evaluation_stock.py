"""The evaluation against somebody else's: stock Hugging Face pair by pair, PyTorch in LAVIS's order, stock LAVIS."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from evaluation_sets import write_annotation, write_set
from safetensors.numpy import load_file
from stock_models import small_hf_folder, small_tokenizer

from qpert.exporter.export import ExportRequest, export_bundle
from qpert.exporter.families.blip2.reference_huggingface import HuggingFaceReference
from qpert.exporter.families.declare import Limits
from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.evaluation.evaluate import evaluate
from qpert.runtime.evaluation.inputs import open_data
from qpert.runtime.evaluation.pair_scores import PairScores
from qpert.runtime.evaluation.schedule import Schedule
from qpert.runtime.inputs.images import preprocess_images
from qpert.runtime.inputs.perturbation import Perturbation
from qpert.runtime.retrieval.encoder import Encoder
from qpert.runtime.retrieval.scores import ranking

pytestmark = pytest.mark.slow

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
MATCH = {"rtol": 0, "atol": 1e-4}  # the contract for float32 graphs
IMAGES = 8
CAPTIONS = [  # words and letters of the stock model's vocabulary, so that every one is another sequence
    [f"a {size} {colour} {thing} {place} {chr(98 + image)}" for size, place in (("small", "near water"), ("large", ""))]
    for image, (colour, thing) in enumerate(
        zip(("red", "green", "blue") * 3, ("dog", "cat", "boat", "kite", "ball", "tree", "car", "bird"), strict=False)
    )
]


@pytest.fixture(scope="module")
def stock_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight pictures with two captions each."""
    root = write_set(tmp_path_factory.mktemp("stock-set") / "set", images=IMAGES)
    names = [f"flickr30k-images/{image:04d}.png" for image in range(IMAGES)]
    entries = [{"image": name, "caption": texts} for name, texts in zip(names, CAPTIONS, strict=True)]
    write_annotation(root, entries)
    return root


@pytest.fixture(scope="module")
def stock_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_hf_folder(tmp_path_factory.mktemp("stock-model"), "a")


@pytest.fixture(scope="module")
def stock_bundle(stock_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("stock-bundle") / "bundle"
    request = ExportRequest(
        "blip2", str(stock_folder), out, perturbation=Perturbation(stages="none"), limits=Limits(texts=5), samples=2
    )
    return export_bundle(request)


@torch.no_grad()
def stock_scores(folder: Path, root: Path, bundle: Bundle) -> tuple[np.ndarray, np.ndarray]:
    """ITC and ITM [B, T] by the stock model's own forward, one image with one text, stock tokenizer."""
    model, tokenizer = HuggingFaceReference.open(folder).model, small_tokenizer()
    data = open_data(root, boxes="none")
    pixels = torch.from_numpy(preprocess_images(data.dataset.images, bundle.manifest.preprocessing))
    found = np.empty((2, IMAGES, len(data.dataset.captions)), np.float32)
    for text, caption in enumerate(data.dataset.captions):
        tokens = tokenizer([caption], return_tensors="pt")
        inputs = {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask}
        for image in range(IMAGES):
            one = pixels[image : image + 1]
            itc = model(one, **inputs, use_image_text_matching_head=False).logits_per_image
            itm = model(one, **inputs, use_image_text_matching_head=True).logits_per_image
            found[:, image, text] = itc[0, 0], itm[0, 1]
    return found[0], found[1]


@pytest.mark.parametrize("rerank", [3, 64])
def test_ranks_and_recall_are_those_of_stock_hugging_face_pair_by_pair(
    stock_set: Path, stock_folder: Path, stock_bundle: Bundle, rerank: int
) -> None:
    encoder = Encoder(stock_bundle, "cpu", threads=1)
    found = evaluate(encoder, open_data(stock_set, boxes="none"), rerank=rerank)
    encoder.close()
    itc, itm = stock_scores(stock_folder, stock_set, stock_bundle)
    np.testing.assert_allclose(found.scores.itc, itc, **MATCH)
    images, texts = np.divmod(found.scores.schedule.keys, itc.shape[1])
    np.testing.assert_allclose(found.scores.itm, itm[images, texts], **MATCH)
    owners, ranks = found.data.dataset.image_of_caption, {"t2i": [], "i2t": []}
    for text, owner in enumerate(owners):
        order = in_order(itc[:, text], itm[:, text], rerank)
        np.testing.assert_array_equal(found.scores.images_for(text), order)
        ranks["t2i"].append(int(np.flatnonzero(order == owner)[0]))
    for image in range(IMAGES):
        order = in_order(itc[image], itm[image], rerank)
        np.testing.assert_array_equal(found.scores.texts_for(image), order)
        ranks["i2t"].append(int(np.flatnonzero(owners[order] == image)[0]))
    for name, way in (("t2i", found.metrics.t2i), ("i2t", found.metrics.i2t)):
        assert way.recall == {cut: 100 * np.mean(np.array(ranks[name]) < cut) for cut in (1, 5, 10)}


def in_order(itc: np.ndarray, itm: np.ndarray, rerank: int) -> np.ndarray:
    """Candidates best first: the top by ITC re-ranked, then the rest."""
    first = np.argsort(-itc, kind="stable")
    top = first[:rerank]
    return np.concatenate([top[np.argsort(-(itm[top] + itc[top]), kind="stable")], first[rerank:]])


@pytest.fixture(scope="module")
def parity() -> ModuleType:
    """`benchmarks/evaluation_parity.py`, which does the same with 200 and with 1,000 images."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location("evaluation_parity", BENCHMARKS / "evaluation_parity.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCHMARKS))
    return module


def test_the_demonstration_ranks_as_pytorch_does_in_lavis_order(demo_bundle: Path, parity: ModuleType) -> None:
    bundle, data, k = Bundle.open(demo_bundle), open_data("demo", limit=20), 10
    with torch.inference_mode():
        i2t, t2i = parity.PairByPair(bundle, data, padded=True).matrices(k)
    encoder = Encoder(bundle, "cpu", threads=1)
    evaluation = evaluate(encoder, data, rerank=k)
    encoder.close()
    found = parity.compare(evaluation, i2t, t2i)
    assert found["largest_recall_difference"] == 0
    assert found["queries_with_another_rank"] == {"t2i": 0, "i2t": 0}
    assert found["queries_with_another_top_ten"] == {"t2i": 0, "i2t": 0}
    assert found["largest_score_difference"] < 1e-4
    assert found["qpert"]["t2i"]["r1"] < 100, "nothing but first places would show little"


@pytest.mark.lavis
@pytest.mark.parametrize("family", ["eva", "clip"])
@pytest.mark.parametrize("name", ["k8", "k24", "all"])
def test_the_schedule_gives_the_rankings_of_lavis_compute_sim_matrix(
    lavis_folder: Path, family: str, name: str
) -> None:
    # LAVIS's own ITC and ITM scores, so that only the schedule is compared. `all` is what a k beyond the candidates
    # has to give (LAVIS itself raises there).
    expected = load_file(lavis_folder / family / "expected.safetensors")
    itc, itm = expected["itc_scores"], expected["itm_scores"]
    schedule = Schedule.plan(itc, {"k8": 8, "k24": 24, "all": 40}[name])
    images, texts = np.divmod(schedule.keys, itc.shape[1])
    scores = PairScores(itc, schedule, itm[images, texts])
    shown = {"i2t": schedule.by_image.shape[1], "t2i": schedule.by_text.shape[1]}
    for image, row in enumerate(expected[f"{name}.i2t"]):
        np.testing.assert_array_equal(scores.texts_for(image)[: shown["i2t"]], ranking(row)[: shown["i2t"]])
        np.testing.assert_allclose(scores.i2t_scores[image], row[schedule.by_image[image]], rtol=0, atol=1e-5)
    for text, row in enumerate(expected[f"{name}.t2i"]):
        np.testing.assert_array_equal(scores.images_for(text)[: shown["t2i"]], ranking(row)[: shown["t2i"]])
