"""The boxes that `qpert quantize` calibrates and judges with: all that `qpert eval` reads, or an error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from evaluation_sets import write_set
from PIL import Image

from qpert.calibration.quantization.build import quantize_bundle
from qpert.calibration.quantization.data import open_split
from qpert.calibration.quantization.request import QuantizeRequest
from qpert.runtime.errors import LimitError
from qpert.runtime.evaluation.inputs import open_data
from qpert.runtime.progress import Silent


class Heard(Silent):
    """Keeps what was said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


@pytest.fixture
def coco_set(tmp_path: Path) -> Path:
    """Two COCO pictures; their boxes are in COCO Entities' own JSON, not in a folder of XML files."""
    root = tmp_path / "coco"
    names = [f"val2014/COCO_val2014_{number:012d}.jpg" for number in (42, 7)]
    for part in ("annotations", "val2014"):
        (root / part).mkdir(parents=True)
    for name in names:
        Image.new("RGB", (40, 30)).save(root / name)
    (root / "annotations" / "val.json").write_text(json.dumps([{"image": name, "caption": ["a"]} for name in names]))
    document = {
        "42": {"a dog": {"detections": {"dog": [[3, [1.5, 2, 10, 12]]]}}},
        "7": {"a cat": {"detections": {"cat": [[5, [0, 0, 4, 4]]]}}},
    }
    (root / "coco_entities_release.json").write_text(json.dumps(document))
    return root


def test_boxes_in_coco_entities_json_are_read_as_eval_reads_them(coco_set: Path, tmp_path: Path) -> None:
    heard = Heard()
    split = open_split(QuantizeRequest(tmp_path, tmp_path / "out", dataset=str(coco_set)), heard)
    assert split.boxes_of(0, (40, 30)).xyxy.tolist() == [[1.5, 2, 10, 12]]
    assert split.boxes_of(1, (40, 30)).xyxy.tolist() == [[0, 0, 4, 4]]
    evaluated = open_data(coco_set, "val").boxes
    assert [split.boxes_of(row, (40, 30)).xyxy.tolist() for row in (0, 1)] == [one.xyxy.tolist() for one in evaluated]
    assert heard.lines == []


def test_more_boxes_than_the_bundle_takes_are_an_error_and_not_cut(tiny_bundle: Path, tmp_path: Path) -> None:
    """The tiny bundle takes four boxes an image; one image of the split has five."""
    root = write_set(tmp_path / "set", 16, split="val")
    annotation = root / "flickr30k_entities" / "Annotations" / "0009.xml"
    text = annotation.read_text()
    box = text[text.index("<object><name>7") : text.index("</annotation>")]
    annotation.write_text(text.replace(box, 5 * box))
    request = QuantizeRequest(tiny_bundle, tmp_path / "out", dataset=str(root), samples=16, sensitivity=False)
    with pytest.raises(LimitError) as caught:
        quantize_bundle(request)
    assert caught.value.code == "too-many-boxes"
    assert "0009.png" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_bundle_without_perturbation_is_quantised_without_boxes_and_that_is_said(
    stock_export, tmp_path: Path
) -> None:
    root = write_set(tmp_path / "set", 16, split="val")
    request = QuantizeRequest(
        stock_export.folder, tmp_path / "out", target="tensorrt", dataset=str(root), samples=16, sensitivity=False,
        max_drop=100.0, min_agreement=0.0,
    )  # fmt: skip
    heard = Heard()
    bundle = quantize_bundle(request, heard)
    assert bundle.manifest.precision == "int8"
    assert any("takes no boxes" in line for line in heard.lines)
