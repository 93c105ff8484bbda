"""`boxes.onnx` against the runtime bit for bit, and against the definition cell by cell."""

import dataclasses
import itertools

import numpy as np
import onnx
import pytest

from qpert.exporter.host_graphs.boxes import boxes_graph, boxes_spec
from qpert.exporter.references.boxes import box_samples
from qpert.exporter.tracing.onnx_files import check_graph
from qpert.runtime.inputs.boxes import Boxes
from qpert.runtime.inputs.perturbation import Perturbation, box_weights, object_masks
from qpert.runtime.inputs.preprocessing import ImagePreprocessing
from qpert.runtime.inputs.token_grid import TokenGrid
from qpert.runtime.sessions.open import open_session

GRIDS = {
    "blip2": TokenGrid(8, 8, 14, 1, ImagePreprocessing(112)),
    "siglip, pixels that no patch sees": TokenGrid(3, 3, 14, 0, ImagePreprocessing(50)),
    "crop": TokenGrid(4, 4, 8, 1, ImagePreprocessing(32, fit="crop", shortest_side=45)),
    "crop, half to even, prefix of 5": TokenGrid(
        3, 3, 10, 5, ImagePreprocessing(33, fit="crop", shortest_side=38, rounding="half_even")
    ),
}
SETTINGS = {
    "paper": Perturbation(),
    "binary, 1-S": Perturbation(coverage="binary", gamma=-1.0),
    "dilated, mean, S": Perturbation(coverage="dilated", reduction="mean", alpha=3.7, beta=0.1, gamma=1.3),
    "each": Perturbation(reduction="each", keep_stock=True, beta=-0.5, gamma=1.0),
}
CASES = {f"{grid}; {name}": (GRIDS[grid], SETTINGS[name]) for grid, name in itertools.product(GRIDS, SETTINGS)}
SIZES = [(1, 1), (1, 900), (900, 1), (3000, 2), (7, 5), (640, 480), (97, 311), (112, 112), (4000, 3000), (333, 500)]


def runner(grid, perturbation, folder):
    spec = boxes_spec(grid)
    path = folder / "boxes.onnx"
    onnx.save_model(boxes_graph(spec, grid, perturbation), path)
    check_graph(path, spec)
    session = open_session(path, spec, "cpu", threads=1)

    def run(corners, sizes):
        outputs = session.run({"boxes": np.asarray(corners, np.float32), "image_size": np.asarray(sizes, np.float32)})
        return outputs["object_masks"], outputs["box_weights"]

    return run


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES.keys())
def case(request, tmp_path_factory):
    """(grid, perturbation, function from corners and sizes to masks and weights)."""
    return *request.param, runner(*request.param, tmp_path_factory.mktemp("graph"))


def random_boxes(rng, size):
    """float32 numbers, as the graph takes them; half of them whole, some at the edges."""
    count = int(rng.integers(0, 9))
    ends = np.sort(rng.random((count, 2, 2)), axis=1) * size  # [count, low and high, x and y]
    if rng.random() < 0.5:
        ends[:, 0], ends[:, 1] = np.floor(ends[:, 0]), np.floor(ends[:, 1]) + 1
    if rng.random() < 0.3:
        ends[:, 0] = 0
    corners = np.minimum(ends.reshape(count, 4).astype(np.float32), np.array([*size, *size], np.float32))
    kept = corners[(corners[:, 0] < corners[:, 2]) & (corners[:, 1] < corners[:, 3])]
    return Boxes(kept, size) if len(kept) else None


def batch_of(boxes, sizes, rows):
    corners = np.zeros((len(boxes), rows, 4), np.float32)
    for image, item in enumerate(boxes):
        if item is not None:
            corners[image, : len(item)] = item.xyxy
    return corners, np.array(sizes, np.float32)


def test_masks_and_weights_equal_the_runtimes_bit_for_bit(case):
    grid, perturbation, run = case
    rng = np.random.default_rng(0)
    seen = 0
    for _ in range(40):
        sizes = [SIZES[i] for i in rng.integers(0, len(SIZES), int(rng.integers(1, 5)))]
        boxes = [random_boxes(rng, size) for size in sizes]
        rows = max(0 if item is None else len(item) for item in boxes) + int(rng.integers(0, 3))
        masks, weights = run(*batch_of(boxes, sizes, rows))
        expected = object_masks(boxes, grid=grid, coverage=perturbation.coverage, pad_to=rows)
        np.testing.assert_array_equal(masks, expected)
        np.testing.assert_array_equal(weights, box_weights(boxes, perturbation, pad_to=rows))
        seen += int((masks > 0).sum())
    assert seen > 1000, "masks without coverage would show nothing"


