"""CLIP and SigLIP folders to bundles that search: every command on a bundle without a pair scorer."""

import json
import shutil

import numpy as np
import pytest
import torch
from evaluation_sets import write_set
from PIL import Image
from safetensors.numpy import load_file, save_file
from tower_folders import FIXTURES, clip_folder, siglip_folder
from transformers import AutoModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from qpert.exporter.export import ExportRequest, export_bundle
from qpert.exporter.families.declare import Limits
from qpert.runtime import Boxes, Retriever
from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.cli import run
from qpert.runtime.errors import GalleryError, InputError
from qpert.runtime.inputs.perturbation import Perturbation

pytestmark = pytest.mark.slow

CASES = [("clip", "a"), ("clip", "b"), ("clip", "c"), ("siglip", "a"), ("siglip", "b"), ("siglip", "c")]
TEXTS = ["the dogs on a table", "a cat", "two birds, red and blue!"]
SHORT = {"a": 60, "b": None, "c": 14}
"""The shortest side before CLIP's crop; None crops the longer side alone."""


def make_folder(family, shape, folder):
    return clip_folder(folder, shape, short=SHORT[shape]) if family == "clip" else siglip_folder(folder, shape)


def settings(family):
    return Perturbation(stages="none") if family == "clip" else Perturbation(alpha=2.0, threshold=0.9)


@pytest.fixture(scope="module", params=CASES, ids=["-".join(case) for case in CASES])
def exported(request, tmp_path_factory):
    """(family, Hugging Face folder, bundle) of every shape."""
    family, shape = request.param
    folder = make_folder(family, shape, tmp_path_factory.mktemp("hub"))
    out = tmp_path_factory.mktemp("bundle") / "bundle"
    limits = Limits(batch=3, boxes=6, texts=5)
    asked = ExportRequest(family, str(folder), out, perturbation=settings(family), limits=limits)
    return family, folder, export_bundle(asked).folder


@pytest.fixture(scope="module")
def clip_bundle(tmp_path_factory):
    folder = clip_folder(tmp_path_factory.mktemp("hub"), "a", short=60)
    asked = ExportRequest(
        "clip",
        str(folder),
        tmp_path_factory.mktemp("bundle") / "bundle",
        perturbation=Perturbation(stages="none"),
        limits=Limits(batch=3, boxes=6, texts=5),
    )
    return export_bundle(asked).folder


def stock_tokens(family, folder):
    """The captions with the stock tokenizer's ids; SentencePiece's as recorded (fixtures/siglip/record.py)."""
    if family == "clip":
        from transformers import CLIPTokenizer

        return TEXTS, CLIPTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt").input_ids
    rows = json.loads((FIXTURES / "captions.json").read_text(encoding="utf-8"))["plain"]
    usable = [(caption, ids) for caption, ids in rows if len(ids) > 1][:8]
    return [caption for caption, _ in usable], torch.tensor([ids + [1] * (64 - len(ids)) for _, ids in usable])


def stock_itc(family, folder, photos):
    """Captions, and ITC [B, T] by the stock model, processor and tokenizer, from the picture files and raw texts."""
    model = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    processor = (CLIPImageProcessorPil if family == "clip" else SiglipImageProcessorPil).from_pretrained(folder)
    pixels = processor(images=[Image.open(photo) for photo in photos], return_tensors="pt").pixel_values
    captions, ids = stock_tokens(family, folder)
    with torch.no_grad():
        images = model.get_image_features(pixel_values=pixels).pooler_output
        texts = model.get_text_features(input_ids=ids).pooler_output
    images, texts = (torch.nn.functional.normalize(each, dim=-1) for each in (images, texts))
    return captions, (images @ texts.T).numpy()


def test_scores_and_ranks_are_those_of_the_stock_model_from_the_files_on(exported, photos):
    family, folder, bundle = exported
    captions, expected = stock_itc(family, folder, photos)
    with Retriever.open(bundle) as retriever:
        features = retriever.encode_images(photos)
        found = retriever.itc_scores(features.query_embeds, retriever.encode_texts(captions))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    np.testing.assert_array_equal(
        np.argsort(-found, axis=0, kind="stable"), np.argsort(-expected, axis=0, kind="stable")
    )
    np.testing.assert_array_equal(
        np.argsort(-found, axis=1, kind="stable"), np.argsort(-expected, axis=1, kind="stable")
    )


@pytest.mark.parametrize("reference", ["recorded", "torch", "hf"])
def test_it_verifies_tensor_by_tensor(exported, reference, capsys):
    _, _, bundle = exported
    assert run(["verify", str(bundle), "--reference", reference, "--json"]) == 0
    names = [gate["name"] for gate in json.loads(capsys.readouterr().out)["gates"]]
    assert not any(name.startswith("itm") for name in names)
    assert any("preprocessing" in name for name in names)


