"""From a checkpoint that stock LAVIS saved to a bundle in ONNX Runtime, against LAVIS's own functions and rankings."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from qpert.exporter.export import ExportRequest, export_bundle
from qpert.exporter.families.declare import Limits
from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.cli import run
from qpert.runtime.retrieval.encoder import Encoder
from qpert.runtime.retrieval.scores import final_scores, itc_scores, ranking

pytestmark = pytest.mark.lavis

EMBEDDING = {"rtol": 0, "atol": 1e-5}  # float32 sums in another order
FEATURES = {"rtol": 0, "atol": 4e-5}  # magnitude up to 6; stock LAVIS itself lies 2.0e-5 from float64
MATCH = {"rtol": 0, "atol": 1e-4}
NOT_RERANKED = -100.0  # LAVIS compute_sim_matrix


@pytest.fixture(scope="module", params=["eva", "clip"])
def folder(lavis_folder: Path, request: pytest.FixtureRequest) -> Path:
    return lavis_folder / request.param


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "expected.safetensors")


@pytest.fixture(scope="module")
def bundle(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    described = json.loads((folder / "config.json").read_text())
    heads = {"vision_heads": described["vision"]["heads"], "qformer_heads": described["qformer"]["heads"]}
    request = ExportRequest(
        family="blip2",
        checkpoint=str(folder / "checkpoint.pth"),
        tokenizer=str(folder / "vocab.txt"),
        out=tmp_path_factory.mktemp("lavis-bundle") / "bundle",
        options=heads,
        limits=Limits(batch=24, texts=36),
    )
    return export_bundle(request)


@pytest.fixture(scope="module")
def encoder(bundle: Bundle) -> Iterator[Encoder]:
    encoder = Encoder(bundle, "cpu")
    yield encoder
    encoder.close()


@pytest.fixture(scope="module")
def found(encoder: Encoder, expected: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Our graphs on LAVIS's pixels and token ids: 24 images, 36 texts."""
    outputs = encoder.sessions["vision"].run({"pixel_values": expected["pixel_values"]})
    features = outputs["image_embeds"]
    boxes = {
        "object_masks": np.zeros((len(features), 0, features.shape[1]), np.float32),
        "box_weights": np.zeros((len(features), 0), np.float32),
    }
    outputs |= encoder.sessions["image_query"].run({"image_embeds": features} | boxes)
    texts = {name: expected[name] for name in ("input_ids", "attention_mask")}
    outputs |= encoder.sessions["text"].run(texts)
    pairs = {name: np.ascontiguousarray(np.broadcast_to(ids, (24, *ids.shape))) for name, ids in texts.items()}
    return outputs | encoder.sessions["itm"].run({"image_embeds": features} | pairs)


@pytest.mark.parametrize(
    ("name", "limit"), [("image_embeds", FEATURES), ("query_embeds", EMBEDDING), ("text_embeds", EMBEDDING)]
)
def test_embeddings_are_lavis_embeddings(
    name: str, limit: dict[str, float], found: dict[str, np.ndarray], expected: dict[str, np.ndarray]
) -> None:
    np.testing.assert_allclose(found[name], expected[name], **limit)


def test_itc_scores_are_lavis_scores(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    scores = itc_scores(found["query_embeds"], found["text_embeds"])
    np.testing.assert_allclose(scores, expected["itc_scores"], **EMBEDDING)


def test_itm_scores_are_lavis_compute_itm(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    np.testing.assert_allclose(found["itm_scores"], expected["itm_scores"], **MATCH)


def test_captions_become_the_token_ids_that_lavis_makes(
    encoder: Encoder, folder: Path, expected: dict[str, np.ndarray]
) -> None:
    # LAVIS cleans captions in its data set classes; here it was given them raw, so only those without . ! " … compare.
    captions = json.loads((folder / "texts.json").read_text())
    plain = [number for number, caption in enumerate(captions) if "." not in caption]
    tokens = encoder.tokenizer.encode([captions[number] for number in plain])
    lengths = expected["attention_mask"][plain].sum(axis=1)
    np.testing.assert_array_equal(tokens.attention_mask.sum(axis=1), lengths)
    for row, length, ids in zip(tokens.input_ids, lengths, expected["input_ids"][plain], strict=True):
        np.testing.assert_array_equal(row[:length], ids[:length])
    assert len(plain) > 5


@pytest.mark.parametrize("k", [8, 24, 40])
def test_rankings_are_those_of_compute_sim_matrix(
    k: int, found: dict[str, np.ndarray], expected: dict[str, np.ndarray]
) -> None:
    # 8: fewer than the candidates; 24: as many as there are images; 40: more than either (LAVIS raises there, and
    # `all` is its matrix with every candidate re-ranked).
    itc = itc_scores(found["query_embeds"], found["text_embeds"])
    final = final_scores(found["itm_scores"], itc)
    name = f"k{k}" if k <= 24 else "all"
    for direction, by_itc, by_final in (("i2t", itc, final), ("t2i", itc.T, final.T)):
        stock = expected[f"{name}.{direction}"]
        for row in range(len(stock)):
            ours = np.full(by_itc.shape[1], NOT_RERANKED, np.float32)
            shortlist = ranking(by_itc[row])[:k]
            ours[shortlist] = by_final[row][shortlist]
            np.testing.assert_array_equal(ranking(ours), ranking(stock[row]))
            np.testing.assert_allclose(ours, stock[row], **MATCH)


def test_verify_with_lavis_as_reference_passes(
    folder: Path, bundle: Bundle, copy_of, edit_manifest, capsys: pytest.CaptureFixture
) -> None:
    if folder.name != "eva":
        pytest.skip("one family shows the command; the other's numbers are compared above")

    def shorten(manifest: dict) -> None:  # the largest batches of this profile take a minute
        for graph in manifest["graphs"].values():
            for axis in graph["ranges"].keys() & {"B", "I", "T"}:
                graph["ranges"][axis]["max"] = 3

    small = copy_of(bundle.folder)
    edit_manifest(small, shorten)
    code = run(["verify", str(small), "--reference", "lavis", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert (code, report["verdict"], report["reference"]) == (0, "pass", "lavis")
