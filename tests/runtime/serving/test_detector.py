"""`qpert serve --detector`: pictures that come without boxes get those that the detector finds, as in Python."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from raw_yolox import export_raw_yolox
from running_service import RunningService, array_of, data_uri, running

from qpert.runtime import Retriever
from qpert.runtime.cli import run
from qpert.runtime.detection.detector import Detector
from qpert.runtime.gallery.catalogue import open_catalogue

SUPPRESS = 0.9  # of three detections in each picture two share their place: two boxes are left


@pytest.fixture(scope="module")
def detector_folder(made_once: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("raw-yolox")
    return made_once("known-detector", lambda out: export_raw_yolox(work, out))


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("detected") / "gallery"


@pytest.fixture(scope="module")
def finding(demo_bundle: Path, detector_folder: Path, gallery: Path) -> Iterator[RunningService]:
    arguments = ["--detector", detector_folder, "--detector-suppress", SUPPRESS, "--max-boxes", 8, "--gallery", gallery]
    with running(demo_bundle, *arguments) as found:
        yield found


@pytest.fixture(scope="module")
def detector(detector_folder: Path) -> Iterator[Detector]:
    with Detector.open(detector_folder, suppression=SUPPRESS, max_boxes=8, threads=1) as found:
        yield found


def embedding(service: RunningService, picture: dict) -> np.ndarray:
    body = {"input": [picture], "encoding_format": "base64"}
    return array_of(service.client.post("/v1/embeddings", json=body).json()["data"][0])


def test_boxes_are_found_where_none_are_given(finding, detector, retriever: Retriever, photos) -> None:
    found = retriever.encode_images(photos[:2], boxes=detector).query_embeds
    without = retriever.encode_images(photos[:2]).query_embeds
    assert not np.array_equal(found, without)
    for photo, expected, plain in zip(photos[:2], found, without, strict=True):
        np.testing.assert_array_equal(embedding(finding, {"image": data_uri(photo)}), expected)
        np.testing.assert_array_equal(embedding(finding, {"image": data_uri(photo), "boxes": None}), expected)
        np.testing.assert_array_equal(embedding(finding, {"image": data_uri(photo), "boxes": []}), plain)


def test_given_boxes_are_the_ones_that_count(finding, retriever: Retriever, photos, photo_boxes) -> None:
    expected = retriever.encode_images([photos[0]], [photo_boxes[0]]).query_embeds[0]
    picture = {"image": data_uri(photos[0]), "boxes": photo_boxes[0].xyxy.tolist()}
    np.testing.assert_array_equal(embedding(finding, picture), expected)


def test_a_form_without_boxes_is_detected_too(finding, detector, retriever: Retriever, photos) -> None:
    files = [("input", (photo.name, photo.read_bytes())) for photo in photos[:2]]
    data = {"boxes": json.dumps([None, []]), "encoding_format": "base64"}
    first, second = finding.client.post("/v1/embeddings", files=files, data=data).json()["data"]
    np.testing.assert_array_equal(array_of(first), retriever.encode_images([photos[0]], detector).query_embeds[0])
    np.testing.assert_array_equal(array_of(second), retriever.encode_images([photos[1]]).query_embeds[0])


def test_pictures_that_are_added_are_those_that_index_would_add(
    finding, detector_folder: Path, gallery: Path, demo_bundle: Path, photos, tmp_path: Path
) -> None:
    images = [{"name": photo.name, "image": data_uri(photo)} for photo in photos]
    images[0]["boxes"] = []
    answer = finding.client.post("/v1/images", json={"images": images})
    assert answer.status_code == 200, answer.text
    assert answer.json()["added"] == len(photos)
    again = finding.client.post("/v1/images", json={"images": images}).json()
    assert (again["added"], again["unchanged"]) == (0, len(photos))
    (tmp_path / "photos").mkdir()
    for photo in photos[1:]:
        (tmp_path / "photos" / photo.name).write_bytes(photo.read_bytes())
    index = ["index", str(demo_bundle), str(tmp_path / "photos"), "--out", str(tmp_path / "gallery")]
    options = ["--detector", str(detector_folder), "--detector-suppress", str(SUPPRESS), "--max-boxes", "8"]
    assert run([*index, *options]) == 0
    served, indexed = open_catalogue(gallery), open_catalogue(tmp_path / "gallery")
    for photo in photos[1:]:
        assert served.image(photo.name).boxes == indexed.image(photo.name).boxes  # the detector's identity included
    assert json.loads(served.image(photos[0].name).boxes)["xyxy"] == []
    shown = finding.client.get(f"/v1/images/{photos[1].name}").json()
    assert len(shown["boxes"]) == 2


def test_the_model_names_its_detector(finding, service, detector: Detector) -> None:
    assert finding.client.get("/v1/models").json()["data"][0]["detector"] == detector.manifest.checkpoint.name
    assert service.client.get("/v1/models").json()["data"][0]["detector"] is None


def test_a_detector_of_more_boxes_than_the_bundle_takes_is_refused_at_the_start(
    tiny_bundle: Path, detector_folder: Path, capsys: pytest.CaptureFixture
) -> None:
    assert run(["serve", str(tiny_bundle), "--detector", str(detector_folder), "--port", "0"]) == 2
    error = capsys.readouterr().err
    assert "keeps up to 32 boxes of a picture, this bundle takes up to 4" in error
    assert "--max-boxes 4" in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-boxes", "3"], "--max-boxes needs --detector"),
        (["--detector-threshold", "0.5"], "--detector-threshold needs --detector"),
        (["--detector", "nowhere"], "nowhere"),
    ],
)
def test_wrong_options(tiny_bundle: Path, options: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert run(["serve", str(tiny_bundle), *options, "--port", "0"]) == 2
    assert message in capsys.readouterr().err