def test_it_ranks_and_recalls_as_stock_does(clip_bundle, capsys):
    arguments = ["verify", str(clip_bundle), "--level", "recall", "--reference", "hf", "--limit", "12", "--json"]
    assert run(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ranks"]["t2i"]["top1_agreement"] == 100
    assert found["ranks"]["t2i"]["pairs"] == 60 * (12 * 11 // 2), "12 images are all on every shortlist"
    assert not [gate["name"] for gate in found["gates"] if "itm" in gate["name"]]


def test_boxes_act_on_siglip_and_are_refused_by_clip(exported, photos, photo_boxes):
    family, _, bundle = exported
    with Retriever.open(bundle) as retriever:
        plain = retriever.encode_images(photos).query_embeds
        if family == "clip":
            with pytest.raises(InputError) as caught:
                retriever.encode_images(photos, boxes=photo_boxes)
            assert caught.value.code == "bundle-without-boxes"
            return
        assert np.abs(retriever.encode_images(photos, boxes=photo_boxes).query_embeds - plain).max() > 1e-3
        empty = [Boxes(np.empty((0, 4)), boxes.size) for boxes in photo_boxes]
        np.testing.assert_array_equal(retriever.encode_images(photos, boxes=empty).query_embeds, plain)


def test_a_gallery_keeps_no_features_and_is_searched_by_itc_alone(clip_bundle, tmp_path, capsys):
    gallery = tmp_path / "gallery"
    assert run(["index", str(clip_bundle), "examples/photos", "--out", str(gallery)]) == 0
    assert not (gallery / "features").exists()
    capsys.readouterr()
    assert run(["search", str(gallery), TEXTS[0], "--json"]) == 0
    hits = json.loads(capsys.readouterr().out)["hits"]
    assert len(hits) == 4
    assert all(hit["itm"] is None and hit["score"] == hit["itc"] for hit in hits)
    assert [hit["rank_itc"] for hit in hits] == [1, 2, 3, 4]


@pytest.mark.parametrize("command", ["search", "eval", "verify"])
def test_re_ranking_that_was_asked_for_is_a_usage_error_that_says_why(clip_bundle, tmp_path, command, capsys):
    gallery = tmp_path / "gallery"
    assert run(["index", str(clip_bundle), "examples/photos", "--out", str(gallery)]) == 0
    arguments = {
        "search": ["search", str(gallery), "a cat", "--rerank", "3"],
        "eval": ["eval", str(clip_bundle), "--dataset", "demo", "--limit", "4", "--rerank", "3"],
        "verify": ["verify", str(clip_bundle), "--level", "rank", "--limit", "4", "--rerank", "3"],
    }[command]
    capsys.readouterr()
    assert run(arguments) == 2
    assert "needs a pair scorer" in capsys.readouterr().err


def test_matching_pairs_is_refused_in_python_too(clip_bundle, photos):
    with Retriever.open(clip_bundle) as retriever:
        features = retriever.encode_images(photos)
        with pytest.raises(InputError) as caught:
            retriever.itm_scores(features, TEXTS)
    assert caught.value.code == "no-pair-scorer"


def test_a_gallery_without_features_cannot_be_re_ranked(tiny_bundle, photos, tmp_path):
    gallery = tmp_path / "gallery"
    assert run(["index", str(tiny_bundle), "examples/photos", "--out", str(gallery), "--features", "none"]) == 0
    with Retriever.open(tiny_bundle) as retriever, retriever.open_gallery(gallery) as opened:
        assert len(retriever.search("a cat", opened, rerank=0)) == 4
        with pytest.raises(GalleryError) as caught:
            retriever.search("a cat", opened)
    assert caught.value.code == "gallery-without-features"


def test_methods_run_where_the_family_allows_them_and_say_where_not(exported, tmp_path, capsys):
    family, _, bundle = exported
    base = ["eval", str(bundle), "--dataset", "demo", "--limit", "6", "--work", str(tmp_path / "work"), "--json"]
    perturbs = family == "siglip"
    for options, allowed in (
        (["--method", "none,oes"], True),
        (["--method", "oes", "--oes-pooling", "crop"], True),
        (["--method", "none,or-q-pert"], perturbs),
        (["--method", "oes", "--oes-pooling", "tokens"], perturbs),
    ):
        assert run([*base, *options]) == (0 if allowed else 2), options
        out, err = capsys.readouterr()
        if allowed:
            assert json.loads(out)["itm_pairs"] == 0
        else:
            assert f"this {family} bundle's query head takes no boxes" in err


def test_it_evaluates_benchmarks_and_quantizes(clip_bundle, tmp_path, capsys):
    assert run(["eval", str(clip_bundle), "--dataset", "demo", "--limit", "8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["itm_pairs"] == 0
    assert found["rerank"] == 0
    assert (
        run(["bench", str(clip_bundle), "--repeats", "3", "--batch", "1", "--boxes", "0", "--baseline", "torch,hf"])
        == 0
    )
    capsys.readouterr()
    out = tmp_path / "int8"
    arguments = ["quantize", str(clip_bundle), "--out", str(out), "--samples", "16", "--limit", "16", "--reduce-range"]
    assert (
        run([*arguments, "--max-drop", "100", "--min-agreement", "0", "--no-sensitivity", "--graphs", "vision,text"])
        == 0
    )
    assert run(["verify", str(out)]) == 0


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_prefixed_names_and_foreign_tensors_change_nothing_and_are_noted(family, tmp_path, capsys):
    make_folder(family, "a", tmp_path / "stock")
    shutil.copytree(tmp_path / "stock", tmp_path / "wrapped")
    state = load_file(tmp_path / "stock" / "model.safetensors")
    wrapped = {f"module.{name}": tensor for name, tensor in state.items()} | {"module.queue": np.ones(3, np.float32)}
    save_file(wrapped, tmp_path / "wrapped" / "model.safetensors", metadata={"format": "pt"})
    for name in ("stock", "wrapped"):
        assert run(["export", family, "--checkpoint", str(tmp_path / name), "--out", str(tmp_path / f"b-{name}")]) == 0
    plain, bundle = Bundle.open(tmp_path / "b-stock"), Bundle.open(tmp_path / "b-wrapped")
    assert [graph.file for graph in bundle.manifest.graphs.values()] == [
        graph.file for graph in plain.manifest.graphs.values()
    ]
    onnx = {name: digest for name, digest in plain.manifest.files.items() if name.startswith("onnx/")}
    assert {name: bundle.manifest.files[name] for name in onnx} == onnx
    notes = " ".join(bundle.manifest.notes)
    assert "tensor names begin with 'module.', which was removed" in notes
    assert "1 tensor of the checkpoint not used, because no part of the network has such a name: queue" in notes
    capsys.readouterr()
    assert run(["verify", str(bundle.folder), "--reference", "hf", "--checkpoint", str(tmp_path / "wrapped")]) == 0
    inside = {**state, "vision_model.adapter.weight": np.ones(3, np.float32)}
    save_file(inside, tmp_path / "wrapped" / "model.safetensors", metadata={"format": "pt"})
    assert run(["export", family, "--checkpoint", str(tmp_path / "wrapped"), "--out", str(tmp_path / "b")]) == 2
    assert "unexpected: vision_model.adapter.weight" in capsys.readouterr().err


def test_options_that_a_family_lacks_are_usage_errors(tmp_path, capsys):
    assert run(["export", "clip", "--checkpoint", str(tmp_path), "--vision-heads", "2"]) == 2
    assert "--vision-heads" in capsys.readouterr().err
    assert run(["export", "clip", "--checkpoint", str(tmp_path), "--perturb", "itc"]) == 2
    assert run(["export", "clip"]) == 2
    assert "no --checkpoint given" in capsys.readouterr().err
    assert run(["export", "cocoa"]) == 2
    assert "expected one of blip2, clip, coca, siglip" in capsys.readouterr().err


def test_engines_are_built_of_every_graph_without_a_gpu(exported, capsys):
    pytest.importorskip("tensorrt_rtx")
    family, _, bundle = exported
    assert run(["build", str(bundle), "--flavor", "rtx", "--target", "sm89", "--json"]) == 0
    built = json.loads(capsys.readouterr().out)["engines"]
    assert [engine["graph"] for engine in built] == ["vision", "image_query", "text"], family
    assert all(engine["bytes"] > 0 for engine in built)


def test_a_bundle_without_a_pair_scorer_is_calibrated(exported, tmp_path, capsys):
    family, _, bundle = exported
    if family == "clip":
        pytest.skip("CLIP pools by its class token, so there are no queries for boxes to perturb")
    data = write_set(tmp_path / "set", 6, split="val")
    grid = [
        "--alphas",
        "0.5,2",
        "--weights",
        "constant",
        "--thresholds",
        "0.9",
        "--reductions",
        "mean",
        "--score",
        "r1",
    ]
    assert run(["calibrate", str(bundle), "--dataset", str(data), *grid, "--threads", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["grid"]["alphas"] == [0.5, 2.0]


def test_a_query_set_for_each_box_is_the_pooled_vector_of_that_box_alone(exported, photos):
    """The head gets an image's tokens once for all its boxes; the expected vectors come from calls of one box."""
    family, _, bundle = exported
    if family == "clip":
        pytest.skip("CLIP pools by its class token, so there are no queries for boxes to perturb")
    size = Image.open(photos[0]).size
    corners = [[0, 0, size[0] / 3, size[1] / 2], [size[0] / 2, 10, size[0] - 5, size[1] / 2], [5, 5, 40, 60]]
    with Retriever.open(bundle) as retriever:
        alone = [retriever.encode_images(photos[:1], [Boxes([one], size)]).query_embeds[0] for one in corners]
        stock = retriever.encode_images(photos[:1]).query_embeds[0]
    each = Perturbation(alpha=2.0, threshold=0.9, reduction="each", keep_stock=True)
    with Retriever.open(bundle, perturbation=each) as retriever:
        sets = retriever.encode_images(photos[:1], [Boxes(corners, size)]).query_sets
        assert retriever.encoder.manifest.query_head.input("image_tokens").shared
    # One float32 graph in batches of another size: sums may be blocked otherwise (verification's neighbour gate).
    np.testing.assert_allclose(sets.vectors, np.stack([stock, *alone]), rtol=0, atol=1e-5)
    assert np.abs(sets.vectors[1:] - stock).max() > 1e-4, "boxes that change nothing would show nothing"
