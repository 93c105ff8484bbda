"""`Detector`: what it finds, which options keep it, and bundles that cannot be used."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qpert.runtime import Boxes, BoxSource, Detector, Retriever
from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.detection.bundle import DetectorBundle
from qpert.runtime.detection.geometry import DetectorGeometry
from qpert.runtime.detection.opening import open_bundle
from qpert.runtime.detection.options import overlaps, suppressed
from qpert.runtime.detection.source import boxes_of
from qpert.runtime.errors import BoxError, BundleError, ImageError, InputError, LimitError, UnavailableError

BLACK = Image.new("RGB", (64, 64))


def test_a_detector_is_a_box_source(known_detector: Path) -> None:
    with Detector.open(known_detector) as detector:
        assert isinstance(detector, BoxSource)
        assert detector.boxes([]) == []
    assert not isinstance(Boxes.empty((3, 3)), BoxSource)


@pytest.mark.parametrize(
    ("options", "labels"),
    [
        ({}, ("cup", "bus")),  # the star is where the cup is: a duplicate, whatever its class
        ({"suppression": 1.0}, ("cup", "bus", "star")),
        ({"suppression": 1.0, "max_boxes": 2}, ("cup", "bus")),
        ({"threshold": 0.6, "suppression": 1.0}, ("cup", "bus")),
        ({"classes": ["star", "bus"]}, ("bus", "star")),  # classes first: the cup suppresses nothing
        ({"classes": ["star"], "threshold": 0.54001}, None),
        ({"threshold": 0.9}, None),
        ({"max_boxes": 1}, ("cup",)),
    ],
)
def test_options_keep_these(known_detector: Path, options: dict, labels: tuple[str, ...] | None) -> None:
    with Detector.open(known_detector, **options) as detector:
        (found,) = detector.boxes([BLACK])
    assert (None if found is None else found.labels) == labels
    if found is not None:
        assert found.size == (64, 64)
        assert list(found.scores) == sorted(found.scores, reverse=True)


def test_the_bundle_records_defaults_and_the_caller_changes_them(
    known_detector: Path, copy_of: Callable, edit_manifest: Callable
) -> None:
    folder = copy_of(known_detector)
    recorded = {"threshold": 0.6, "max_boxes": 5, "classes": ["bus", "star"], "suppression": 1}
    edit_manifest(folder, lambda values: values.update(defaults=recorded))
    with Detector.open(folder) as detector:
        assert detector.boxes([BLACK])[0].labels == ("bus",)
        assert detector.options.to_dict() == recorded
    with Detector.open(folder, threshold=0.5) as detector:
        assert detector.boxes([BLACK])[0].labels == ("bus", "star")


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"threshold": 1.5}, "detection-option"),
        ({"threshold": float("nan")}, "detection-option"),
        ({"suppression": -0.1}, "detection-option"),
        ({"suppression": True}, "detection-option"),
        ({"max_boxes": 0}, "detection-option"),
        ({"max_boxes": 2.5}, "detection-option"),
        ({"classes": "cup"}, "detection-option"),
        ({"classes": ["cups"]}, "detection-class"),
        ({"provider": "tpu"}, "provider"),
    ],
)
def test_options_that_cannot_be_used_are_refused(known_detector: Path, options: dict, code: str) -> None:
    with pytest.raises(InputError) as caught:
        Detector.open(known_detector, **options)
    assert caught.value.code == code


def test_overlap_is_intersection_over_union() -> None:
    box, others = (
        np.array([0.0, 0, 10, 10]),
        np.array([[0.0, 0, 10, 10], [5, 0, 15, 10], [20, 20, 30, 30], [0, 0, 10, 5]]),
    )
    np.testing.assert_allclose(overlaps(box, others), [1, 50 / 150, 0, 50 / 100])


def test_a_box_is_suppressed_by_those_that_are_kept_and_not_by_suppressed_ones() -> None:
    """A chain: neighbours overlap by 0.6, and the next but one by 1/3."""
    xyxy = np.array([[0.0, 0, 8, 1], [2, 0, 10, 1], [4, 0, 12, 1], [6, 0, 14, 1]])
    order = np.arange(4)
    assert suppressed(xyxy, order, 0.5, 10).tolist() == [0, 2]
    assert suppressed(xyxy, order[::-1], 0.5, 10).tolist() == [3, 1]
    assert suppressed(xyxy, order, 0.7, 10).tolist() == [0, 1, 2, 3]
    assert suppressed(xyxy, order, 0.3, 10).tolist() == [0, 3]
    assert suppressed(xyxy, order, 0.7, 2).tolist() == [0, 1]


def test_a_letterbox_keeps_the_proportion_and_declares_order_scale_and_filling() -> None:
    geometry = DetectorGeometry(8, 6, "letterbox", "bgr", 1.0, (0, 0, 0), (1, 1, 1), pad_value=114)
    values = geometry.pixel_values([Image.new("RGB", (16, 4), (10, 20, 30)), Image.new("RGB", (3, 12), (1, 2, 3))])
    assert values.shape == (2, 3, 6, 8)
    assert values[0, :, :2].reshape(3, -1).T.tolist() == [[30, 20, 10]] * 16  # 16×4 at half its size, blue first
    assert (values[0, :, 2:] == 114).all()
    assert (values[1, :, :, 1:] == 114).all()  # 3×12 at half its size is 1 column wide
    assert values[1, :, 0, 0].tolist() == [3, 2, 1]


def test_a_stretch_scales_and_normalises_in_the_order_of_the_channels() -> None:
    geometry = DetectorGeometry(2, 3, "stretch", "rgb", 1 / 255, (0.5, 0.4, 0.3), (0.2, 0.5, 0.1))
    values = geometry.pixel_values([Image.new("RGB", (5, 5), (255, 102, 0))])
    np.testing.assert_allclose(values[0, :, 0, 0], [2.5, 0, -3], atol=1e-6)
    assert values.shape == (1, 3, 3, 2)


@pytest.mark.parametrize(
    "change",
    [
        *({"width": 0}, {"fit": "crop"}, {"channels": "grb"}, {"scale": 0}, {"std": (0, 1, 1)}, {"pad_value": 300}),
        *({"mean": (0, 1)}, {"resample": "nearest"}, {"scale": float("inf")}),
    ],
)
def test_a_geometry_that_cannot_be_used_is_refused(change: dict) -> None:
    values = {"width": 8, "height": 6, "fit": "stretch", "channels": "rgb", "scale": 1, "mean": (0, 0, 0)}
    with pytest.raises(InputError) as caught:
        DetectorGeometry(**(values | {"std": (1, 1, 1)} | change))
    assert caught.value.code == "detector-geometry"


def test_pictures_that_are_none_are_refused_with_their_place(known_detector: Path) -> None:
    with Detector.open(known_detector) as detector:
        with pytest.raises(ImageError) as caught:
            detector.boxes(BLACK)
        assert caught.value.code == "images-kind"
        with pytest.raises(ImageError, match="image 9 has zero size"):
            detector.boxes([BLACK] * 9 + [Image.new("RGB", (0, 5))])


def test_pictures_are_split_into_the_batches_that_the_graph_takes(known_detector: Path) -> None:
    pictures = [Image.new("RGB", (64, 64), (v, v, v)) for v in range(0, 190, 10)]  # 19, at most 8 a call
    with Detector.open(known_detector) as detector:
        together = detector.boxes(pictures)
        alone = [detector.boxes([picture])[0] for picture in pictures]
    brightness = [boxes.scores[boxes.labels.index("bus")] for boxes in together]
    np.testing.assert_allclose(brightness, [(0.7 + 0.1 * v / 255) * 0.9 for v in range(0, 190, 10)], rtol=1e-5)
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_array_equal(one.xyxy, other.xyxy)


def test_a_detector_is_no_bundle_for_search_and_the_other_way_round(known_detector: Path, tiny_bundle: Path) -> None:
    with pytest.raises(BundleError, match="--detector") as caught:
        Bundle.open(known_detector)
    assert caught.value.code == "bundle-is-detector"
    with pytest.raises(BundleError, match="qpert export detector") as caught:
        Detector.open(tiny_bundle)
    assert caught.value.code == "bundle-no-detector"
    assert isinstance(open_bundle(known_detector), DetectorBundle)
    assert isinstance(open_bundle(tiny_bundle), Bundle)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda v: v.update(schema_version=2), "bundle-schema-newer"),
        (lambda v: v.pop("labels"), "manifest-fields"),
        (lambda v: v.update(labels=["cup", 7]), "manifest-fields"),
        (lambda v: v["preprocessing"].update(fit="crop"), "manifest-fields"),
        (lambda v: v["preprocessing"].update(width=32), "manifest-fields"),
        (lambda v: v["defaults"].update(classes=["horse"]), "manifest-fields"),
        (lambda v: v["graphs"]["detector"].update(role="image_tower"), "manifest-fields"),
        (lambda v: v["graphs"]["detector"].update(file="../outside.onnx"), "bundle-path"),
        (lambda v: v.update(files={}), "manifest-unhashed"),
        (lambda v: v["files"].update({"onnx/detector.onnx": "0" * 64}), "bundle-file-altered"),
        (lambda v: v["files"].update({"onnx/more.onnx": "0" * 64}), "bundle-file-missing"),
        (lambda v: v["graphs"]["detector"]["outputs"][0].update(name="boxen"), "graph-signature"),
    ],
)
def test_a_manifest_that_cannot_be_trusted_is_refused(
    known_detector: Path, copy_of: Callable, edit_manifest: Callable, change: Callable, code: str
) -> None:
    folder = copy_of(known_detector)
    edit_manifest(folder, change)
    with pytest.raises(BundleError) as caught:
        Detector.open(folder)
    assert caught.value.code == code


def test_label_ids_beyond_the_labels_are_an_error_and_no_crash(
    known_detector: Path, copy_of: Callable, edit_manifest: Callable
) -> None:
    folder = copy_of(known_detector)
    edit_manifest(folder, lambda values: values.update(labels=["cup", "star"]))
    with Detector.open(folder) as detector, pytest.raises(BundleError) as caught:
        detector.boxes([BLACK])
    assert caught.value.code == "detector-output"


def test_engines_that_are_not_there_are_not_replaced(known_detector: Path) -> None:
    with pytest.raises(UnavailableError):
        Detector.open(known_detector, provider="rtx")


def test_a_copied_or_pickled_detector_finds_the_same(known_detector: Path) -> None:
    with Detector.open(known_detector, suppression=1.0) as detector:
        expected = detector.boxes([BLACK])[0]
        for other in (pickle.loads(pickle.dumps(detector)), copy.deepcopy(detector)):
            np.testing.assert_array_equal(other.boxes([BLACK])[0].xyxy, expected.xyxy)
            assert other.identity == detector.identity
            other.close()


def test_the_identity_is_that_of_graph_preprocessing_and_options(known_detector: Path) -> None:
    with Detector.open(known_detector) as one, Detector.open(known_detector, threshold=0.31) as other:
        assert json.loads(json.dumps(one.identity)) == one.identity
        differing = {key for key in one.identity if one.identity[key] != other.identity[key]}
    assert differing == {"options"}


def test_it_runs_where_neither_torch_nor_onnx_nor_transformers_can_be_imported(known_detector: Path) -> None:
    program = (
        "import sys\n"
        "for name in ('torch', 'onnx', 'transformers', 'tensorrt', 'tensorrt_rtx'): sys.modules[name] = None\n"
        "from PIL import Image\nfrom qpert.runtime import Detector\n"
        "print(Detector.open(sys.argv[1]).boxes([Image.new('RGB', (64, 64))])[0].labels)"
    )
    answer = subprocess.run([sys.executable, "-c", program, known_detector], capture_output=True, text=True, check=True)
    assert answer.stdout == "('cup', 'bus')\n"


class Fixed:
    """A `BoxSource` of somebody else."""

    def __init__(self, answer: object) -> None:
        self.answer = answer

    def boxes(self, images: list) -> object:
        return self.answer


@pytest.mark.parametrize("answer", [None, [], [[0, 0, 1, 1]], [Boxes.empty((5, 5))], [None, None], (None,)])
def test_a_source_that_returns_something_else_is_an_error(answer: object) -> None:
    with pytest.raises(BoxError) as caught:
        boxes_of(Fixed(answer), [BLACK])
    assert caught.value.code == "box-source"


def test_a_retriever_takes_a_source_in_place_of_boxes(known_detector: Path, tiny_bundle: Path) -> None:
    pictures = [BLACK, Image.new("RGB", (100, 70), "white")]
    with Retriever.open(tiny_bundle) as retriever, Detector.open(known_detector) as detector:
        given = retriever.encode_images(pictures, detector.boxes(pictures))
        found = retriever.encode_images(pictures, detector)
        without = retriever.encode_images(pictures)
        np.testing.assert_array_equal(given.query_embeds, found.query_embeds)
        assert np.abs(found.query_embeds - without.query_embeds).max() > 1e-3
        texts = ["a cup", "a red bus"]
        by_source = retriever.search_texts(pictures[0], texts, boxes=detector)
        by_boxes = retriever.search_texts(pictures[0], texts, boxes=detector.boxes(pictures)[0])
    assert [(hit.text, hit.score) for hit in by_source] == [(hit.text, hit.score) for hit in by_boxes]


def test_more_boxes_than_the_bundle_takes_name_both_numbers_unless_the_best_are_asked_for(tiny_bundle: Path) -> None:
    """The tiny bundle takes 4 boxes."""
    many = Boxes([[i, 0, i + 5, 9] for i in range(6)], (64, 64))
    with Retriever.open(tiny_bundle) as retriever, pytest.raises(LimitError, match=r"6 boxes.*up to 4.*--max-boxes 4"):
        retriever.encode_images([BLACK], Fixed([many]))