def test_they_are_the_definitions_numbers(case):
    """1e-6: the definition divides areas where the graph multiplies shares; both round to float32 at the end."""
    grid, perturbation, run = case
    for sample in box_samples(perturbation, grid):
        masks, weights = run(sample.xyxy[None], sample.size[None])
        np.testing.assert_allclose(masks[0], sample.masks, rtol=0, atol=1e-6)
        np.testing.assert_allclose(weights[0], sample.weights, rtol=0, atol=1e-6)


PADDING = {
    "zeros": (0, 0, 0, 0),
    "empty": (10, 10, 10, 40),
    "inverted": (50, 50, 20, 20),
    "outside": (700, 10, 800, 20),
    "NaN": (float("nan"), 10, 30, 40),
    "all NaN": (float("nan"),) * 4,
}


@pytest.mark.parametrize("row", PADDING.values(), ids=PADDING.keys())
def test_a_row_that_is_no_box_is_padding(case, row):
    _, _, run = case
    box, size = (13, 20, 345, 261), [(640, 480)]
    masks, weights = run([[box, row]], size)
    alone = run([[box]], size)
    np.testing.assert_array_equal(masks[:, :1], alone[0])
    np.testing.assert_array_equal(weights[:, :1], alone[1])
    assert not masks[:, 1].any()
    assert not weights[:, 1].any()


def test_a_picture_that_is_only_padding_covers_and_weighs_nothing(case):
    _, _, run = case
    for size in ((0, 0), (640, 480)):
        masks, weights = run(np.zeros((1, 3, 4)), [size])
        assert not masks.any()
        assert not weights.any()


def test_no_rows_give_no_rows(case):
    grid, _, run = case
    masks, weights = run(np.zeros((2, 0, 4)), [(640, 480), (7, 5)])
    assert masks.shape == (2, 0, grid.tokens)
    assert weights.shape == (2, 0)


def test_a_box_that_reaches_out_is_clipped(case):
    _, _, run = case
    out, inside = run([[(-20, 5, 700, 4000)]], [(640, 480)]), run([[(0, 5, 640, 480)]], [(640, 480)])
    np.testing.assert_array_equal(out[0], inside[0])
    np.testing.assert_array_equal(out[1], inside[1])


def test_mean_divides_by_the_boxes_of_each_picture_alone(tmp_path):
    """By hand: α = 8, β = 1, γ = 0; two boxes weigh 4 each, one weighs 8, whatever is padded beside them."""
    run = runner(GRIDS["blip2"], Perturbation(reduction="mean"), tmp_path)
    one, other, none = (0, 0, 10, 10), (5, 5, 60, 70), (0, 0, 0, 0)
    _, weights = run([[one, other, none], [one, none, none]], [(100, 100), (100, 100)])
    np.testing.assert_array_equal(weights, [[4, 4, 0], [8, 0, 0]])


def test_each_weighs_as_sum(tmp_path):
    corners, sizes = [[(0, 0, 10, 10), (5, 5, 60, 70)]], [(100, 100)]
    found = []
    for reduction in ("each", "sum"):
        folder = tmp_path / reduction
        folder.mkdir()
        found.append(runner(GRIDS["blip2"], Perturbation(reduction=reduction, gamma=-1.0), folder)(corners, sizes))
    np.testing.assert_array_equal(found[0][1], found[1][1])
    np.testing.assert_array_equal(found[0][1], np.float32([[8 * (1 - 0.01), 8 * (1 - 0.3575)]]))


def test_another_alpha_is_another_graph():
    grid, spec = GRIDS["blip2"], boxes_spec(GRIDS["blip2"])
    one, other = (boxes_graph(spec, grid, dataclasses.replace(Perturbation(), alpha=alpha)) for alpha in (8.0, 4.0))
    assert one != other


def test_long_pictures_whose_positions_pass_two_to_the_31(tmp_path):
    """Of 1×3000 pixels the crop shows less than one, in the middle: a box over it covers every patch, another none."""
    image = ImagePreprocessing(224, fit="crop", shortest_side=256, rounding="half_even")
    run = runner(TokenGrid(7, 7, 32, 1, image), Perturbation(coverage="dilated"), tmp_path)
    masks, _ = run([[[0, 900, 1, 2700], [0, 0, 1, 100]]], [[1, 3000]])
    assert masks[0, 0].tolist() == [0, *[1] * 49]
    assert masks[0, 1].tolist() == [0] * 50
