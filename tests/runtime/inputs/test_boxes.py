"""Boxes: what is accepted, what is clipped aloud, what is refused."""

import warnings

import numpy as np
import pytest

from qpert.runtime.errors import BoxError, QpertWarning
from qpert.runtime.inputs.boxes import Boxes, one_warning_a_kind

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


@pytest.mark.parametrize(
    "box",
    [
        (640, 0, 650, 9),
        (640.0003, 10, 645, 15),
        (0, 480, 9, 490),
        (0, 480.9, 9, 490),
        (-9, 0, 0, 9),
        (-9, 0, -0.5, 9),
        (0, -9, 9, 0),
    ],
)
def test_a_box_that_misses_the_image_by_less_than_a_pixel_is_left_out_with_a_warning(box):
    given = [(1, 2, 3, 4), box, (5, 6, 7, 8)]
    with pytest.warns(QpertWarning, match=r"^b: box \(.*\) lay just outside the image of 640×480 pixels: left out$"):
        boxes = Boxes(given, SIZE, scores=[0.1, 0.2, 0.3], labels=["x", "y", "z"], sources=["a", "b", "c"])
    np.testing.assert_array_equal(boxes.xyxy, [(1, 2, 3, 4), (5, 6, 7, 8)])
    np.testing.assert_array_equal(boxes.scores, [0.1, 0.3])
    assert (boxes.labels, boxes.sources) == (("x", "z"), ("a", "c"))
    assert not boxes.scores.flags.writeable
    assert (boxes.areas > 0).all()


@pytest.mark.parametrize("box", [(639.9997, 0, 650, 9), (0, 479.9997, 9, 490), (-9, 0, 0.0003, 9), (0, -9, 9, 0.0003)])
def test_a_box_with_a_sliver_inside_the_image_is_clipped_to_the_sliver(box):
    with pytest.warns(QpertWarning, match="clipped to it"):
        boxes = Boxes([box], SIZE)
    x1, y1, x2, y2 = boxes.xyxy[0].tolist()
    assert (x1, y1, x2, y2) == (max(box[0], 0), max(box[1], 0), min(box[2], 640), min(box[3], 480))
    assert 0 < boxes.areas[0] < 1e-5


@pytest.mark.parametrize("box", [(641, 0, 650, 9), (0, 481, 9, 490), (-9, 0, -1, 9), (0, -9, 9, -1)])
def test_a_box_that_misses_the_image_by_a_pixel_or_more_is_an_error(box):
    with pytest.raises(BoxError) as caught:
        Boxes([box], SIZE)
    assert caught.value.code == "box-outside"


def test_warnings_about_many_images_are_one_a_kind_with_the_counts_of_all():
    def many():
        with one_warning_a_kind():
            for _ in range(3):
                Boxes([(0, 0, 700, 9), (0, 0, 9, 500)], SIZE)
            Boxes([(640, 0, 650, 9)], SIZE)
            warnings.warn("another matter", DeprecationWarning, stacklevel=1)

    with pytest.warns() as said:
        many()
    found = [str(one.message) for one in said]
    assert len(found) == 3
    assert "another matter" in found[0]
    assert found[1].endswith("clipped to it (in all 6 boxes of 3 images)")
    assert found[2].endswith("left out")


def test_a_box_inside_the_image_is_not_warned_about():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(Boxes([[0, 0, 640, 480]], SIZE)) == 1


@pytest.mark.parametrize(
    ("xyxy", "message"),
    [
        ([[0, 0, 1, 1], [5, 5, np.nan, 9]], r"box 1 \(5, 5, nan, 9\) is not finite"),
        ([[0, 0, np.inf, 1]], "box 0 .* is not finite"),
        ([[10, 0, 5, 9]], "box 0 .* is inverted; expected x1 < x2"),
        ([[0, 9, 5, 2]], "box 0 .* is inverted"),
        ([[5, 0, 5, 9]], "box 0 .* is empty"),
        ([[0, 3, 5, 3]], "box 0 .* is empty"),
        ([[0, 0, 1, 1], [641, 0, 650, 9]], "box 1 .* lies outside the image of 640×480"),
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


def test_the_best_boxes_keep_their_order_names_and_scores():
    corners = [[i, 0, i + 5, 5] for i in range(4)]
    boxes = Boxes(corners, (20, 10), scores=[0.5, 0.9, 0.5, 0.7], labels=tuple("abcd"))
    best = boxes.best(3)
    assert best.labels == ("a", "b", "d"), "of equal scores the first"
    assert best.scores.tolist() == [0.5, 0.9, 0.7]
    assert best.xyxy.tolist() == [corners[0], corners[1], corners[3]]
    assert boxes.best(4) is boxes
    assert Boxes.empty((20, 10)).best(1).xyxy.shape == (0, 4)


def test_boxes_without_scores_have_no_best():
    boxes = Boxes([[i, 0, i + 5, 5] for i in range(4)], (20, 10), sources=tuple(f"file:{i}" for i in range(4)))
    with pytest.raises(BoxError, match="4 boxes without scores, at most 2 are to be kept") as error:
        boxes.best(2)
    assert error.value.code == "boxes-without-scores"
    assert len(boxes.best(4)) == 4
