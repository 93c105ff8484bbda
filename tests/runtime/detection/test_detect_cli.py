"""`qpert detect`, and `index`, `search` and `inspect` with a detector."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qpert.runtime.cli import run
from qpert.runtime.detection.detector import Detector
from qpert.runtime.detection.run import detect_images
from qpert.runtime.errors import GalleryError, InputError
from qpert.runtime.gallery.box_json import boxes_from_json
from qpert.runtime.gallery.catalogue import open_catalogue
from qpert.runtime.gallery.entries import read_entries, with_boxes
from qpert.runtime.inputs.boxes import Boxes
from qpert.runtime.inputs.images import load_image
from qpert.runtime.retriever import Retriever

NAMES = ["a.png", "b.png", "c.png", "more/a.png"]


def test_the_box_file_is_what_the_readers_read_back(
    known_detector: Path, four_pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "boxes.jsonl"
    assert run(["detect", str(known_detector), str(four_pictures), "--out", str(out), "--suppress", "1", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["images"], document["boxes"], document["without_boxes"]) == (4, 12, 0)
    assert document["labels"] == {"bus": 4, "cup": 4, "star": 4}
    assert document["options"] == {"threshold": 0.3, "max_boxes": 32, "classes": None, "suppression": 1.0}
    with Detector.open(known_detector, suppression=1.0) as detector:
        for entry in with_boxes(read_entries(four_pictures), out):
            (expected,) = detector.boxes([load_image(entry.path)])
            np.testing.assert_array_equal(entry.boxes.xyxy, expected.xyxy)
            np.testing.assert_array_equal(entry.boxes.scores, expected.scores)
            assert entry.boxes.labels == expected.labels
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["boxes.jsonl"]


def test_pictures_without_boxes_are_counted(
    known_detector: Path, four_pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "boxes.jsonl"
    command = ["detect", str(known_detector), str(four_pictures), "--out", str(out), "--classes", "bus"]
    Image.new("RGB", (64, 64)).save(four_pictures / "dark.png")  # a bus of 0.63 there, of 0.70 in the others
    assert run([*command, "--threshold", "0.65", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["images"], document["boxes"], document["without_boxes"]) == (5, 4, 1)
    assert run([*command, "--threshold", "0.99", "--force"]) == 0
    assert "0 boxes in 5 pictures; nothing found in 5" in capsys.readouterr().out
    assert out.read_text() == ""


def test_an_interrupted_run_goes_on_where_it_was_and_writes_the_same_file(
    known_detector: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for place in range(20):
        Image.new("RGB", (50 + place, 60), (place * 9, 0, 0)).save(folder / f"{place:02}.png")
    entries, out, whole = read_entries(folder), tmp_path / "boxes.jsonl", tmp_path / "whole.jsonl"
    seen: list[int] = []
    right = Detector.boxes

    def interrupted(self: Detector, images: list) -> list:
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(len(images))
        return right(self, images)

    with Detector.open(known_detector) as detector:
        detect_images(detector, entries, whole)
        monkeypatch.setattr(Detector, "boxes", interrupted)
        with pytest.raises(KeyboardInterrupt):
            detect_images(detector, entries, out)
        assert not out.exists()
        partial = tmp_path / ".boxes.jsonl.partial"
        with partial.open("a") as stream:
            stream.write('{"image": "16.png", "stamp": [1, ')  # what a kill leaves of a line
        Image.new("RGB", (51, 60), (200, 0, 0)).save(folder / "01.png")  # another picture by now
        monkeypatch.setattr(Detector, "boxes", right)
        found = detect_images(detector, entries, out)
        assert found.resumed == 15
        detect_images(detector, entries, whole, force=True)
        assert out.read_bytes() == whole.read_bytes()
        assert not partial.exists()


def test_a_partial_file_of_other_options_is_not_used(known_detector: Path, four_pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "boxes.jsonl"
    with Detector.open(known_detector) as one, Detector.open(known_detector, threshold=0.65) as other:
        header = json.dumps({"identity": one.identity})
        stamp = (four_pictures / "a.png").stat()
        row = {"image": "a.png", "stamp": [stamp.st_size, stamp.st_mtime_ns], "boxes": []}
        for detector, resumed in ((other, 0), (one, 1)):
            (tmp_path / ".boxes.jsonl.partial").write_text(header + "\n" + json.dumps(row) + "\n")
            assert detect_images(detector, read_entries(four_pictures), out, force=True).resumed == resumed


def test_what_cannot_be_written_or_read_is_said_before_and_nothing_is_left(
    known_detector: Path, four_pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    command = ["detect", str(known_detector), str(four_pictures), "--out"]
    (tmp_path / "mine.jsonl").write_text("{}")
    for out, words in {
        "boxes.txt": "expected .jsonl",
        "mine.jsonl": "--force",
        "no/boxes.jsonl": "make it first",
    }.items():
        assert run([*command, str(tmp_path / out)]) == 2
        assert words in capsys.readouterr().err
    assert (tmp_path / "mine.jsonl").read_text() == "{}"
    (four_pictures / "bad.png").write_bytes(b"no picture")
    listed = tmp_path / "list.txt"
    listed.write_text("\n".join(f"pictures/{name}" for name in [*NAMES, "bad.png"]))
    command = ["detect", str(known_detector), str(listed), "--out", str(tmp_path / "boxes.jsonl")]
    assert run(command) == 2
    assert "bad.png" in capsys.readouterr().err
    assert not (tmp_path / "boxes.jsonl").exists()
    assert run([*command, "--skip-unreadable", "--json"]) == 0
    (skipped,) = json.loads(capsys.readouterr().out)["skipped"]
    assert skipped["image"] == "pictures/bad.png"


def test_the_page_shows_each_picture_with_its_boxes_and_labels_in_words(
    known_detector: Path, four_pictures: Path, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    command = ["detect", str(known_detector), str(four_pictures), "--out", str(tmp_path / "boxes.jsonl")]
    assert run([*command, "--html", str(page)]) == 0
    text = page.read_text()
    assert len(re.findall("<img ", text)) == 4
    assert len(re.findall("<rect ", text)) == 8
    assert text.count("cup 0.72, bus 0.7") == 4  # read without a mouse: a phone shows no titles
    assert "8 boxes in 4 pictures; nothing found in 0" in text
    assert "width=device-width" in text
    assert "color-scheme: light dark" in text
    assert "min(18rem, 100%)" in text  # columns shrink to a phone's width


def recorded(gallery: Path) -> dict[str, Boxes | None]:
    with contextlib.closing(open_catalogue(gallery)) as catalogue:
        return {one.name: boxes_from_json(one.boxes) for one in catalogue.images()}


def index(bundle: Path, pictures: Path, gallery: Path, *more: str) -> int:
    return run(["index", str(bundle), str(pictures), "--out", str(gallery), *more])


def test_index_finds_boxes_and_the_same_command_again_encodes_nothing(
    known_detector: Path, tiny_bundle: Path, four_pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    gallery, detector = tmp_path / "gallery", ["--detector", str(known_detector)]
    Image.new("RGB", (64, 64)).save(four_pictures / "dark.png")
    narrow = [*detector, "--detector-classes", "bus", "--detector-threshold", "0.65"]
    assert index(tiny_bundle, four_pictures, gallery, *narrow, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["added"], document["without_boxes"]) == (5, 1)
    found = recorded(gallery)
    assert len(found.pop("dark.png")) == 0
    assert {name: boxes.labels for name, boxes in found.items()} == dict.fromkeys(NAMES, ("bus",))
    assert index(tiny_bundle, four_pictures, gallery, *narrow, "--json") == 0
    assert json.loads(capsys.readouterr().out)["unchanged"] == 5
    # other options of the detector are other boxes: an error that says so, and --replace
    assert index(tiny_bundle, four_pictures, gallery, *detector) == 2
    assert "differ, a.png in its detector or its options" in capsys.readouterr().err
    assert index(tiny_bundle, four_pictures, gallery, *detector, "--replace") == 0
    assert {len(boxes) for boxes in recorded(gallery).values()} == {2}
    assert "5 replaced" in capsys.readouterr().out
    assert index(tiny_bundle, four_pictures, gallery) == 2  # without a detector they have other boxes: none
    assert "in its boxes" in capsys.readouterr().err


def test_a_gallery_of_a_box_file_and_one_of_the_detector_hold_the_same(
    known_detector: Path, tiny_bundle: Path, four_pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    boxes, by_file, at_once = tmp_path / "boxes.jsonl", tmp_path / "by-file", tmp_path / "at-once"
    assert run(["detect", str(known_detector), str(four_pictures), "--out", str(boxes)]) == 0
    assert index(tiny_bundle, four_pictures, by_file, "--boxes", str(boxes)) == 0
    assert index(tiny_bundle, four_pictures, at_once, "--detector", str(known_detector)) == 0
    one, other = recorded(by_file), recorded(at_once)
    assert list(one) == NAMES
    assert all(np.array_equal(one[name].xyxy, other[name].xyxy) for name in NAMES)
    with Retriever.open(tiny_bundle) as retriever:
        hits = []
        for folder in (by_file, at_once):
            with retriever.open_gallery(folder) as gallery:
                hits.append([(hit.image, hit.score) for hit in retriever.search("a bus", gallery)])
    assert hits[0] == hits[1]
    # boxes that a file gives and that the detector found count as the same
    capsys.readouterr()
    assert index(tiny_bundle, four_pictures, at_once, "--boxes", str(boxes), "--json") == 0
    assert json.loads(capsys.readouterr().out)["unchanged"] == 4


def test_more_boxes_than_the_bundle_takes_are_an_error_unless_the_best_are_asked_for(
    known_detector: Path, export_tiny: Callable, four_pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    from qpert.exporter.families.declare import Limits

    narrow = export_tiny(limits=Limits(3, 1, 6, 12))
    gallery, detector = tmp_path / "gallery", ["--detector", str(known_detector)]
    assert index(narrow, four_pictures, gallery, *detector) == 2
    message = capsys.readouterr().err
    assert "an image has 2 boxes, this bundle takes up to 1" in message
    assert "--max-boxes 1" in message
    assert index(narrow, four_pictures, gallery, *detector, "--max-boxes", "1") == 0
    assert {boxes.labels for boxes in recorded(gallery).values()} == {("cup",)}


def test_options_that_contradict_each_other_are_refused(
    known_detector: Path, tiny_bundle: Path, four_pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    gallery = tmp_path / "gallery"
    assert index(tiny_bundle, four_pictures, gallery, "--detector", str(known_detector), "--boxes", "x.jsonl") == 2
    assert "exclude each other" in capsys.readouterr().err
    assert index(tiny_bundle, four_pictures, gallery, "--detector-classes", "cup") == 2
    assert "--detector-classes needs --detector" in capsys.readouterr().err
    assert index(tiny_bundle, four_pictures, gallery, "--detector", str(tiny_bundle)) == 2
    assert "finds no boxes" in capsys.readouterr().err
    assert run(["search", str(gallery), "a cup", "--detector", str(known_detector)]) == 2
    assert "need --image" in capsys.readouterr().err


def test_a_bundle_that_takes_no_boxes_refuses_a_detector_before_any_work(
    known_detector: Path, stock_export, four_pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert index(stock_export.folder, four_pictures, tmp_path / "gallery", "--detector", str(known_detector)) == 2
    assert "takes no boxes, so a detector would have no effect" in capsys.readouterr().err


def test_search_by_image_with_a_detector_is_search_with_its_boxes(
    known_detector: Path, tiny_bundle: Path, four_pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    gallery, boxes, texts = tmp_path / "gallery", tmp_path / "boxes.jsonl", tmp_path / "texts.txt"
    texts.write_text("a cup\na red bus\nstars\n")
    assert index(tiny_bundle, four_pictures, gallery) == 0
    assert run(["detect", str(known_detector), str(four_pictures), "--out", str(boxes)]) == 0
    capsys.readouterr()
    documents = []
    for more in (["--detector", str(known_detector)], ["--boxes", str(boxes)], []):
        command = ["search", str(gallery), "--image", str(four_pictures / "b.png"), "--texts", str(texts), "--json"]
        assert run([*command, *more]) == 0
        documents.append(json.loads(capsys.readouterr().out)["hits"])
    assert documents[0] == documents[1]
    assert documents[0] != documents[2]


class Named:
    """A source of another kind: it finds the left half of every picture, and calls itself a name or nothing."""

    def __init__(self, identity: dict | None) -> None:
        if identity is not None:
            self.identity = identity

    def boxes(self, images: list) -> list[Boxes]:
        return [Boxes([[0, 0, image.width / 2, image.height]], image.size) for image in images]


def test_python_indexes_with_any_source(tiny_bundle: Path, four_pictures: Path, tmp_path: Path) -> None:
    from qpert.runtime.gallery.indexing import index_images

    entries = read_entries(four_pictures)
    with Retriever.open(tiny_bundle) as retriever:
        unnamed, named = tmp_path / "unnamed", tmp_path / "named"
        first = index_images(unnamed, retriever.encoder, entries, boxes=Named(None))
        assert (first.added, first.without_boxes) == (4, 0)
        assert index_images(unnamed, retriever.encoder, entries, boxes=Named(None)).unchanged == 4
        index_images(named, retriever.encoder, entries, boxes=Named({"version": 1}))
        assert index_images(named, retriever.encoder, entries, boxes=Named({"version": 1})).unchanged == 4
        with pytest.raises(GalleryError) as caught:
            index_images(named, retriever.encoder, entries, boxes=Named({"version": 2}))
        assert caught.value.code == "image-changed"
        with pytest.raises(InputError) as caught:
            index_images(named, retriever.encoder, entries, boxes=[None] * 4)
        assert caught.value.code == "box-source"
    assert recorded(named)["b.png"].xyxy.tolist() == [[0, 0, 64, 64]]


def test_inspect_describes_a_detector_and_finds_what_was_altered(
    known_detector: Path, copy_of: Callable, capsys: pytest.CaptureFixture
) -> None:
    folder = copy_of(known_detector)
    assert run(["inspect", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "yolox, a detector of 3 labels: cup, star, bus" in shown
    assert "letterbox to 64×64, BGR" in shown
    assert run(["inspect", str(folder), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["kind"], document["files_ok"]) == ("detector", True)
    (folder / "onnx" / "detector.onnx").write_bytes(b"")
    assert run(["inspect", str(folder)]) == 1
    assert "ALTERED" in capsys.readouterr().out


def test_build_says_that_tensorrt_rtx_cannot_suppress(known_detector: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    assert run(["build", str(known_detector), "--flavor", "rtx", "--target", "sm89"]) == 3
    assert "has no NonMaxSuppression" in capsys.readouterr().err
    assert not (known_detector / "engines").exists()
