"""Host graphs as part of a bundle: in the manifest, hashed, opened by nobody who did not ask."""

import json

import numpy as np
import pytest

from qpert.exporter.engines import build as module
from qpert.exporter.engines.build import BuildRequest, build_engines
from qpert.exporter.engines.builder import BuiltEngine
from qpert.runtime import Boxes, Bundle, Retriever
from qpert.runtime.bundle.manifest import Manifest, read_manifest
from qpert.runtime.bundle.roles import BOXES, HOST_ROLES, PREPROCESS
from qpert.runtime.cli import run
from qpert.runtime.inputs.images import load_image, preprocess_images
from qpert.runtime.inputs.perturbation import box_inputs
from qpert.runtime.sessions.open import open_host_graph

FILES = ["onnx/preprocess.onnx", "onnx/boxes.onnx"]


def test_the_manifest_gives_them_roles_and_hashes(tiny_bundle):
    values = json.loads((tiny_bundle / "manifest.json").read_text())
    assert values["schema_version"] == 2
    found = {graph["role"]: graph for graph in values["graphs"].values() if graph["role"] in HOST_ROLES}
    assert [found[role]["file"] for role in HOST_ROLES] == FILES
    assert all(name in values["files"] for name in FILES)
    tensors = {t["name"]: (t["slot"], t["dtype"], t["shape"]) for t in found[BOXES]["inputs"] + found[BOXES]["outputs"]}
    assert tensors == {
        "boxes": ("boxes", "float32", ["B", "O", 4]),
        "image_size": ("image_size", "float32", ["B", 2]),
        "object_masks": ("object_masks", "float32", ["B", "O", 17]),
        "box_weights": ("box_weights", "float32", ["B", "O"]),
    }
    (picture,), (pixels,) = found[PREPROCESS]["inputs"], found[PREPROCESS]["outputs"]
    assert (picture["name"], picture["slot"], picture["dtype"]) == ("image", "image", "uint8")
    assert picture["shape"] == ["H", "W", 3]
    assert (pixels["name"], pixels["shape"]) == ("pixel_values", [1, 3, 56, 56])
    manifest = read_manifest(tiny_bundle)
    assert Manifest.from_dict(json.loads(manifest.to_json())) == manifest
    assert [*manifest.graphs] == ["vision", "image_query", "text", "itm"]


def test_with_them_the_graphs_of_the_network_give_what_the_runtime_gives(tiny_bundle, photos, photo_boxes):
    bundle = Bundle.open(tiny_bundle)
    preprocess, boxes = (open_host_graph(bundle, role) for role in (PREPROCESS, BOXES))
    assert any(item is not None for item in photo_boxes)
    for photo, item in zip(photos, photo_boxes, strict=True):
        picture = np.asarray(load_image(photo))
        pixels = preprocess.run({"image": picture})["pixel_values"]
        np.testing.assert_array_equal(pixels, preprocess_images([photo], bundle.manifest.preprocessing))
        if item is None:
            continue
        rounded = Boxes(item.xyxy.astype(np.float32), item.size)
        masks, weights = box_inputs([rounded], bundle.manifest.perturbation, bundle.manifest.token_grid)
        size = np.array([item.size], np.float32)
        outputs = boxes.run({"boxes": rounded.xyxy.astype(np.float32)[None], "image_size": size})
        np.testing.assert_array_equal(outputs["object_masks"], masks)
        np.testing.assert_array_equal(outputs["box_weights"], weights)


def test_the_runtime_opens_no_session_for_them(tiny_bundle):
    with Retriever.open(tiny_bundle, threads=1) as retriever:
        assert [*retriever.encoder.sessions] == ["vision", "image_query", "text", "itm"]


def test_a_model_without_boxes_has_no_boxes_graph(stock_export):
    assert stock_export.code == 0, stock_export.err
    bundle = Bundle.open(stock_export.folder)
    assert [*bundle.manifest.host_graphs] == ["preprocess"]
    assert not (stock_export.folder / FILES[1]).exists()
    assert open_host_graph(bundle, BOXES) is None


def test_no_engine_is_built_of_them(tiny_bundle, copy_of, monkeypatch):
    """TensorRT could not parse them: uint8 inside, float64, MatMulInteger."""
    pytest.importorskip("tensorrt_rtx", reason="needs the extra rtx: pip install 'qpert[rtx]'")
    asked = []

    def build_engine(library, job, advance):
        asked.append(job.graph)
        return BuiltEngine(b"an engine", None)

    monkeypatch.setattr(module, "build_engine", build_engine)
    bundle, request = Bundle.open(copy_of(tiny_bundle)), BuildRequest(flavor="rtx", target="sm89")
    build_engines(bundle, request, request.plan(bundle.manifest.precision))
    assert asked == ["vision", "image_query", "text", "itm"]


def test_inspect_shows_them_and_bench_and_build_refuse_them_by_name(tiny_bundle, capsys):
    assert run(["inspect", str(tiny_bundle)]) == 0
    shown = capsys.readouterr().out
    assert "image uint8" in shown
    assert "image_size float32" in shown
    assert all(name in shown for name in FILES)
    assert run(["inspect", str(tiny_bundle), "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["files_ok"] is True
    assert {"preprocess", "boxes"} <= set(values["graphs"])
    assert run(["bench", str(tiny_bundle), "--stage", "preprocess"]) == 2
    assert "got stage preprocess, expected one or more of vision" in capsys.readouterr().err
    assert run(["build", str(tiny_bundle), "--graph", "boxes"]) == 2
    assert "--graph is boxes, expected one of vision, image_query, text, itm" in capsys.readouterr().err
