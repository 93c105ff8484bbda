"""The callable that Ray, Daft and others call: what it gives, what it survives, what it refuses."""

import multiprocessing
import pickle
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from qpert.runtime import Boxes, Perturbation, Retriever
from qpert.runtime.batch import EncodeImages
from qpert.runtime.errors import BoxError, ImageError, InputError

EACH = Perturbation(reduction="each", keep_stock=True)
"""A query set for each box and the stock set: images have different numbers of vectors."""
CORNERS = [[3.0, 4.0, 20.0, 25.0], [8.5, 9.0, 30.0, 31.0]]


@pytest.fixture(scope="module")
def files(tmp_path_factory, random_pictures):
    folder = tmp_path_factory.mktemp("pictures")
    paths = [folder / f"{number}.png" for number in range(7)]
    for path, pixels in zip(paths, random_pictures(7), strict=True):
        Image.fromarray(pixels).save(path)
    return paths


@pytest.fixture(scope="module")
def expected(demo_bundle, files):
    """What the runtime gives for the pictures, the second with boxes."""
    boxes = [None] * 7
    boxes[1] = Boxes(np.array(CORNERS), Image.open(files[1]).size)
    with Retriever.open(demo_bundle, threads=1, perturbation=EACH) as retriever:
        features = retriever.encode_images(files, boxes)
        sets = [features.query_sets.of([row]).vectors.reshape(-1, features.query_embeds.shape[-1]) for row in range(7)]
        return sets, features.image_embeds


def matrix(cell):
    return np.array(cell.as_py(), np.float32)


def test_a_batch_of_columns_gives_the_vectors_of_the_runtime_bit_for_bit(demo_bundle, files, expected):
    encode = EncodeImages(demo_bundle, boxes="boxes", features=True, perturbation=EACH)
    out = encode({"image": [str(path) for path in files], "boxes": [None, CORNERS, *[None] * 5]})
    sets, tokens = expected
    assert [len(vectors) for vectors in out["query_embeds"]] == [16, 48, *[16] * 5], "stock and a set for each box"
    for row in range(7):
        np.testing.assert_array_equal(out["query_embeds"][row], sets[row])
        np.testing.assert_array_equal(out["image_embeds"][row], tokens[row])
    assert out["image"].tolist() == [str(path) for path in files]
    assert out["error"].tolist() == [None] * 7
    assert out["file_bytes"].tolist() == [path.stat().st_size for path in files]


def test_paths_bytes_and_pixels_give_the_same_vectors(demo_bundle, files, expected):
    by_bytes = EncodeImages(demo_bundle, image="data", name="key")
    names = [path.name for path in files]
    first = by_bytes({"data": [path.read_bytes() for path in files], "key": names})
    second = by_bytes({"data": [np.array(Image.open(path)) for path in files], "key": names})
    stock = [sets[:16] for sets in expected[0]]
    for row in range(7):
        np.testing.assert_array_equal(first["query_embeds"][row], stock[row])
        np.testing.assert_array_equal(second["query_embeds"][row], stock[row])
    assert first["path"].tolist() == names
    assert first["modified"].tolist() == [0] * 7


def test_an_arrow_table_gives_one_of_the_declared_schema(demo_bundle, files, expected):
    encode = EncodeImages(demo_bundle, boxes="boxes", captions="texts", features=True, perturbation=EACH)
    table = pa.table({
        "image": [str(path) for path in files],
        "boxes": pa.array([None, CORNERS, *[None] * 5], pa.list_(pa.list_(pa.float64()))),
        "texts": [["a cup"], [], None, *[["a", "b"]] * 4],
    })  # fmt: skip
    out = encode(table)
    assert out.schema == encode.schema
    for row in range(7):
        np.testing.assert_array_equal(matrix(out["query_embeds"][row]), expected[0][row])
        np.testing.assert_array_equal(matrix(out["image_embeds"][row]), expected[1][row])
    assert out["captions"].to_pylist()[:4] == [["a cup"], [], [], ["a", "b"]]
    assert encode(table.slice(0, 0)).schema == encode.schema


