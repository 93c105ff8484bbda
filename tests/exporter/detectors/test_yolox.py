"""YOLOX by graph surgery: hand-computed raw outputs, batches, and the real YOLOX-nano on real photographs."""

from __future__ import annotations

import contextlib
import io
import json
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image
from raw_yolox import LABELS, export_raw_yolox, write_raw_yolox
from shared_data import shared_folder

from qpert.exporter.detectors.coco import COCO_CLASSES
from qpert.exporter.detectors.export import DetectorRequest, export_detector
from qpert.exporter.detectors.gate import DetectorGateError
from qpert.exporter.detectors.yolox import YoloxDetector, decoded, grid_of
from qpert.runtime.detection.bundle import DetectorBundle, largest_batch
from qpert.runtime.detection.detector import Detector
from qpert.runtime.errors import CheckpointError

EXACT = 1e-5
"""Pixels: float32 of numbers below 100."""


@pytest.mark.parametrize("form", ["plain", "reshaped", "fixed"])
def test_known_raw_outputs_become_the_boxes_computed_by_hand(tmp_path: Path, form: str) -> None:
    bundle = export_raw_yolox(tmp_path / "in", tmp_path / "out", form)
    images = [Image.new("RGB", (64, 64)), Image.new("RGB", (128, 64), "white"), Image.new("RGB", (32, 32), "white")]
    with Detector.open(bundle, threshold=0, suppression=1) as detector:
        black, wide, small = detector.boxes(images)
    # in the order of the scores: the cup 0.72, the bus 0.7 · 0.9 (black) or 0.8 · 0.9 (white), the star 0.54
    np.testing.assert_allclose(black.scores, [0.72, 0.63, 0.54], rtol=1e-6)
    assert black.labels == ("cup", "bus", "star")
    np.testing.assert_allclose(black.xyxy, [[0, 0, 16, 16], [24, 28, 40, 36], [0, 0, 16, 16]], atol=EXACT)
    # a picture twice as wide is half as large in the letterbox; the bus reaches below its 64 rows and is clipped
    by_name = dict(zip(wide.labels, zip(wide.xyxy.tolist(), wide.scores.tolist(), strict=True), strict=True))
    np.testing.assert_allclose(by_name["bus"][0], [48, 56, 80, 64], atol=EXACT)
    assert by_name["bus"][1] == pytest.approx(0.72, rel=1e-6)
    np.testing.assert_allclose(by_name["cup"][0], [0, 0, 32, 32], atol=EXACT)
    assert [sorted(b.labels) for b in (wide, small)] == [["bus", "cup", "star"]] * 2
    np.testing.assert_allclose(small.xyxy[small.labels.index("bus")], [12, 14, 20, 18], atol=EXACT)


def test_a_batch_is_dynamic_where_the_graph_allows_it_and_else_stated_and_honoured(tmp_path: Path) -> None:
    most = {}
    for form in ("plain", "reshaped", "fixed"):
        manifest = DetectorBundle.open(export_raw_yolox(tmp_path / "in", tmp_path / form, form)).manifest
        most[form] = largest_batch(manifest.graph)
        assert bool(manifest.notes) == (form == "fixed")
    assert most == {"plain": 8, "reshaped": 8, "fixed": 1}
    assert "fixes its batch at 1" in manifest.notes[0]


@pytest.mark.parametrize("opset", [11, 13, 17, 18])
def test_every_form_of_the_operators_whose_axes_moved(tmp_path: Path, opset: int) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join(LABELS))
    file = write_raw_yolox(tmp_path / "yolox.onnx", opset=opset)
    found = export_detector(DetectorRequest(str(file), tmp_path / "out", labels)).manifest.verification
    assert (found["verdict"], found["unmatched"]) == ("pass", 0)


