"""Masks and weights against cases worked by hand, supersampling, and torch's bilinear interpolation."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qpert.exporter.references.boxes import mask as reference_mask
from qpert.runtime.errors import InputError, LimitError
from qpert.runtime.inputs.boxes import Boxes
from qpert.runtime.inputs.perturbation import WEIGHT_FUNCTIONS, Perturbation, box_weights, object_masks
from qpert.runtime.inputs.preprocessing import ImagePreprocessing
from qpert.runtime.inputs.token_grid import TokenGrid


def squashed(grid, image_size):
    return TokenGrid(grid, grid, image_size // grid, 1, ImagePreprocessing(image_size))


def mask(box, size=(80, 40), *, grid=4, image_size=56, coverage="exact"):
    """One box's [grid, grid] mask; CLS is checked and left out."""
    masks = object_masks([Boxes([box], size)], grid=squashed(grid, image_size), coverage=coverage)
    assert masks.shape == (1, 1, grid**2 + 1)
    assert masks.dtype == np.float32
    assert masks[0, 0, 0] == 0
    return masks[0, 0, 1:].reshape(grid, grid)


def grid_with(cells, grid=4):
    expected = np.zeros((grid, grid))
    for (row, column), value in cells.items():
        expected[row, column] = value
    return expected


@pytest.mark.parametrize(  # the image is 80×40, so a cell of the 4×4 grid is 20×10 pixels
    ("box", "cells"),
    [
        ((20, 10, 40, 20), {(1, 1): 1}),
        ((60, 0, 80, 10), {(0, 3): 1}),
        ((0, 30, 10, 40), {(3, 0): 0.5}),
        ((0, 30, 20, 35), {(3, 0): 0.5}),
        ((10, 0, 30, 10), {(0, 0): 0.5, (0, 1): 0.5}),
        ((15, 5, 30, 20), {(0, 0): 0.125, (0, 1): 0.25, (1, 0): 0.25, (1, 1): 0.5}),
        ((21, 11, 22, 12), {(1, 1): 1 / 200}),
    ],
)
def test_exact_coverage_is_the_fraction_of_each_patch_inside_the_box(box, cells):
    np.testing.assert_allclose(mask(box), grid_with(cells), atol=1e-7)
    np.testing.assert_array_equal(mask(box, coverage="binary"), grid_with(dict.fromkeys(cells, 1)))


@pytest.mark.parametrize("coverage", ["exact", "binary", "dilated"])
def test_a_box_over_the_whole_image_covers_every_patch(coverage):
    np.testing.assert_array_equal(mask((0, 0, 80, 40), coverage=coverage), 1)


def test_a_box_up_to_a_patch_border_does_not_touch_the_next_patch():
    boxes = Boxes([[0, 0, 639 * k / 13, 7] for k in range(1, 14)], (639, 7))
    masks = object_masks([boxes], grid=squashed(13, 182), coverage="exact")[0, :, 1:14]
    np.testing.assert_allclose(masks, np.tril(np.ones((13, 13))), atol=1e-12)


def test_a_box_from_a_patch_border_on_does_not_touch_the_patch_before():
    touched = mask((15, 0, 26, 26), (26, 26), grid=26, image_size=364, coverage="binary")[0]
    np.testing.assert_array_equal(touched, [0] * 15 + [1] * 11)  # 15 / 26 * 26 is just below 15 in floating point


sides = st.integers(1, 90)
fractions = st.floats(0, 1)


@st.composite
def boxes_in_images(draw):
    width, height = draw(sides), draw(sides)
    x1, x2 = sorted((draw(fractions) * width, draw(fractions) * width))
    y1, y2 = sorted((draw(fractions) * height, draw(fractions) * height))
    if x2 - x1 < 1e-3 or y2 - y1 < 1e-3:
        x1, y1, x2, y2 = 0, 0, width, height
    return (x1, y1, x2, y2), (width, height)


