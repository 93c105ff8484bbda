"""RT-DETR, RT-DETRv2, D-FINE and DEIMv2 against stock transformers: model, image processor, post-processing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import stock_detectors
import torch
from PIL import Image

from qpert.exporter.detectors.export import DetectorRequest, export_detector
from qpert.exporter.detectors.gate import COMPARED, compare, gate_pictures, nearest
from qpert.exporter.detectors.huggingface import HubDetector, open_hub_detector
from qpert.exporter.detectors.opened import Detections
from qpert.runtime.cli import run
from qpert.runtime.detection.bundle import DetectorBundle
from qpert.runtime.detection.detector import Detector
from qpert.runtime.detection.geometry import DetectorGeometry
from qpert.runtime.errors import CheckpointError, InputError, UnavailableError

pytestmark = pytest.mark.slow

TOLERANCE = 1e-4
"""Of scores, and of boxes as a share of the picture: the same float32 products, summed in another order (measured on
these networks: 1e-6 to 1e-5)."""


@pytest.fixture(scope="module", params=list(stock_detectors.MODELS))
def folder(request, made_once: Callable) -> Path:
    name = request.param
    return made_once(f"stock-{name}", lambda path: stock_detectors.save(stock_detectors.MODELS[name](), path))


@pytest.fixture(scope="module")
def bundle(folder: Path, made_once: Callable) -> Path:
    return made_once(f"{folder.name}-bundle", lambda out: export_detector(DetectorRequest(str(folder), out)))


@pytest.fixture(scope="module")
def rt_detr_folder(made_once: Callable) -> Path:
    return made_once("stock-rt_detr_v2", lambda path: stock_detectors.save(stock_detectors.rt_detr_v2(), path))


def pictures() -> list[Image.Image]:
    generator = np.random.default_rng(5)
    sizes = [(90, 50), (40, 61), (128, 128), (150, 64)]  # Pillow 13 may take the rows of others first: `resize`
    coarse = [generator.integers(0, 256, (5, 7, 3), dtype=np.uint8) for _ in sizes]
    return [Image.fromarray(a).resize(size, Image.Resampling.BICUBIC) for a, size in zip(coarse, sizes, strict=True)]


def stock(folder: Path, images: list[Image.Image], threshold: float) -> list[dict]:
    """Stock transformers, all by itself, one picture at a time."""
    from transformers import AutoImageProcessor, AutoModelForObjectDetection

    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    model = AutoModelForObjectDetection.from_pretrained(folder).eval()
    found = []
    for image in images:
        with torch.no_grad():
            output = model(**processor(images=image, return_tensors="pt"))
        sizes = torch.tensor([[image.height, image.width]])
        found += processor.post_process_object_detection(output, threshold=threshold, target_sizes=sizes)
    return found


def assert_same_sets(ours: list, theirs: list[dict], images: list[Image.Image], names: dict[int, str]) -> int:
    """As many detections, and for each of theirs one of ours of the same label, box and score; returns how many."""
    count = 0
    for boxes, stock_one, image in zip(ours, theirs, images, strict=True):
        assert (0 if boxes is None else len(boxes)) == len(stock_one["scores"])
        left = list(range(len(stock_one["scores"])))
        sides = np.array([*image.size, *image.size])
        for label, box, score in zip(stock_one["labels"], stock_one["boxes"], stock_one["scores"], strict=True):
            clipped = np.clip(box.numpy(), 0, sides)  # a `Boxes` lies in its picture
            same = [
                row
                for row in left
                if boxes.labels[row] == names[int(label)]
                and abs(boxes.scores[row] - float(score)) <= TOLERANCE
                and np.abs((boxes.xyxy[row] - clipped) / sides).max() <= TOLERANCE
            ]
            assert same, (label, box, score)
            left.remove(same[0])
            count += 1
    return count


def test_the_same_detections_as_stock_transformers_in_batches_of_every_size(folder: Path, bundle: Path) -> None:
    images, threshold = pictures(), 0.5
    theirs = stock(folder, images, threshold)
    with Detector.open(bundle, threshold=threshold, suppression=1, max_boxes=1000) as detector:
        for batch in (1, 2, 3, 4):
            ours = []
            for start in range(0, len(images), batch):
                ours += detector.boxes(images[start : start + batch])
            compared = assert_same_sets(ours, theirs, images, stock_detectors.LABELS)
    assert compared >= 10  # the networks find something


def test_the_manifest_says_what_was_compared_and_how(folder: Path, bundle: Path) -> None:
    manifest = DetectorBundle.open(bundle).manifest
    found = manifest.verification
    assert found is not None
    assert (found["verdict"], found["batches"], found["unmatched"]) == ("pass", [1, 2, 3], 0)
    assert found["detections"] > 50
    assert 0 < found["box_difference"] < TOLERANCE  # float32 in another order is never quite the same
    assert 0 < found["score_difference"] < TOLERANCE
    assert manifest.labels == tuple(stock_detectors.LABELS.values())
    assert manifest.checkpoint.license == "apache-2.0"
    assert f"stock-{manifest.architecture}" == folder.name
    assert manifest.graph.ranges["B"].max == 8


@pytest.mark.parametrize(
    "processor",
    [
        {"size": {"height": 64, "width": 96}},
        {"do_normalize": True, "image_mean": [0.3, 0.4, 0.5], "image_std": [0.2, 0.3, 0.4]},
        {"resample": 3, "do_rescale": False, "do_normalize": True, "image_mean": [99.0] * 3, "image_std": [60.0] * 3},
    ],
    ids=["not square", "normalised", "bicubic, bytes"],
)
def test_each_field_of_the_image_processor_is_honoured(rt_detr_folder: Path, tmp_path: Path, processor: dict) -> None:
    folder = stock_detectors.save(stock_detectors.rt_detr_v2(seed=1), tmp_path / "model", processor)
    bundle = export_detector(DetectorRequest(str(folder), tmp_path / "bundle")).folder
    images = pictures()
    with Detector.open(bundle, threshold=0.4, suppression=1, max_boxes=1000) as detector:
        compared = assert_same_sets(detector.boxes(images), stock(folder, images, 0.4), images, stock_detectors.LABELS)
    assert compared >= 10


@pytest.mark.parametrize(
    ("change", "code", "named"),
    [
        ({"do_resize": False}, "preprocessing-unsupported", "do_resize"),
        ({"do_pad": True}, "preprocessing-unsupported", "do_pad"),
        ({"size": {"shortest_edge": 480, "longest_edge": 640}}, "preprocessing-unsupported", "size"),
        ({"size": 64}, "preprocessing-unsupported", "size"),
        ({"do_sharpen": True}, "preprocessing-unsupported", "do_sharpen"),
        ({"resample": 0}, "preprocessing-unsupported", "resample"),
        ({"do_normalize": "yes"}, "preprocessing-value", "do_normalize"),
        ({"image_processor_type": "DetrImageProcessor"}, "preprocessing-unsupported", "DetrImageProcessor"),
    ],
)
def test_a_field_that_cannot_be_honoured_is_refused_by_name(
    rt_detr_folder: Path, copy_of: Callable, change: dict, code: str, named: str
) -> None:
    folder = copy_of(rt_detr_folder)
    edit(folder / "preprocessor_config.json", change)
    with pytest.raises(CheckpointError, match=named) as caught:
        export_detector(DetectorRequest(str(folder), folder / "out"))
    assert caught.value.code == code


def edit(path: Path, change: dict) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def test_another_architecture_is_refused_with_what_is_expected(
    rt_detr_folder: Path, copy_of: Callable, capsys: pytest.CaptureFixture
) -> None:
    folder = copy_of(rt_detr_folder)
    edit(folder / "config.json", {"model_type": "detr", "architectures": ["DetrForObjectDetection"]})
    assert run(["export", "detector", "--checkpoint", str(folder), "--out", str(folder / "out")]) == 2
    message = capsys.readouterr().err
    assert "DetrForObjectDetection" in message
    assert "rt_detr_v2, d_fine" in message
    assert not (folder / "out").exists()


def test_tensors_of_another_model_are_refused(rt_detr_folder: Path, copy_of: Callable, tmp_path: Path) -> None:
    folder = copy_of(rt_detr_folder)
    edit(folder / "config.json", {"decoder_layers": 3})
    with pytest.raises(CheckpointError, match="missing") as caught:
        export_detector(DetectorRequest(str(folder), tmp_path / "out"))
    assert caught.value.code == "checkpoint-tensors"


def test_the_gate_fails_the_export_and_nothing_is_written(
    rt_detr_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    right = HubDetector.reference

    def moved(self: HubDetector, images: list) -> list[Detections]:
        """One detection of the first picture lies a thousandth of the picture further right."""
        found = right(self, images)
        found[0].boxes[3, [0, 2]] += 0.001 * images[0].width
        return found

    monkeypatch.setattr(HubDetector, "reference", moved)
    out = tmp_path / "out"
    assert run(["export", "detector", "--checkpoint", str(rt_detr_folder), "--out", str(out)]) == 1
    assert "have no counterpart within 0.0001" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert export_detector(DetectorRequest(str(rt_detr_folder), out, tolerance=0.01)).manifest.verification["verdict"]


def test_detections_are_compared_as_sets_in_both_directions() -> None:
    boxes = np.array([[0, 0, 10, 10], [20, 20, 40, 40], [50, 50, 60, 60]], np.float32)
    one = Detections(boxes, np.array([0.9, 0.8, 0.1], np.float32), np.array([0, 1, 0]))
    order = [1, 0, 2]
    other = Detections(boxes[order], one.scores[order], one.labels[order])
    assert nearest(one, other, (100, 100), 1e-4).tolist() == [[0, 0], [0, 0]]  # the last is decided by rounding
    relabelled = Detections(boxes, one.scores, np.array([0, 2, 0]))
    assert nearest(one, relabelled, (100, 100), 1e-4).tolist() == [[0, 0], [1, 1]]
    moved = Detections(boxes + np.array([1, 0, 1, 0]), one.scores, one.labels)
    np.testing.assert_allclose(nearest(one, moved, (100, 200), 1e-4), [[0.01, 0], [0.01, 0]], atol=1e-9)


@pytest.mark.parametrize("size", [(64, 64), (96, 64), (64, 96), (640, 640), (33, 200), (320, 800)])
def test_the_pictures_of_the_gate_have_the_same_bytes_however_pillow_orders_its_passes(size: tuple[int, int]) -> None:
    geometry = DetectorGeometry(*size, "stretch", "rgb", 1 / 255, (0, 0, 0), (1, 1, 1))
    chosen = gate_pictures(geometry)
    assert len({picture.size for picture in chosen}) == 3
    stretched = np.stack([np.asarray(picture.resize(size, Image.Resampling.BILINEAR)) for picture in chosen])
    expected = stretched.transpose(0, 3, 1, 2).astype(np.float32) / 255
    np.testing.assert_allclose(geometry.pixel_values(chosen), expected, rtol=0, atol=1e-7)  # one rounding of a byte


def test_a_detection_that_only_the_export_has_is_found(rt_detr_folder: Path, tmp_path: Path) -> None:
    opened = open_hub_detector(rt_detr_folder, "x", "x", lambda *_: None)
    bundle = export_detector(DetectorRequest(str(rt_detr_folder), tmp_path / "out"))
    full = opened.reference

    class Fewer:
        reference_name = "the stock detector without its best detection"

        @staticmethod
        def reference(images: list) -> list[Detections]:
            return [Detections(f.boxes[1:], f.scores[1:], f.labels[1:]) for f in full(images)]

    with Detector(bundle) as detector:
        assert compare(opened, detector, 1e-4).unmatched == 0
        assert compare(Fewer(), detector, 1e-4).unmatched >= 3  # at least in one batch size, of each picture
    assert COMPARED >= 20


def test_json_prints_the_manifest_and_options_become_defaults(
    rt_detr_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    command = ["export", "detector", "--checkpoint", str(rt_detr_folder), "--out", str(tmp_path / "out"), "--json"]
    command += ["--threshold", "0.55", "--max-boxes", "3", "--classes", "cup,red star", "--suppress", "0.5"]
    assert run([*command, "--max-batch", "2"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["kind"] == "detector"
    assert document["verification"]["batches"] == [1, 2]
    assert document["defaults"] == {
        "threshold": 0.55,
        "max_boxes": 3,
        "classes": ["cup", "red star"],
        "suppression": 0.5,
    }
    with Detector.open(tmp_path / "out") as detector:
        found = [boxes for boxes in detector.boxes(pictures()) if boxes is not None]
    assert found
    assert all(len(boxes) <= 3 and set(boxes.labels) <= {"cup", "red star"} for boxes in found)
    assert all(boxes.scores.min() > 0.55 for boxes in found)


def test_an_unknown_class_and_an_existing_folder_are_refused(rt_detr_folder: Path, tmp_path: Path) -> None:
    from qpert.runtime.detection.options import DetectionOptions

    options = DetectionOptions(classes=("red stars",))
    with pytest.raises(InputError, match="near matches: red star") as caught:
        export_detector(DetectorRequest(str(rt_detr_folder), tmp_path / "out", options=options))
    assert caught.value.code == "detection-class"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    with pytest.raises(InputError) as caught:
        export_detector(DetectorRequest(str(rt_detr_folder), tmp_path / "full", force=True))
    assert caught.value.code == "out-not-a-bundle"


def test_the_demonstration_is_exported_from_its_folder_or_said_to_be_absent(
    rt_detr_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = "qpert.exporter.detectors.export.DEMO"
    monkeypatch.setattr(module, tmp_path / "nothing")
    with pytest.raises(UnavailableError) as caught:
        export_detector(DetectorRequest("demo", tmp_path / "out"))
    assert caught.value.code == "detector-demo-missing"
    monkeypatch.setattr(module, rt_detr_folder)
    made = export_detector(DetectorRequest("demo", tmp_path / "out"))
    assert (made.manifest.checkpoint.name, made.manifest.checkpoint.source) == ("demo", "demo")


def test_an_engine_is_built_ahead_of_time_without_a_gpu(
    rt_detr_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    out = tmp_path / "out"
    command = ["export", "detector", "--checkpoint", str(rt_detr_folder), "--out", str(out), "--max-batch", "2"]
    assert run([*command, "--trt", "--trt-flavor", "rtx", "--target", "sm89", "--json"]) == 0
    (engine,) = json.loads(capsys.readouterr().out)["engines"]
    assert (engine["target"], engine["graph"]) == ("sm89", "detector")
    assert (out / engine["file"]).stat().st_size == engine["bytes"] > 1e5
    assert run(["build", str(out), "--flavor", "rtx", "--target", "sm89", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["engines"][0]["kept"]
    assert run(["inspect", str(out), "--json"]) == 0
    (inspected,) = json.loads(capsys.readouterr().out)["engines"]
    assert inspected["files_ok"]
    with pytest.raises(UnavailableError):  # no GPU here, or no engine for the one that is here: never another provider
        Detector.open(out, provider="tensorrt")