def test_a_bad_picture_is_a_row_with_an_error_and_spoils_no_other(demo_bundle, files, expected, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(files[0].read_bytes()[:200])
    paths = [str(files[0]), str(broken), str(tmp_path / "missing.png"), str(files[1]), str(files[2])]
    boxes = [None, None, None, CORNERS, [[5, 5, 1, 1]]]
    encode = EncodeImages(demo_bundle, boxes="boxes", perturbation=EACH)
    out = encode({"image": paths, "boxes": boxes})
    codes = [None if error is None else error.partition(":")[0] for error in out["error"]]
    assert codes == [None, "image-broken", "image-missing", None, "box-inverted"]
    assert [vectors is None for vectors in out["query_embeds"]] == [False, True, True, False, True]
    np.testing.assert_array_equal(out["query_embeds"][0], expected[0][0])
    np.testing.assert_array_equal(out["query_embeds"][3], expected[0][1])
    table = encode(pa.table({"image": paths, "boxes": pa.array(boxes, pa.list_(pa.list_(pa.float64())))}))
    assert table["query_embeds"].null_count == 3
    strict = EncodeImages(demo_bundle, boxes="boxes", on_error="raise")
    with pytest.raises(ImageError) as caught:
        strict({"image": paths[:3], "boxes": boxes[:3]})
    assert caught.value.code == "image-broken"
    with pytest.raises(BoxError) as caught:
        strict({"image": paths[4:], "boxes": boxes[4:]})
    assert caught.value.code == "box-inverted"


def test_more_boxes_than_the_bundle_takes_are_that_rows_error(demo_bundle, files):
    many = [[x, 0, x + 1, 5] for x in range(33)]
    out = EncodeImages(demo_bundle, boxes="boxes")({"image": [str(files[0])], "boxes": [many]})
    assert out["error"][0].startswith("boxes-limit: ")


def test_it_survives_pickling_before_and_after_its_first_batch(demo_bundle, files, expected):
    encode = EncodeImages(demo_bundle)
    fresh = pickle.loads(pickle.dumps(encode))
    batch = {"image": [str(files[0])]}
    np.testing.assert_array_equal(encode(batch)["query_embeds"][0], expected[0][0])
    used = pickle.loads(pickle.dumps(encode))
    assert used._encoder is None, "graphs do not travel"
    for copy in (fresh, used):
        np.testing.assert_array_equal(copy(batch)["query_embeds"][0], expected[0][0])
    encode.close()
    np.testing.assert_array_equal(encode(batch)["query_embeds"][0], expected[0][0])


def test_a_pool_of_processes_encodes_with_one_copy_each(demo_bundle, files, expected):
    encode = EncodeImages(demo_bundle)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        parts = pool.map(encode, [{"image": [str(path)]} for path in files[2:6]])
    for row, part in enumerate(parts, start=2):
        np.testing.assert_array_equal(part["query_embeds"][0], expected[0][row])


def test_another_bundle_at_the_path_is_refused(demo_bundle, tiny_bundle, files, copy_of, tmp_path):
    import shutil

    moved = copy_of(demo_bundle)
    pickled = pickle.dumps(EncodeImages(moved))
    shutil.rmtree(moved)
    shutil.copytree(tiny_bundle, moved)
    with pytest.raises(InputError) as caught:
        pickle.loads(pickled)({"image": [str(files[0])]})
    assert caught.value.code == "bundle-replaced"


@pytest.mark.parametrize(
    ("batch", "code"),
    [
        ([1, 2], "batch-kind"),
        ({"picture": ["a.jpg"]}, "batch-columns"),
        ({"image": [b"bytes"]}, "image-name"),
    ],
)
def test_a_wrong_batch_says_what_is_expected(demo_bundle, batch, code):
    with pytest.raises(InputError) as caught:
        EncodeImages(demo_bundle)(batch)
    assert caught.value.code == code


def test_on_error_is_checked(demo_bundle):
    with pytest.raises(InputError) as caught:
        EncodeImages(demo_bundle, on_error="ignore")
    assert caught.value.code == "on-error"


def test_importing_it_needs_no_arrow():
    program = "import sys, qpert.runtime.batch; print(sorted({'pyarrow', 'ray', 'torch', 'onnx'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "[]\n"
