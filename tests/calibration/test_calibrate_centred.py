"""A bundle with `--centre-keys`, from export to calibration: every reference, the cut graph, the written threshold."""

import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
from tiny_model import THRESHOLD, VOCABULARY
from tower_folders import siglip_folder

from qpert.calibration.perturbation.apply import apply_settings
from qpert.calibration.perturbation.grid import Grid
from qpert.calibration.perturbation.split_encoder import SplitEncoder
from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.cli import run
from qpert.runtime.errors import InputError
from qpert.runtime.inputs.perturbation import Perturbation, box_weights, object_masks
from qpert.runtime.retrieval.encoder import Encoder

pytestmark = pytest.mark.slow

TINY_EXPORT = ["blip2", "--tokenizer", str(VOCABULARY), "--vision-heads", "2", "--qformer-heads", "2"]
LIMITS = ["--max-batch", "4", "--max-boxes", "4", "--max-text", "8"]
ROUNDING = 1e-5
"""Sums of up to four projectors times 10 in another order, in float32; a wrong rank would show as 1e-2 or more."""


def printed(capsys, *arguments):
    assert run([str(argument) for argument in arguments]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def centred(tiny_weights, tmp_path_factory):
    """The tiny model, exported on the command line with `--perturb itc --centre-keys`."""
    folder = tmp_path_factory.mktemp("centred") / "bundle"
    asked = [*TINY_EXPORT, "--checkpoint", str(tiny_weights), *LIMITS, "--max-length", "12", "--out", str(folder)]
    assert run(["export", *asked, "--perturb", "itc", "--threshold", str(THRESHOLD), "--centre-keys"]) == 0
    return folder


def query_outputs(folder, boxed_data, settings=None):
    """Query embeddings of the boxed pictures."""
    encoder = Encoder(Bundle.open(folder), "cpu", settings, threads=1)
    found = encoder.encode_images(boxed_data.dataset.images, boxed_data.boxes).query_embeds
    encoder.close()
    return found


@pytest.mark.parametrize("reference", ["recorded", "torch", "hf"])
def test_it_verifies_against_every_reference(reference, centred, capsys):
    assert printed(capsys, "verify", centred, "--reference", reference, "--json")["verdict"] == "pass"


@pytest.mark.parametrize("reference", ["torch", "hf"])
def test_siglip_verifies_too(reference, siglip, capsys):
    assert Bundle.open(siglip).manifest.perturbation.centre_keys
    assert printed(capsys, "verify", siglip, "--reference", reference, "--json")["verdict"] == "pass"


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    """A small SigLIP with centred keys."""
    root = tmp_path_factory.mktemp("siglip")
    (root / "hub").mkdir()
    checkpoint = siglip_folder(root / "hub", "a")
    asked = ["siglip", "--checkpoint", str(checkpoint), *LIMITS, "--alpha", "2", "--out", str(root / "bundle")]
    assert run(["export", *asked, "--centre-keys"]) == 0
    return root / "bundle"


def test_a_bundle_whose_keys_are_not_centred_is_not_what_the_references_give_with_centring(
    itc_bundle, copy_of, edit_manifest, capsys
):
    """The gates do see the difference: a graph that forgot to centre would fail."""
    folder = copy_of(itc_bundle)
    edit_manifest(folder, lambda values: values["perturbation"].update(centre_keys=True))
    for reference in ("torch", "hf"):
        assert run(["verify", str(folder), "--reference", reference, "--json"]) == 1
        verdict = json.loads(capsys.readouterr().out)
        failed = {gate["name"] for gate in verdict["gates"] if not gate["pass"]}
        assert failed
        assert all(name.startswith("image_query") for name in failed)


def test_without_weights_it_is_stock_and_with_weights_it_is_another_perturbation(centred, itc_bundle, boxed_data):
    settings = {folder: Bundle.open(folder).manifest.perturbation for folder in (centred, itc_bundle)}
    assert settings[centred] == replace(settings[itc_bundle], centre_keys=True)
    zero, stock = (query_outputs(folder, boxed_data, replace(one, alpha=0.0)) for folder, one in settings.items())
    np.testing.assert_allclose(zero, stock, rtol=0, atol=1e-6)
    moved, plain = (query_outputs(folder, boxed_data) for folder in settings)
    assert np.abs(moved - stock).max() > 1e-2
    assert np.abs(moved - plain).max() > 1e-2


def test_the_cost_is_one_mean_and_one_difference_a_layer(centred, itc_bundle):
    """The attention and the stack of keys stay as they are: the lowering finds the layers in it and copies nothing."""
    files = (folder / "onnx" / "image_query.onnx" for folder in (centred, itc_bundle))
    graphs = (onnx.load_model(file, load_external_data=False).graph for file in files)
    with_centring, without = ([node.op_type for node in graph.node] for graph in graphs)
    counts = {kind: with_centring.count(kind) - without.count(kind) for kind in {*with_centring, *without}}
    assert {kind: count for kind, count in counts.items() if count} == {"ReduceMean": 2, "Sub": 2}
    for graph in ("vision", "text", "itm"):
        one, other = (onnx.load(folder / "onnx" / f"{graph}.onnx").graph for folder in (centred, itc_bundle))
        assert one == other, graph


def test_the_other_setting_is_refused_by_name(centred, itc_bundle):
    for folder, fixed in ((centred, True), (itc_bundle, False)):
        bundle = Bundle.open(folder)
        with pytest.raises(InputError, match=f"centre_keys is {not fixed}, this bundle's graphs were exported with"):
            Encoder(bundle, "cpu", replace(bundle.manifest.perturbation, centre_keys=not fixed))


def test_manifests_from_before_the_field_open_as_not_centred(itc_bundle, copy_of, edit_manifest):
    folder = copy_of(itc_bundle)
    edit_manifest(folder, lambda values: values["perturbation"].pop("centre_keys"))
    bundle = Bundle.open(folder)
    assert bundle.manifest.perturbation == Bundle.open(itc_bundle).manifest.perturbation
    Encoder(bundle, "cpu").close()


# Calibration


@pytest.mark.parametrize("row", [0, 1, 2, 15])
def test_the_cut_graph_gives_what_the_whole_one_gives(row, centred, boxed_data, tmp_path):
    encoder, boxes = Encoder(Bundle.open(centred), "cpu", threads=1), boxed_data.boxes[row]
    features = encoder.encode_images(boxed_data.dataset.images[row : row + 1]).image_embeds
    exported = encoder.manifest.perturbation
    settings = Grid(thresholds=(exported.threshold,), reductions=("sum", "mean")).settings()
    with SplitEncoder(encoder, tmp_path, "cpu", threads=1) as cut:
        assert cut.check(features, boxes) < ROUNDING
        got = cut.query_sets(cut.of_image(features), boxes, settings).vectors
    masks = object_masks([boxes], grid=encoder.manifest.token_grid, coverage="exact")
    for place, setting in enumerate(settings):
        weights = box_weights([boxes], setting.perturbation(exported))
        inputs = {"image_embeds": features, "object_masks": masks, "box_weights": weights}
        whole = encoder.sessions["image_query"].run(inputs)["query_embeds"][0]
        assert np.abs(got[place] - whole).max() < ROUNDING, setting
    encoder.close()


def test_a_written_threshold_keeps_the_centring_and_records_with_it(centred, tmp_path, capsys):
    source = Bundle.open(centred)
    settings = replace(source.manifest.perturbation, threshold=0.8, alpha=4.0)
    new = apply_settings(source, settings, tmp_path / "new", provenance={}, reports={})
    assert new.manifest.perturbation.centre_keys
    for reference in ("recorded", "torch"):
        assert printed(capsys, "verify", new.folder, "--reference", reference, "--json")["verdict"] == "pass"


def test_what_a_search_promises_is_what_the_written_bundle_gives(centred, boxed_set, tmp_path, capsys):
    boxes = boxed_set / "boxes.jsonl"
    data = ["--dataset", boxed_set, "--boxes", boxes, "--bin-boxes", boxes, "--rerank", 0, "--threads", 1, "--json"]
    grid = ["--alphas", 4, "--weights", "constant", "--thresholds", 0.8, "--reductions", "each", "--regardless"]
    search = ["--score", "r1", "--work", tmp_path / "work", "--out", tmp_path / "out"]
    best = printed(capsys, "calibrate", centred, *data, *grid, *search)["best"]
    written = Bundle.open(tmp_path / "out").manifest.perturbation
    assert written == Perturbation(stages="itc", alpha=4.0, threshold=0.8, reduction="each", centre_keys=True)
    measured = printed(capsys, "eval", tmp_path / "out", *data, "--split", "val")
    assert measured["perturbation"]["centre_keys"] is True
    assert {way: measured[way] for way in ("t2i", "i2t", "small")} == {
        way: best[way] for way in ("t2i", "i2t", "small")
    }
    binding = json.loads(next((tmp_path / "work").glob("*.json")).read_text())
    assert binding["perturbation"]["centre_keys"] is True
