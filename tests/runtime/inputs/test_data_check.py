"""`qpert data check`: what is there of the paper's data sets, on trees of their layout with parts taken away."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import pytest

from qpert.runtime.cli import run
from qpert.runtime.errors import InputError
from qpert.runtime.inputs.data_check import check_data_folder
from qpert.runtime.scenes import write_dataset


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for layout in ("flickr30k", "coco"):
        for split in ("val", "test"):
            write_dataset(root / layout, split, 4, layout=layout)
    return root


@pytest.fixture
def data(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "data"))


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("nothing may be downloaded")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def states(root: Path, split: str = "test") -> dict[str, dict[str, str]]:
    found = check_data_folder(root, split)
    return {one.data.name: {part.name: part.state for part in one.parts} for one in found}


ALL_THERE = {"annotations": "there", "pictures": "there", "entities": "there"}


def test_both_data_sets_are_found_whole_below_a_folder_and_each_in_its_own(data: Path, capsys) -> None:
    assert states(data) == {"flickr30k": ALL_THERE, "coco": ALL_THERE}
    assert states(data, "val") == {"flickr30k": ALL_THERE, "coco": ALL_THERE}
    assert states(data / "coco") == {"coco": ALL_THERE}
    assert run(["data", "check", str(data), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["complete"]
    (flickr, coco) = document["datasets"]
    assert (flickr["dataset"], coco["dataset"]) == ("flickr30k", "coco")
    assert [part["found"] for part in flickr["parts"]] == [1, 4, 4]
    assert "the published test split has 1,000" in flickr["parts"][0]["remark"]


def test_a_missing_picture_is_counted_and_named(data: Path, capsys) -> None:
    entries = json.loads((data / "flickr30k" / "annotations" / "test.json").read_text())
    (data / "flickr30k" / entries[2]["image"]).unlink()
    assert run(["data", "check", str(data / "flickr30k"), "--json"]) == 1
    (found,) = json.loads(capsys.readouterr().out)["datasets"]
    pictures = found["parts"][1]
    assert (pictures["state"], pictures["found"], pictures["wanted"]) == ("incomplete", 3, 4)
    assert entries[2]["image"] in pictures["remark"]
    assert "DenotationGraph" in pictures["published"]
    assert found["code"] == "dataset-images"


def test_missing_boxes_say_where_they_are_published_and_where_they_belong(data: Path, capsys) -> None:
    shutil.rmtree(data / "coco" / "coco_entities")
    assert run(["data", "check", str(data), "--dataset", "coco"]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "https://github.com/aimagelab/show-control-and-tell" in shown
    assert "coco_entities*.json" in shown
    assert "Flickr30K" not in shown


def test_coco_entities_as_published_count_as_boxes(data: Path) -> None:
    entries = json.loads((data / "coco" / "annotations" / "test.json").read_text())
    shutil.rmtree(data / "coco" / "coco_entities")
    numbers = [int(Path(entry["image"]).stem.rsplit("_", 1)[1]) for entry in entries]
    boxes = {str(n): {"a cup": {"detections": {"cup": [[0, [1, 2, 30, 40]]]}, "split": "test"}} for n in numbers[:3]}
    (data / "coco" / "coco_entities_release.json").write_text(json.dumps(boxes))
    (found,) = check_data_folder(data / "coco")
    entities = found.parts[2]
    assert (entities.state, entities.found, entities.wanted) == ("there", 3, 4)
    assert entries[3]["image"] in entities.remark


def test_without_annotations_the_pictures_cannot_be_told(data: Path) -> None:
    shutil.rmtree(data / "flickr30k" / "annotations")
    assert states(data / "flickr30k") == {
        "flickr30k": {"annotations": "missing", "pictures": "incomplete", "entities": "incomplete"}
    }


def test_a_broken_annotation_is_shown_with_the_reader_s_words(data: Path) -> None:
    (data / "flickr30k" / "annotations" / "test.json").write_text("[{]")
    (found,) = check_data_folder(data / "flickr30k")
    assert found.parts[0].state == "incomplete"
    assert "cannot read the annotation" in found.parts[0].remark
    assert not found.complete


def test_an_empty_folder_is_told_about_both_and_a_missing_one_is_bad_input(tmp_path: Path, capsys) -> None:
    assert run(["data", "check", str(tmp_path)]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    for words in ("Flickr30K", "COCO", "flickr30k_test.json", "coco_karpathy_test.json", "val2014.zip"):
        assert words in shown
    with pytest.raises(InputError) as caught:
        check_data_folder(tmp_path / "nowhere")
    assert caught.value.code == "data-folder"
    assert run(["data", "check", str(tmp_path / "nowhere")]) == 2


def test_what_is_called_complete_is_what_eval_reads(data: Path) -> None:
    """The reader itself is the judge: a box that it refuses makes the data set incomplete."""
    (xml, *_) = sorted((data / "flickr30k" / "flickr30k_entities" / "Annotations").glob("*.xml"))
    xml.write_text("<annotation><object></annotation>")
    found = [one for split in ("val", "test") for one in check_data_folder(data / "flickr30k", split)]
    assert [one.complete for one in found].count(False) == 1
    assert {one.problem_code for one in found} == {None, "box-file-xml"}
