"""CoCa folders of stock open_clip to bundles that search, held against stock from the picture files and captions on."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from coca_models import SHAPES, TEXTS
from PIL import Image
from safetensors.numpy import load_file

from qpert.exporter.export import ExportRequest, export_bundle
from qpert.exporter.families.coca.reference_open_clip import OpenClipReference
from qpert.exporter.families.declare import Limits
from qpert.runtime import Boxes, Retriever
from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.cli import run
from qpert.runtime.errors import InputError
from qpert.runtime.inputs.images import preprocess_images
from qpert.runtime.inputs.perturbation import Perturbation, box_inputs
from qpert.runtime.sessions.open import open_sessions

pytestmark = [pytest.mark.open_clip, pytest.mark.slow]
CLOSE = 1e-5
"""Vectors of length 1, through the same float32 operations in another order."""
SETTINGS = Perturbation(alpha=0.8, threshold=0.9)


def exported(folder, out, settings=SETTINGS, **options):
    limits = Limits(batch=3, boxes=6, texts=7)
    return export_bundle(
        ExportRequest("coca", str(folder), out, perturbation=settings, limits=limits, options=options)
    ).folder


@pytest.fixture(scope="module", params=SHAPES)
def case(request, coca_folder, made_once):
    """(folder of stock, bundle) of every shape."""
    folder = coca_folder / request.param
    return folder, made_once(f"coca-bundle-{request.param}", lambda out: exported(folder, out))


@pytest.fixture(scope="module")
def bundle(coca_folder, made_once):
    return made_once("coca-bundle-a", lambda out: exported(coca_folder / "a", out))


def opened_stock(folder, size=None, settings=SETTINGS, **preprocess):
    values = json.loads((folder / "open_clip_config.json").read_text())
    name = "open_clip_model.safetensors"
    file = folder / (name if (folder / name).is_file() else "open_clip_pytorch_model.bin")
    model = values["model_cfg"]
    size = size or model["vision_cfg"]["image_size"]
    choices = {key: getattr(settings, key) for key in ("threshold", "preserve_norm")}
    return OpenClipReference.open(file, model, values["preprocess_cfg"] | preprocess, image_size=size, **choices)


def padded_ids(reference, captions, length):
    rows = reference.token_ids(captions, length)
    ids = np.zeros((len(rows), length), np.int64)
    for row, tokens in zip(ids, rows, strict=True):
        row[: len(tokens)] = tokens
    return ids


def test_vectors_scores_and_ranks_are_those_of_stock_from_the_files_on(case, photos, photo_boxes):
    folder, made = case
    with Retriever.open(made) as retriever:
        plain = retriever.encode_images(photos).query_embeds
        with_boxes = retriever.encode_images(photos, boxes=photo_boxes).query_embeds
        texts = retriever.encode_texts(TEXTS)
        length = retriever.encoder.manifest.tokenizer.max_length
        masks, weights = box_inputs(photo_boxes, SETTINGS, retriever.encoder.manifest.token_grid)
    assert not masks[:, :, 0].any(), "no box covers CLS"
    with opened_stock(folder) as stock:
        tokens = stock.run("vision", {"pixel_values": np.stack([stock.pixels(photo) for photo in photos])})
        images = stock.run("image_query", tokens)["query_embeds"]
        moved = stock.run("image_query", tokens | {"object_masks": masks, "box_weights": weights})["query_embeds"]
        expected = stock.run("text", {"input_ids": padded_ids(stock, TEXTS, length)})["text_embeds"]
    np.testing.assert_allclose(plain, images, rtol=0, atol=CLOSE)
    np.testing.assert_allclose(with_boxes, moved, rtol=0, atol=CLOSE)
    np.testing.assert_allclose(texts, expected, rtol=0, atol=CLOSE)
    assert np.abs(moved - images).max() > 1e-3, "boxes that change nothing would show nothing"
    ours, theirs = plain[:, 0] @ texts.T, images[:, 0] @ expected.T
    for axis in (0, 1):
        assert np.diff(np.sort(theirs, axis=axis), axis=axis).min() > 2 * CLOSE, "ranks that rounding could swap"
        np.testing.assert_array_equal(np.argsort(-ours, axis=axis), np.argsort(-theirs, axis=axis))


def test_vectors_equal_those_that_stocks_own_encoders_gave(case):
    """Recorded by `encode_image` and `encode_text`, not by parts put together; texts also without their padding."""
    folder, made = case
    recorded = load_file(folder / "expected.safetensors")
    sessions = open_sessions(Bundle.open(made), threads=1)
    tokens = sessions["vision"].run({"pixel_values": recorded["pixel_values"]})["image_embeds"]
    none = {"object_masks": np.zeros((3, 0, tokens.shape[1]), np.float32), "box_weights": np.zeros((3, 0), np.float32)}
    images = sessions["image_query"].run({"image_embeds": tokens} | none)["query_embeds"][:, 0]
    np.testing.assert_allclose(images, recorded["query_embeds"], rtol=0, atol=CLOSE)
    ids = recorded["input_ids"]
    texts = sessions["text"].run({"input_ids": ids})["text_embeds"]
    np.testing.assert_allclose(texts, recorded["text_embeds"], rtol=0, atol=CLOSE)
    for row, expected in zip(ids, recorded["text_embeds"], strict=True):
        shortest = int(np.flatnonzero(row)[-1]) + 1
        cut = sessions["text"].run({"input_ids": row[None, :shortest]})["text_embeds"][0]
        np.testing.assert_allclose(cut, expected, rtol=0, atol=CLOSE)
    for session in sessions.values():
        session.close()


@pytest.mark.parametrize("reference", ["recorded", "open_clip"])
def test_it_verifies_tensor_by_tensor(case, reference, capsys):
    _, made = case
    assert run(["verify", str(made), "--reference", reference, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    names = [gate["name"] for gate in found["gates"]]
    assert found["reference"] == reference
    assert {"preprocessing: max abs difference", "tokenizer: captions with other ids"} <= set(names)
    assert not any(name.startswith("itm") for name in names)


def test_pixels_equal_stocks_of_every_shape_of_picture(coca_folder, tmp_path):
    """Odd and even remainders of the crop, tall and wide, enlarged and reduced: bit for bit, grey pictures too."""
    random = np.random.default_rng(0)
    files = []
    for number, size in enumerate([(49, 49), (50, 49), (52, 49), (101, 60), (60, 103), (30, 47), (200, 51), (97, 98)]):
        picture = Image.fromarray(random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
        picture = picture.convert("L") if number % 4 == 3 else picture
        picture.save(tmp_path / f"{number}.png")
        files.append(tmp_path / f"{number}.png")
    from qpert.exporter.checkpoints.checkpoint import no_progress
    from qpert.exporter.families.coca.checkpoint import CocaOptions, open_checkpoint

    for shape, resize in (("a", None), ("a", "squash"), ("b", None), ("c", None)):
        options = CocaOptions(resize=resize)
        with open_checkpoint(
            str(coca_folder / shape), image_size=None, options=options, progress=no_progress
        ) as checkpoint:
            found = preprocess_images(files, checkpoint.preprocessing)
        overlay = {"resize_mode": resize} if resize else {}
        with opened_stock(coca_folder / shape, **overlay) as stock:
            np.testing.assert_array_equal(found, np.stack([stock.pixels(file) for file in files]))


def test_another_image_size_and_squash_are_recorded_and_verified_against_stock(coca_folder, tmp_path, capsys):
    out, source = tmp_path / "bundle", str(coca_folder / "a")
    small = ["--max-batch", "2", "--max-boxes", "2", "--max-text", "2"]
    options = ["--checkpoint", source, "--out", str(out), "--image-size", "70", "--resize", "squash"]
    assert run(["export", "coca", *options, *small]) == 0
    manifest = Bundle.open(out).manifest
    assert (manifest.preprocessing.fit, manifest.preprocessing.size, manifest.patches) == ("squash", 70, (10, 10))
    assert (manifest.prefix_tokens, manifest.perturbation.alpha) == (1, 0.2)
    assert "--resize squash" in " ".join(manifest.notes)
    capsys.readouterr()
    assert run(["verify", str(out), "--reference", "open_clip"]) == 0


def test_boxes_are_carried_through_the_crop(bundle):
    """49 px of a picture 98 × 49: the crop is columns 24.5 to 73.5, rounded half to even to 24."""
    with Retriever.open(bundle) as retriever:
        grid = retriever.encoder.manifest.token_grid
        boxes = [Boxes([[0, 0, 24, 49], [24, 0, 31, 7], [66, 42, 98, 49]], (98, 49))]
        masks, _ = box_inputs(boxes, SETTINGS, grid)
    cells = masks[0, :, 1:].reshape(3, 7, 7)
    assert not cells[0].any(), "left of the crop"
    assert cells[1].sum() == 1
    assert cells[1, 0, 0] == 1
    assert cells[2].sum() == 1
    assert cells[2, 6, 6] == 1


def test_it_is_indexed_and_searched_by_itc_and_says_why_it_cannot_re_rank(bundle, tmp_path, capsys):
    gallery = tmp_path / "gallery"
    boxes = ["--boxes", "examples/photos/boxes.jsonl"]
    assert run(["index", str(bundle), "examples/photos", "--out", str(gallery), *boxes]) == 0
    capsys.readouterr()
    assert run(["search", str(gallery), "wow!§ cat", "--json"]) == 0
    hits = json.loads(capsys.readouterr().out)["hits"]
    assert len(hits) == 4
    assert all(hit["itm"] is None and hit["score"] == hit["itc"] for hit in hits)
    assert run(["search", str(gallery), "a cat", "--rerank", "3"]) == 2
    assert "needs a pair scorer" in capsys.readouterr().err
    assert run(["eval", str(bundle), "--dataset", "demo", "--limit", "4", "--rerank", "3"]) == 2
    with Retriever.open(bundle) as retriever, pytest.raises(InputError) as caught:
        retriever.itm_scores(retriever.encode_images(["examples/photos/chelsea.jpg"]), ["a cat"])
    assert caught.value.code == "no-pair-scorer"


def test_it_evaluates_and_calibrates_on_the_papers_small_grid(bundle, tmp_path, capsys):
    assert run(["eval", str(bundle), "--dataset", "demo", "--limit", "6", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["itm_pairs"], found["rerank"]) == (0, 0)
    arguments = [
        "calibrate",
        str(bundle),
        "--dataset",
        "demo",
        "--limit",
        "6",
        "--weights",
        "constant",
        "--score",
        "r1",
    ]
    assert run([*arguments, "--thresholds", "0.9", "--reductions", "mean", "--threads", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["grid"]["alphas"] == [0.2, 0.4, 0.6, 0.8, 1.0]


def test_it_is_quantised_and_the_result_evaluates(bundle, tmp_path, capsys):
    out = tmp_path / "int8"
    arguments = ["quantize", str(bundle), "--out", str(out), "--samples", "16", "--limit", "16", "--no-sensitivity"]
    limits = ["--max-drop", "100", "--min-agreement", "0", "--reduce-range"]  # 7 bits: the same on CPUs without VNNI
    assert run([*arguments, *limits, "--graphs", "vision,text"]) == 0
    assert Bundle.open(out).manifest.quantization is not None
    assert run(["verify", str(out)]) == 0
    assert run(["eval", str(out), "--dataset", "demo", "--limit", "4"]) == 0


def test_it_is_benchmarked_against_pytorch(bundle):
    assert run(["bench", str(bundle), "--repeats", "3", "--batch", "1", "--boxes", "0,2", "--baseline", "torch"]) == 0


def test_engines_are_built_of_every_graph_without_a_gpu(bundle, capsys):
    pytest.importorskip("tensorrt_rtx")
    assert run(["build", str(bundle), "--flavor", "rtx", "--target", "sm89", "--json"]) == 0
    built = json.loads(capsys.readouterr().out)["engines"]
    assert [engine["graph"] for engine in built] == ["vision", "image_query", "text"]
    assert all(engine["bytes"] > 0 for engine in built)


def test_ranks_agree_with_stock_on_scenes(bundle, capsys):
    arguments = ["verify", str(bundle), "--level", "rank", "--reference", "open_clip", "--limit", "6", "--json"]
    assert run(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ranks"]["t2i"]["top1_agreement"] == 100


def test_half_precision_is_exported_and_verified(coca_folder, tmp_path):
    out = tmp_path / "half"
    options = ["--checkpoint", str(coca_folder / "a"), "--out", str(out), "--precision", "fp16"]
    assert run(["export", "coca", *options, "--max-batch", "2", "--max-boxes", "2", "--max-text", "2"]) == 0
    assert run(["verify", str(out)]) == 0


def test_a_checkpoint_that_stock_rejects_and_a_missing_environment_are_errors_in_words(
    coca_folder, tmp_path, monkeypatch
):
    from qpert.runtime.errors import CheckpointError, UnavailableError

    values = json.loads((coca_folder / "a" / "open_clip_config.json").read_text())["model_cfg"]
    torch.save({"logit_scale": torch.tensor(0.0)}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="tensors are missing") as caught:
        OpenClipReference.open(tmp_path / "x.pt", values, {}, image_size=49)
    assert caught.value.code == "checkpoint-rejected-by-open-clip"
    monkeypatch.setenv("QPERT_OPEN_CLIP_PYTHON", str(tmp_path / "python"))
    with pytest.raises(UnavailableError, match="make open-clip-env") as missing:
        OpenClipReference.open(Path("x.pt"), values, {}, image_size=49)
    assert missing.value.code == "open-clip-environment-missing"
