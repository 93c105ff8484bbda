"""`preprocess.onnx` against PIL and torch, bit for bit, on photographs, noise and odd sizes."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image
from shared_data import shared_folder

from qpert.exporter.host_graphs.expressions import OPSET
from qpert.exporter.host_graphs.preprocess import preprocess_graph, preprocess_spec
from qpert.exporter.host_graphs.resize import LARGEST_BLOCK, block_length
from qpert.exporter.references.pixels import picture_pixels, reference_pixels
from qpert.exporter.tracing.onnx_files import check_graph
from qpert.exporter.tracing.readable import IR_VERSION, OPSET_LIMIT
from qpert.runtime.inputs.images import load_image
from qpert.runtime.inputs.preprocessing import ImagePreprocessing
from qpert.runtime.sessions.open import open_session

HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
GEOMETRIES = {
    "blip2": ImagePreprocessing(112),
    "blip2 at 364": ImagePreprocessing(364),
    "siglip": ImagePreprocessing(56, **HALF),
    "bilinear": ImagePreprocessing(48, resample="bilinear"),
    "lanczos": ImagePreprocessing(48, resample="lanczos"),
    "clip": ImagePreprocessing(32, fit="crop", shortest_side=32),
    "crop, rounded down": ImagePreprocessing(42, fit="crop", shortest_side=57, resample="bilinear"),
    "crop, rounded to even": ImagePreprocessing(42, fit="crop", shortest_side=57, rounding="half_even"),
    "crop, lanczos": ImagePreprocessing(30, fit="crop", shortest_side=31, rounding="half_even", resample="lanczos"),
    "a prime size": ImagePreprocessing(53),
    "another scale": ImagePreprocessing(28, mean=(0.0, 100.5, -3.0), std=(1.0, 255.0, 1e-3)),
}
SIZES = [
    *((1, 1), (1, 900), (900, 1), (3000, 2), (2, 3000), (1, 300), (300, 2), (7, 5), (50, 40), (31, 999), (999, 31)),
    *((97, 640), (112, 112), (111, 113), (113, 111), (224, 100), (364, 364), (365, 363), (57, 42), (641, 479)),
]
"""(width, height) in pixels."""


@pytest.fixture(scope="module", params=GEOMETRIES.values(), ids=GEOMETRIES.keys())
def opened(request, tmp_path_factory):
    """(preprocessing, a function from uint8 [H, W, 3] to float32 [3, S, S])."""
    return request.param, runner(request.param, tmp_path_factory.mktemp("graph"))


def runner(preprocessing, folder):
    spec = preprocess_spec(preprocessing)
    path = folder / "preprocess.onnx"
    onnx.save_model(preprocess_graph(spec, preprocessing), path)
    check_graph(path, spec)  # the declaration, versions, and that ONNX Runtime opens it
    session = open_session(path, spec, "cpu", threads=1)
    return lambda picture: session.run({"image": picture})["pixel_values"][0]


def expected(picture, preprocessing):
    return reference_pixels(Image.fromarray(picture), preprocessing)


def pictures(width, height):
    """Noise, noise of extremes (it overshoots most), and one colour."""
    rng = np.random.default_rng((width, height))
    yield rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    yield rng.integers(0, 2, (height, width, 3), dtype=np.uint8) * np.uint8(255)
    yield np.full((height, width, 3), (255, 0, 17), np.uint8)


def differing(run, preprocessing, images):
    return sum(int((run(image) != expected(image, preprocessing)).sum()) for image in images)


def test_there_are_twenty_odd_sizes():
    assert len(set(SIZES)) == 20


def test_odd_sizes_equal_pil_and_torch_bit_for_bit(opened):
    preprocessing, run = opened
    for size in SIZES:
        assert differing(run, preprocessing, pictures(*size)) == 0, size


def test_photographs_equal_pil_and_torch_bit_for_bit(opened, photos):
    preprocessing, run = opened
    assert photos
    for path in photos:
        picture = np.asarray(load_image(path))
        np.testing.assert_array_equal(run(picture), picture_pixels(path, preprocessing), err_msg=path.name)


@pytest.mark.parametrize("name", ["blip2", "clip"])
def test_further_photographs_equal_pil_and_torch_bit_for_bit(name, tmp_path):
    files = sorted((shared_folder("data/photos_with_boxes") / "images").glob("*.jpg"))
    assert files
    run = runner(GEOMETRIES[name], tmp_path)
    for path in files:
        picture = np.asarray(load_image(path))
        np.testing.assert_array_equal(run(picture), picture_pixels(path, GEOMETRIES[name]), err_msg=path.name)


def test_a_large_picture_equals_pil_and_torch_bit_for_bit(tmp_path):
    """12 megapixels: digits of the weights are summed over bands of 650 pixels."""
    run = runner(GEOMETRIES["blip2"], tmp_path)
    assert differing(run, GEOMETRIES["blip2"], list(pictures(4000, 3000))[:2]) == 0


def test_versions_are_low_enough_for_the_lowest_onnx_runtime():
    preprocessing = GEOMETRIES["blip2"]
    model = preprocess_graph(preprocess_spec(preprocessing), preprocessing)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", OPSET)]
    assert OPSET <= OPSET_LIMIT
    assert model.ir_version == IR_VERSION
    assert model.ByteSize() < 20_000, "a host graph holds no weights"


def test_generating_twice_gives_the_same_bytes():
    preprocessing = GEOMETRIES["crop, lanczos"]
    one, other = (preprocess_graph(preprocess_spec(preprocessing), preprocessing) for _ in range(2))
    assert one.SerializeToString(deterministic=True) == other.SerializeToString(deterministic=True)


@pytest.mark.parametrize(("size", "block"), [(112, 16), (364, 14), (224, 16), (53, 1), (1, 1), (30, 15)])
def test_blocks_divide_the_size(size, block):
    assert block_length(size) == block <= LARGEST_BLOCK


def test_another_filter_changes_pixels(tmp_path):
    """The comparison above can fail: a filter taken for another one differs."""
    bicubic, bilinear = ImagePreprocessing(48), GEOMETRIES["bilinear"]
    run = runner(bilinear, Path(tmp_path))
    assert differing(run, bicubic, pictures(97, 64)) > 1000