@given(boxes_in_images(), st.sampled_from([1, 3, 8]))
@settings(max_examples=40)
def test_exact_coverage_is_what_supersampling_counts(case, grid):
    box, size = case
    points = 400  # a cell along each side; a box has two edges there, each off by half a point at most
    at = (np.arange(grid * points) + 0.5) / (grid * points)
    in_x = ((at * size[0] >= box[0]) & (at * size[0] < box[2])).reshape(grid, points).mean(axis=1)
    in_y = ((at * size[1] >= box[1]) & (at * size[1] < box[3])).reshape(grid, points).mean(axis=1)
    np.testing.assert_allclose(mask(box, size, grid=grid, image_size=grid * 14), np.outer(in_y, in_x), atol=2 / points)


@given(boxes_in_images(), st.sampled_from([(2, 28), (4, 56), (3, 21)]))
@settings(max_examples=80)
def test_dilated_coverage_is_the_pixel_mask_through_torchs_bilinear_resize(case, geometry):
    torch = pytest.importorskip("torch")
    (x1, y1, x2, y2), (width, height) = case
    grid, image_size = geometry
    pixels = torch.zeros(1, 1, height, width, dtype=torch.float64)
    pixels[..., int(y1) : int(y2), int(x1) : int(x2)] = 1
    resized = torch.nn.functional.interpolate(pixels, (image_size, image_size), mode="bilinear", align_corners=False)
    least = 1 / (2 * image_size) ** 2  # the smallest share that is one, times two sides; torch rounds 0 to 1e-16
    expected = torch.nn.functional.avg_pool2d((resized > least / 2).double(), image_size // grid)[0, 0].numpy()
    actual = mask(case[0], case[1], grid=grid, image_size=image_size, coverage="dilated")
    np.testing.assert_allclose(actual, expected, atol=1e-6)


def test_a_pixel_centre_that_falls_on_a_centre_has_no_share_of_the_pixel_before():
    """10.5 · 59/21 − 0.5 is 29; in float64 it comes out below, and pixel 28, the box's last one, would count."""
    profile = mask((0, 0, 29.5, 1), (59, 1), grid=3, image_size=21, coverage="dilated")
    np.testing.assert_allclose(profile, np.tile([1, 3 / 7, 0], (3, 1)), atol=1e-6)  # float32 rounding of 3/7


def test_dilated_coverage_reaches_further_than_the_box():
    dilated = mask((20, 10, 40, 20), coverage="dilated")
    assert dilated[1, 1] == 1
    assert dilated[0, 1] > 0
    assert dilated[3, 3] == 0


def test_a_box_that_truncation_leaves_empty_covers_nothing_when_dilated():
    np.testing.assert_array_equal(mask((10.2, 10, 10.8, 20), coverage="dilated"), 0)


def test_a_ragged_batch_is_padded_with_empty_masks_and_zero_weights():
    boxes = [Boxes([[0, 0, 8, 8]], (8, 8)), None, Boxes([[0, 0, 4, 8], [4, 0, 8, 8]], (8, 8)), Boxes.empty((8, 8))]
    masks = object_masks(boxes, grid=squashed(2, 28), coverage="exact")
    weights = box_weights(boxes, Perturbation())
    assert masks.shape == (4, 2, 5)
    np.testing.assert_array_equal(masks[0], [[0, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(masks[2], [[0, 1, 0, 1, 0], [0, 0, 1, 0, 1]])
    np.testing.assert_array_equal(masks[[1, 3]], 0)
    np.testing.assert_array_equal(weights, [[8, 0], [0, 0], [8, 8], [0, 0]])
    assert weights.dtype == np.float32


def test_no_boxes_at_all_give_arrays_without_boxes_or_padded_ones():
    assert object_masks([None, None], grid=squashed(2, 28), coverage="exact").shape == (2, 0, 5)
    assert object_masks([None], grid=squashed(2, 28), coverage="exact", pad_to=3).shape == (1, 3, 5)
    assert box_weights([None, None], Perturbation()).shape == (2, 0)
    assert box_weights([None], Perturbation(), pad_to=3).shape == (1, 3)


def test_more_boxes_than_fit_are_an_error():
    boxes = [None, Boxes([[0, 0, 1, 1]] * 3, (8, 8))]
    with pytest.raises(LimitError, match="image 1 has 3 boxes; at most 2 fit"):
        object_masks(boxes, grid=squashed(2, 28), coverage="exact", pad_to=2)
    with pytest.raises(LimitError, match="image 1 has 3 boxes"):
        box_weights(boxes, Perturbation(), pad_to=2)


def test_one_boxes_in_place_of_a_list_is_an_error():
    with pytest.raises(InputError, match="put it in a list"):
        box_weights(Boxes([[0, 0, 1, 1]], (8, 8)), Perturbation())


@pytest.mark.parametrize("numbers", [(4, 4, 8, 1), (0, 4, 7, 1), (4, 4, 0, 1), (4, 4, 7, -1)])
def test_a_grid_that_does_not_fit_into_the_image_is_an_error(numbers):
    with pytest.raises(InputError) as caught:
        TokenGrid(*numbers, ImagePreprocessing(30))
    assert caught.value.code == "token-grid"


@pytest.mark.parametrize("coverage", ["exact", "binary", "dilated"])
@pytest.mark.parametrize(
    "grid",
    [
        TokenGrid(4, 4, 7, 1, ImagePreprocessing(30)),  # two pixels at the right and bottom are in no patch
        TokenGrid(3, 3, 10, 0, ImagePreprocessing(30, fit="crop", shortest_side=36)),
        TokenGrid(4, 4, 7, 2, ImagePreprocessing(31, fit="crop", shortest_side=31, rounding="half_even")),
    ],
    ids=["odd patches", "crop", "crop of the longer side"],
)
def test_masks_follow_the_picture_through_crop_and_odd_patches(grid, coverage):
    """Cell by cell, and pixel by pixel where the release's mask is resized: `exporter/references/boxes.py`."""
    corners = [(0, 0, 97, 61), (3.5, 2.25, 40, 30), (60, 0, 96, 61), (0, 50, 20, 61), (45, 30, 46, 31)]
    for size in ((97, 61), (61, 97)):
        boxes = [(x1, y1, min(x2, size[0]), min(y2, size[1])) for x1, y1, x2, y2 in corners if x1 < size[0]]
        found = object_masks([Boxes(boxes, size)], grid=grid, coverage=coverage)[0]
        expected = np.stack([reference_mask(box, size, coverage, grid) for box in boxes])
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)  # rounding of float32
        assert not found[:, : grid.prefix].any()


def test_a_box_outside_the_crop_covers_nothing_and_an_unknown_coverage_is_an_error():
    grid = TokenGrid(3, 3, 10, 0, ImagePreprocessing(30, fit="crop", shortest_side=30))
    assert not object_masks([Boxes([[0, 0, 20, 30]], (90, 30))], grid=grid, coverage="exact").any()
    with pytest.raises(InputError, match="coverage is 'soft'; expected one of exact, binary, dilated"):
        object_masks([None], grid=squashed(2, 28), coverage="soft")


QUARTER_AND_ALL = [Boxes([[0, 0, 4, 4], [0, 0, 8, 8]], (8, 8))]  # S = 0.25 and 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [("constant", [2, 2]), ("S", [0.5, 2]), ("S-0.5", [-0.5, 1]), ("1-S", [1.5, 0]), ("0.5-S", [0.5, -1])],
)
def test_the_five_weight_functions_are_as_worked_by_hand(name, expected):
    beta, gamma = WEIGHT_FUNCTIONS[name]
    weights = box_weights(QUARTER_AND_ALL, Perturbation.paper(alpha=2, beta=beta, gamma=gamma))
    np.testing.assert_allclose(weights, [expected])


def test_the_mean_divides_by_each_images_own_number_of_boxes():
    boxes = [*QUARTER_AND_ALL, Boxes([[0, 0, 4, 4]], (8, 8))]
    np.testing.assert_array_equal(
        box_weights(boxes, Perturbation(reduction="mean"), pad_to=4), [[4, 4, 0, 0], [8, 0, 0, 0]]
    )
    np.testing.assert_array_equal(box_weights(boxes, Perturbation(), pad_to=4), [[8, 8, 0, 0], [8, 0, 0, 0]])


def test_stages_none_weighs_nothing():
    np.testing.assert_array_equal(box_weights(QUARTER_AND_ALL, Perturbation(stages="none")), [[0, 0]])


def test_the_defaults_are_those_of_the_paper_and_the_manifest():
    expected = {
        "semantics": "paper",
        "alpha": 8.0,
        "beta": 1.0,
        "gamma": 0.0,
        "threshold": 0.95,
        "coverage": "exact",
        "reduction": "sum",
        "stages": "itc",
        "preserve_norm": False,
        "keep_stock": False,
        "centre_keys": False,
    }
    assert Perturbation().to_dict() == Perturbation.paper().to_dict() == expected


def test_the_release_takes_the_mean_dilates_perturbs_both_stages_and_reads_one_minus_s_as_minus_s():
    release = Perturbation.release(threshold=0.99)
    assert (release.semantics, release.reduction, release.coverage, release.stages) == (
        "release",
        "mean",
        "dilated",
        "both",
    )
    assert (release.beta, release.gamma, release.threshold) == (1, 0, 0.99)
    read = Perturbation.release(beta=1, gamma=-1)
    assert (read.beta, read.gamma) == (0, -1)
    np.testing.assert_allclose(box_weights(QUARTER_AND_ALL, read), [[-1, -4]])  # 8 · (−S) / 2
    assert Perturbation.release(beta=0.5, gamma=-1).beta == 0.5


def test_each_choice_can_be_set_alone():
    assert Perturbation.release(reduction="sum").coverage == "dilated"
    assert Perturbation.paper(coverage="binary").reduction == "sum"


@pytest.mark.parametrize("perturbation", [Perturbation(), Perturbation.release(alpha=2, beta=1, gamma=-1)])
def test_a_perturbation_survives_the_manifest(perturbation):
    assert Perturbation.from_dict(json.loads(json.dumps(perturbation.to_dict()))) == perturbation


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"semantics": "mine"}, "semantics is 'mine'; expected one of paper, release"),
        ({"coverage": "soft"}, "coverage is 'soft'"),
        ({"reduction": "max"}, "reduction is 'max'"),
        ({"stages": "itm"}, "stages is 'itm'; expected one of itc, both, none"),
        ({"alpha": float("nan")}, "alpha is nan; expected a finite number"),
        ({"beta": "1"}, "beta is '1'"),
        ({"gamma": True}, "gamma is True"),
        ({"threshold": 0}, "threshold is 0.0"),
        ({"threshold": 1}, "threshold is 1.0"),
        ({"threshold": 95}, "threshold is 95.0; expected a contribution ratio between 0 and 1"),
        ({"preserve_norm": 1}, "preserve_norm is 1; expected true or false"),
        ({"centre_keys": "yes"}, "centre_keys is 'yes'; expected true or false"),
    ],
)
def test_unusable_values_are_errors_that_name_them(change, message):
    with pytest.raises(InputError, match=message):
        Perturbation(**change)


def test_unknown_and_missing_entries_are_errors():
    with pytest.raises(InputError, match="has no aplha; expected one or more of semantics, alpha"):
        Perturbation.paper(aplha=3)
    with pytest.raises(InputError, match="expected exactly"):
        Perturbation.from_dict({"alpha": 8})
    with pytest.raises(InputError, match="perturbation has list"):
        Perturbation.from_dict([])
    with pytest.raises(InputError, match="expected exactly"):
        Perturbation.from_dict(Perturbation().to_dict() | {"center_keys": True})


@pytest.mark.parametrize("lacking", [{"keep_stock"}, {"centre_keys"}, {"keep_stock", "centre_keys"}])
def test_settings_from_before_a_field_existed_are_read(lacking):
    settings = Perturbation(reduction="mean", preserve_norm=True)
    before = {name: value for name, value in settings.to_dict().items() if name not in lacking}
    assert Perturbation.from_dict(before) == settings
    with pytest.raises(InputError, match="expected exactly"):
        Perturbation.from_dict({name: value for name, value in before.items() if name != "preserve_norm"})
