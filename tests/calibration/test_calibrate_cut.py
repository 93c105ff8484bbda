"""The cut graph against the whole one, and against PyTorch's eigendecomposition at other thresholds."""

import numpy as np
import onnx
import pytest
from tiny_model import tiny_network

from qpert.calibration.perturbation.apply import write_threshold
from qpert.calibration.perturbation.grid import Grid, Setting
from qpert.calibration.perturbation.split_encoder import SplitEncoder
from qpert.calibration.perturbation.split_graph import split_query_head
from qpert.exporter.families.blip2.family import FAMILY
from qpert.exporter.references.eager import TorchReference
from qpert.exporter.references.recording import decided_masks
from qpert.graphs.perturbation.choices import GraphPerturbation
from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.bundle.roles import QUERY_HEAD
from qpert.runtime.errors import BundleError
from qpert.runtime.inputs.boxes import Boxes
from qpert.runtime.inputs.perturbation import box_weights, object_masks
from qpert.runtime.retrieval.encoder import Encoder

ROUNDING = 1e-5
"""Sums of up to four projectors times 10 in another order, in float32; a wrong rank would show as 1e-2 or more."""


@pytest.fixture(scope="module")
def encoder(itc_bundle):
    encoder = Encoder(Bundle.open(itc_bundle), "cpu", threads=1)
    yield encoder
    encoder.close()


@pytest.fixture(scope="module")
def cut(encoder, tmp_path_factory):
    with SplitEncoder(encoder, tmp_path_factory.mktemp("cut"), "cpu", threads=1) as cut:
        yield cut


@pytest.fixture(scope="module")
def features(encoder, boxed_data):
    return encoder.encode_images(boxed_data.dataset.images).image_embeds


@pytest.mark.parametrize("row", [0, 1, 2, 15])
def test_every_setting_gives_what_the_whole_graph_gives(row, encoder, cut, features, boxed_data):
    boxes = boxed_data.boxes[row]
    assert len(boxes) == {0: 1, 1: 0, 2: 4, 15: 2}[row]
    exported = encoder.manifest.perturbation
    settings = Grid(thresholds=(exported.threshold,), reductions=("sum", "mean")).settings()
    got = cut.query_sets(cut.of_image(features[row : row + 1]), boxes, settings).vectors
    masks = object_masks([boxes], grid=encoder.manifest.token_grid, coverage="exact")
    for place, setting in enumerate(settings):
        weights = box_weights([boxes], setting.perturbation(exported))
        inputs = {"image_embeds": features[row : row + 1], "object_masks": masks, "box_weights": weights}
        whole = encoder.sessions["image_query"].run(inputs)["query_embeds"][0]
        assert np.abs(got[place] - whole).max() < ROUNDING, setting
    if row == 2:
        assert np.ptp(got, axis=0).max() > 1000 * ROUNDING, "the settings make no difference, so the test says nothing"


@pytest.mark.slow
@pytest.mark.parametrize("row", [0, 1, 2, 15])
@pytest.mark.parametrize("reduction", ["each", "each+stock"])
def test_a_query_set_for_each_box_is_what_the_whole_graph_gives_for_the_box_alone(
    reduction, row, encoder, cut, features, boxed_data
):
    exported, boxes = encoder.manifest.perturbation, boxed_data.boxes[row]
    setting = Setting(exported.threshold, reduction, "S-0.5", 8.0)
    got = cut.query_sets(cut.of_image(features[row : row + 1]), boxes, [setting, setting])
    alone = [Boxes(boxes.xyxy[i : i + 1], boxes.size) for i in range(len(boxes))]
    if reduction == "each+stock" or not alone:
        alone.insert(0, Boxes.empty(boxes.size))
    summed = Setting(exported.threshold, "sum", "S-0.5", 8.0).perturbation(exported)
    for place, one in enumerate([*alone, *alone]):
        inputs = {
            "image_embeds": features[row : row + 1],
            "object_masks": object_masks([one], grid=encoder.manifest.token_grid, coverage="exact"),
            "box_weights": box_weights([one], summed),
        }
        whole = encoder.sessions["image_query"].run(inputs)["query_embeds"][0]
        assert np.abs(got.vectors[place] - whole).max() < ROUNDING, place
    assert got.counts.tolist() == [len(alone)] * 2


