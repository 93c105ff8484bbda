"""Boxes: what is accepted, what is clipped aloud, what is refused."""

import warnings

import numpy as np
import pytest

from qpert.runtime.errors import BoxError, QpertWarning
from qpert.runtime.inputs.boxes import Boxes

SIZE = (640, 480)


def test_boxes_are_kept_as_read_only_float64_copies():
    given = np.array([[0, 0, 640, 480], [10, 20, 30, 40]])
    boxes = Boxes(given, SIZE, scores=[0.5, 1], labels=["all", "part"])
    given[0, 0] = 99
    np.testing.assert_array_equal(boxes.xyxy, [[0, 0, 640, 480], [10, 20, 30, 40]])
    assert boxes.xyxy.dtype == np.float64
    assert not boxes.xyxy.flags.writeable
    np.testing.assert_array_equal(boxes.scores, [0.5, 1])
    assert boxes.labels == ("all", "part")
    assert len(boxes) == 2
    assert boxes.size == SIZE


def test_a_list_of_corners_is_accepted():
    assert len(Boxes([[1, 2, 3, 4]], (np.int64(10), 10))) == 1


def test_areas_are_fractions_of_the_image():
    np.testing.assert_allclose(Boxes([[0, 0, 640, 480], [0, 0, 320, 120]], SIZE).areas, [1, 0.125])


def test_an_image_may_have_no_boxes():
    boxes = Boxes.empty(SIZE)
    assert len(boxes) == 0
    assert boxes.xyxy.shape == (0, 4)
    assert boxes.areas.shape == (0,)


def test_coordinates_outside_the_image_are_clipped_with_one_warning():
    with pytest.warns(QpertWarning, match=r"box 1 \(-5, 10, 700, 20\) and 1 more reached out .* 640×480") as said:
        boxes = Boxes([[0, 0, 5, 5], [-5, 10, 700, 20], [1, 1, 2, 481]], SIZE)
    np.testing.assert_array_equal(boxes.xyxy, [[0, 0, 5, 5], [0, 10, 640, 20], [1, 1, 2, 480]])
    assert len(said) == 1
    assert said[0].filename == __file__


def test_a_box_inside_the_image_is_not_warned_about():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Boxes([[0, 0, 640, 480]], SIZE)


@pytest.mark.parametrize(
    ("xyxy", "message"),
    [
        ([[0, 0, 1, 1], [5, 5, np.nan, 9]], r"box 1 \(5, 5, nan, 9\) is not finite"),
        ([[0, 0, np.inf, 1]], "box 0 .* is not finite"),
        ([[10, 0, 5, 9]], "box 0 .* is inverted; expected x1 < x2"),
        ([[0, 9, 5, 2]], "box 0 .* is inverted"),
        ([[5, 0, 5, 9]], "box 0 .* is empty"),
        ([[0, 3, 5, 3]], "box 0 .* is empty"),
        ([[0, 0, 1, 1], [640, 0, 650, 9]], "box 1 .* lies outside the image of 640×480"),
        ([[-9, 0, -1, 9]], "box 0 .* lies outside"),
        ([1, 2, 3, 4], r"shape \[4\]; expected \[O,4\]"),
        ([[1, 2, 3]], r"shape \[1, 3\]"),
        ([[1, 2, 3, 4], [1, 2]], "expected an array of numbers"),
        ([["a", "b", "c", "d"]], "dtype <U1; expected numbers"),
        (None, "dtype object"),
    ],
)
def test_what_is_no_box_is_an_error_that_names_it(xyxy, message):
    with pytest.raises(BoxError, match=message):
        Boxes(xyxy, SIZE)


def test_a_box_that_was_read_from_a_file_is_named_by_its_place_there():
    with pytest.raises(BoxError, match=r"^boxes.csv:7: box .* is empty"):
        Boxes([[1, 1, 2, 2], [1, 1, 1, 2]], SIZE, sources=("boxes.csv:3", "boxes.csv:7"))


@pytest.mark.parametrize("size", [(0, 5), (5, -1), (5,), (5, 5, 3), 5, None, (5.0, 5.0), (True, True), "ab"])
def test_a_size_that_is_none_is_an_error(size):
    with pytest.raises(BoxError, match=r"expected the image's \(width, height\)"):
        Boxes([[0, 0, 1, 1]], size)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"scores": [0.5, 0.5]}, "expected 1 finite numbers"),
        ({"scores": [np.nan]}, "expected 1 finite numbers"),
        ({"labels": ["a", "b"]}, "labels are .* expected 1 strings"),
        ({"labels": "a"}, "labels are 'a'"),
        ({"labels": [7]}, "expected 1 strings"),
    ],
)
def test_scores_and_labels_are_one_for_each_box(extra, message):
    with pytest.raises(BoxError, match=message):
        Boxes([[0, 0, 1, 1]], SIZE, **extra)
