"""What `qpert quantize` refuses, each with what to do instead."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from qpert.calibration.quantization.build import quantize_bundle
from qpert.calibration.quantization.data import open_split
from qpert.calibration.quantization.request import QuantizeRequest
from qpert.runtime.cli import run
from qpert.runtime.errors import BoxError, InputError, QpertWarning, UnavailableError
from qpert.runtime.progress import Silent
from qpert.runtime.scenes import write_dataset


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_dataset(folder, "val", 16)
    return folder


@pytest.fixture
def changed_scenes(scenes: Path, tmp_path: Path) -> Callable[[Callable[[list], list]], Path]:
    """A copy of the scenes with another annotation."""

    def change(edit: Callable[[list], list]) -> Path:
        root = Path(shutil.copytree(scenes, tmp_path / "changed"))
        annotation = root / "annotations" / "val.json"
        annotation.write_text(json.dumps(edit(json.loads(annotation.read_text()))))
        return root

    return change


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"precision": "int4"}, "int4.*expected one of int8, fp8"),
        ({"target": "tpu"}, "tpu.*expected one of cpu, tensorrt"),
        ({"precision": "fp8"}, "fp8 needs a GPU"),
        ({"precision": "fp8", "target": "tensorrt", "arch": ("sm80",)}, "sm80 has no FP8 products"),
        ({"precision": "fp8", "target": "tensorrt", "ranges": "percentile"}, "percentile is not supported for fp8"),
        ({"target": "tensorrt", "arch": ("ampere",)}, "expected names such as sm80"),
        ({"arch": ("sm80",)}, "is for --target tensorrt"),
        ({"samples": 15}, "--samples is 15, expected at least 16"),
        ({"samples": 64, "limit": 20}, "--limit is 20, expected at least the 64 images"),
        ({"graphs": ("vison",)}, "vison.*expected one or more of vision"),
        ({"graphs": ()}, "names no graph"),
        ({"max_drop": -1.0}, "percentages"),
        ({"dataset": "demo", "split": "training"}, "training.*expected one of train, val, test"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused_in_words(
    tiny_bundle: Path, tmp_path: Path, fields: dict, words: str
) -> None:
    out = tmp_path / "out"
    with pytest.raises(InputError, match=words):
        quantize_bundle(QuantizeRequest(tiny_bundle, out, **fields))
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_in_half_precision_is_no_source(half_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a fp16 bundle, expected fp32"):
        quantize_bundle(QuantizeRequest(half_bundle, tmp_path / "out"))


def test_a_quantised_bundle_is_no_source(
    tiny_bundle: Path, tmp_path: Path, copy_of: Callable, edit_manifest: Callable
) -> None:
    bundle = copy_of(tiny_bundle)
    edit_manifest(bundle, lambda values: values.update(precision="int8", quantization={"target": "cpu"}))
    with pytest.raises(InputError, match=r"\(int8\)") as caught:
        quantize_bundle(QuantizeRequest(bundle, tmp_path / "out"))
    assert caught.value.code == "bundle-quantized"


def test_an_existing_target_is_not_replaced_unasked(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="exists; pass --force"):
        quantize_bundle(QuantizeRequest(tiny_bundle, tmp_path / "out"))
    with pytest.raises(InputError, match="is not a bundle"):
        quantize_bundle(QuantizeRequest(tiny_bundle, tmp_path / "out", force=True))
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_too_few_images_are_refused(tiny_bundle: Path, tmp_path: Path, changed_scenes: Callable) -> None:
    root = changed_scenes(lambda entries: entries[:15])
    with pytest.raises(InputError, match="has 15 images, expected at least 16"):
        quantize_bundle(QuantizeRequest(tiny_bundle, tmp_path / "out", dataset=str(root), samples=16))
    assert not (tmp_path / "out").exists()


def test_copies_of_one_image_are_refused(tiny_bundle: Path, tmp_path: Path, changed_scenes: Callable) -> None:
    root = changed_scenes(lambda entries: entries)
    first, *others = sorted((root / "flickr30k-images").glob("*.jpg"))
    for other in others:
        shutil.copyfile(first, other)
    with pytest.raises(InputError, match=r"of the first 16 images .* differ"):
        quantize_bundle(QuantizeRequest(tiny_bundle, tmp_path / "out", dataset=str(root), samples=16))


def test_one_caption_for_all_images_is_refused(tiny_bundle: Path, tmp_path: Path, changed_scenes: Callable) -> None:
    root = changed_scenes(lambda entries: [entry | {"caption": ["a picture"]} for entry in entries])
    with pytest.raises(InputError, match=r"of the first 16 captions .* differ"):
        quantize_bundle(QuantizeRequest(tiny_bundle, tmp_path / "out", dataset=str(root), samples=16))


def test_images_without_captions_are_refused(tiny_bundle: Path, tmp_path: Path, changed_scenes: Callable) -> None:
    root = changed_scenes(lambda entries: [entry | {"caption": []} for entry in entries])
    with pytest.raises(InputError, match="expected a list of texts, at least one"):
        quantize_bundle(QuantizeRequest(tiny_bundle, tmp_path / "out", dataset=str(root), samples=16))


def test_fp8_without_modelopt_says_how_to_get_it(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("QPERT_MODELOPT_ENV", str(tmp_path / "nowhere"))
    request = QuantizeRequest(tiny_bundle, tmp_path / "out", precision="fp8", target="tensorrt")
    with pytest.raises(UnavailableError, match=r"tools/modelopt_env\.sh"):
        quantize_bundle(request)
    arguments = ["quantize", str(tiny_bundle), "--out", str(tmp_path / "out"), "--precision", "fp8"]
    assert run([*arguments, "--target", "tensorrt"]) == 3
    assert run(arguments) == 2
    assert "fp8 needs a GPU" in capsys.readouterr().err


def test_boxes_of_a_coco_entities_file_are_read_and_bad_ones_can_be_left_out(tmp_path: Path) -> None:
    image = "val2014/COCO_val2014_000000000042.jpg"
    (tmp_path / "annotations").mkdir()
    (tmp_path / "val2014").mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / image)
    (tmp_path / "annotations" / "val.json").write_text(json.dumps([{"image": image, "caption": ["a dog"]}]))
    detections = {"dog": [[1, [1, 2, 10, 12]], [2, [5, 5, 5, 9]]]}
    (tmp_path / "coco_entities.json").write_text(json.dumps({"42": {"a dog": {"detections": detections}}}))
    request = QuantizeRequest(tmp_path / "bundle", tmp_path / "out", dataset=str(tmp_path))
    with pytest.raises(BoxError) as caught:
        open_split(request, Silent())
    assert caught.value.code == "box-empty"
    with pytest.warns(QpertWarning, match="1 of 2 boxes cannot be used"):
        split = open_split(replace(request, skip_bad_boxes=True), Silent())
    assert split.boxes_of(0, (40, 30)).xyxy.tolist() == [[1, 2, 10, 12]]