def test_the_gate_compares_with_the_published_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = YoloxDetector.reference

    def other(self: YoloxDetector, images: list) -> list:
        found = right(self, images)
        found[2].scores[0] -= 0.001
        return found

    monkeypatch.setattr(YoloxDetector, "reference", other)
    with pytest.raises(DetectorGateError):
        export_raw_yolox(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_no_yolox_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("not a graph")
    model = onnx.load(write_raw_yolox(tmp_path / "raw.onnx"))
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 85
    onnx.save(model, tmp_path / "other.onnx")
    codes = {}
    for name in ("text.onnx", "other.onnx", "raw.onnx", "missing.onnx"):
        with pytest.raises(CheckpointError) as caught:
            export_detector(DetectorRequest(str(tmp_path / name), tmp_path / "out"))
        codes[name] = caught.value.code
    assert codes == {
        "text.onnx": "checkpoint-unreadable",
        "other.onnx": "detector-architecture",
        "raw.onnx": "detector-labels",  # 3 classes are not COCO's 80
        "missing.onnx": "checkpoint-not-found",
    }


def test_the_reference_decodes_by_hand_computed_numbers() -> None:
    """One place of the grid at 8 px, column 3 and row 2: middle (3.5, 2.25) · 8, size 8 · (e, 1)."""
    grid = grid_of(64, 64)
    place = 2 * 8 + 3
    assert grid[place].tolist() == [3, 2, 8]
    assert grid[64 + 5].tolist() == [1, 1, 16]
    raw = np.zeros((84, 7))
    raw[place] = [0.5, 0.25, 1, 0, 0.5, 0.25, 0.75]
    found = decoded(raw, grid, ratio=0.5)
    half = 4 * np.e
    np.testing.assert_allclose(found.boxes, [[(28 - half) * 2, 28, (28 + half) * 2, 44]], rtol=1e-6)
    assert (found.scores.tolist(), found.labels.tolist()) == ([0.375], [1])


# The real detector on real photographs.

VOC_NAMES = {
    "aeroplane": "airplane",
    "diningtable": "dining table",
    "motorbike": "motorcycle",
    "pottedplant": "potted plant",
    "sofa": "couch",
    "tvmonitor": "tv",
}
"""VOC's names where COCO has others."""


@pytest.fixture(scope="module")
def nano(made_once: Callable) -> Path:
    """YOLOX-nano as published; skips where it is not."""
    file = shared_folder("data/detectors/yolox_nano.onnx")
    return made_once("yolox-nano-bundle", lambda out: export_detector(DetectorRequest(str(file), out)))


def ground_truth(folder: Path) -> dict:
    """COCO's document of the photographs' VOC annotations: 1-based corners, both inclusive."""
    images, annotations = [], []
    for number, path in enumerate(sorted((folder / "voc").glob("*.xml")), start=1):
        root = ET.parse(path).getroot()
        images.append({"id": number, "file_name": root.findtext("filename"), "width": 1, "height": 1})
        for item in root.iter("object"):
            name = item.findtext("name")
            x1, y1, x2, y2 = (float(item.findtext(f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax"))
            box = [x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1]
            category = COCO_CLASSES.index(VOC_NAMES.get(name, name))
            annotations.append(
                {"id": len(annotations) + 1, "image_id": number, "category_id": category, "bbox": box}
                | {"area": box[2] * box[3], "iscrowd": 0}
            )
    used = sorted({one["category_id"] for one in annotations})
    categories = [{"id": category, "name": COCO_CLASSES[category]} for category in used]
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories}


@pytest.mark.slow
def test_the_mean_average_precision_on_a_hundred_photographs_is_that_of_the_published_network(nano: Path) -> None:
    coco_module = pytest.importorskip("pycocotools.coco", reason="pycocotools is in the extra `test`")
    from pycocotools.cocoeval import COCOeval

    folder = shared_folder("data/photos_with_boxes")
    truth = ground_truth(folder)
    assert (len(truth["images"]), len(truth["annotations"])) == (100, 273)
    results = []
    with Detector.open(nano, threshold=0.01, suppression=1, max_boxes=100) as detector:
        for image in truth["images"]:
            (boxes,) = detector.boxes([Image.open(folder / "images" / image["file_name"]).convert("RGB")])
            for (x1, y1, x2, y2), score, label in zip(boxes.xyxy, boxes.scores, boxes.labels, strict=True):
                box = {"bbox": [x1, y1, x2 - x1, y2 - y1], "score": score}
                results.append({"image_id": image["id"], "category_id": COCO_CLASSES.index(label)} | box)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = coco_module.COCO()
        coco.dataset = truth
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    # A decoder written apart from this one measured 0.755 with these weights on these photographs.
    assert evaluation.stats[1] >= 0.74


@pytest.mark.slow
def test_photographs_to_boxes_to_a_gallery_to_hits(
    nano: Path, demo_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The whole path on real input, by files and in one step: both make the same gallery."""
    from qpert.runtime.cli import run
    from qpert.runtime.gallery.catalogue import open_catalogue
    from qpert.runtime.inputs.box_files import read_box_file

    photos = shared_folder("data/photos_with_boxes") / "images"
    listed = tmp_path / "photos.txt"
    names = [str(path) for path in sorted(photos.glob("*.jpg"))[:40]]
    listed.write_text("\n".join(names))
    boxes, by_file, at_once = tmp_path / "boxes.jsonl", tmp_path / "by-file", tmp_path / "at-once"
    options = ["--threshold", "0.4", "--max-boxes", "6"]
    assert run(["detect", str(nano), str(listed), "--out", str(boxes), *options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == 40
    assert 20 <= found["boxes"] <= 240
    assert len(read_box_file(boxes).rows) == found["boxes"]
    assert run(["index", str(demo_bundle), str(listed), "--boxes", str(boxes), "--out", str(by_file)]) == 0
    capsys.readouterr()
    command = ["index", str(demo_bundle), str(listed), "--detector", str(nano)]
    command += ["--detector-threshold", "0.4", "--max-boxes", "6"]
    assert run([*command, "--out", str(at_once), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["without_boxes"] == found["without_boxes"]
    galleries = []
    for folder in (by_file, at_once):
        with contextlib.closing(open_catalogue(folder)) as catalogue:
            galleries.append([json.loads(one.boxes)["xyxy"] for one in catalogue.images()])
    assert galleries[0] == galleries[1]
    assert sum(map(len, galleries[0])) == found["boxes"]
    hits = []
    for folder in (by_file, at_once):
        assert run(["search", str(folder), "a red bus", "-k", "5", "--json"]) == 0
        hits.append(json.loads(capsys.readouterr().out)["hits"])
    assert [hit["image"] for hit in hits[0]] == [hit["image"] for hit in hits[1]]
    assert len(hits[0]) == 5