@pytest.mark.parametrize("threshold", [0.85, 0.99])
def test_another_threshold_gives_what_pytorch_gives_there(threshold, encoder, cut, features, boxed_data):
    reference = TorchReference(
        FAMILY, tiny_network(GraphPerturbation(threshold)), encoder.manifest.graphs, GraphPerturbation(threshold)
    )
    settings = Grid(alphas=(4.0,), thresholds=(threshold,), reductions=("sum", "mean")).settings()
    compared = 0
    for row, boxes in enumerate(boxed_data.boxes):
        masks = object_masks([boxes], grid=encoder.manifest.token_grid, coverage="exact")
        if not len(boxes) or not decided_masks(reference, features[row : row + 1], masks, len(boxes))[1].all():
            continue  # where float32 does not decide the rank, either answer is right
        compared += 1
        got = cut.query_sets(cut.of_image(features[row : row + 1]), boxes, settings).vectors
        for place, setting in enumerate(settings):
            weights = box_weights([boxes], setting.perturbation(cut.encoder.manifest.perturbation))
            inputs = {"image_embeds": features[row : row + 1], "object_masks": masks, "box_weights": weights}
            expected = reference.run("image_query", inputs)["query_embeds"][0]
            assert np.abs(got[place] - expected).max() < 1e-4, setting  # fp32's tolerance of `qpert verify`
    assert compared >= 4


def test_a_threshold_that_is_written_is_the_only_change(encoder, tmp_path):
    source = encoder.bundle.path("onnx/image_query.onnx")
    write_threshold(source, tmp_path / "image_query.onnx", 0.5)
    before, after = (
        onnx.load_model(path, load_external_data=False) for path in (source, tmp_path / "image_query.onnx")
    )
    changed = [
        (old.name, onnx.numpy_helper.to_array(new).item())
        for old, new in zip(before.graph.initializer, after.graph.initializer, strict=True)
        if old != new
    ]
    assert changed == [("query_map/threshold", 0.5)]
    assert before.graph.node == after.graph.node


def test_a_cut_that_does_not_compute_what_the_bundle_computes_is_refused(
    cut, encoder, features, boxed_data, monkeypatch
):
    assert cut.check(features[2:3], boxed_data.boxes[2]) < ROUNDING
    session = encoder.sessions["image_query"]

    class Other:
        spec = session.spec

        def run(self, inputs):
            return session.run({**inputs, "box_weights": inputs["box_weights"] * np.float32(1.01)})

    monkeypatch.setitem(encoder.sessions, "image_query", Other())
    with pytest.raises(BundleError, match=r"differ by .* from the whole graph's"):
        cut.check(features[2:3], boxed_data.boxes[2])


def test_a_graph_without_perturbation_cannot_be_cut(stock_export, tmp_path):
    head = Bundle.open(stock_export.folder).manifest.graph(QUERY_HEAD)
    with pytest.raises(BundleError, match="holds no query perturbation that can be cut out"):
        split_query_head(stock_export.folder / "onnx" / "image_query.onnx", head, tmp_path)


def test_a_graph_without_a_threshold_cannot_be_cut(encoder, tmp_path):
    source = encoder.bundle.path("onnx/image_query.onnx")
    model = onnx.load(source)
    for tensor in model.graph.initializer:
        if tensor.name == "query_map/threshold":
            tensor.name = "query_map/tau"
    for node in model.graph.node:
        node.input[:] = ["query_map/tau" if name == "query_map/threshold" else name for name in node.input]
    onnx.save_model(model, tmp_path / "other.onnx")
    with pytest.raises(BundleError, match="has no initializer named …/threshold"):
        split_query_head(tmp_path / "other.onnx", encoder.manifest.graph(QUERY_HEAD), tmp_path / "parts")


def test_half_precision_is_cut_too(half_bundle, tmp_path, boxed_data):
    encoder = Encoder(Bundle.open(half_bundle), "cpu", threads=1)
    with SplitEncoder(encoder, tmp_path, "cpu", threads=1) as cut:
        features = encoder.encode_images(boxed_data.dataset.images[2:3]).image_embeds
        assert features.dtype == np.float16
        assert cut.check(features, boxed_data.boxes[2]) < 5e-3  # rows among neighbours, in fp16
    encoder.close()
