"""A hundred real photographs with Pascal VOC boxes. They are not part of the repository: see `shared_data`."""

import re

import numpy as np
import pytest
from PIL import Image
from shared_data import shared_folder

from qpert.runtime.gallery.entries import list_images, with_boxes
from qpert.runtime.inputs.box_files import read_box_file
from qpert.runtime.inputs.images import ImagePreprocessing, load_image, preprocess_images


@pytest.fixture(scope="module")
def folder():
    return shared_folder("data/photos_with_boxes")


def by_hand(path):
    """VOC's boxes of one file (pixels counted from 1, both corners inside) as 0-based half-open ones, with names."""
    rows = []
    for item in re.findall(r"<object>(.*?)</object>", path.read_text(), re.DOTALL):
        item = re.sub(r"<part>.*?</part>", "", item, flags=re.DOTALL)
        xmin, ymin, xmax, ymax = (
            float(re.search(f"<{key}>(.*?)</{key}>", item)[1]) for key in ("xmin", "ymin", "xmax", "ymax")
        )
        rows.append((re.search("<name>(.*?)</name>", item)[1], [xmin - 1, ymin - 1, xmax, ymax]))
    return rows


def test_every_box_of_the_photographs_is_read_as_voc_defines_it(folder):
    entries = with_boxes(list_images(folder / "images").entries, folder / "voc")
    assert len(entries) == 100
    for entry in entries:
        expected = by_hand(folder / "voc" / f"{entry.path.stem}.xml")
        assert expected
        assert entry.boxes.labels == tuple(name for name, _ in expected)
        np.testing.assert_array_equal(entry.boxes.xyxy, [box for _, box in expected])
        with Image.open(entry.path) as picture:
            assert entry.boxes.size == picture.size


def test_the_boxes_are_as_many_and_as_small_as_the_readme_counts_them(folder):
    """The README counts 128 boxes under a tenth of the picture, by xmax - xmin; with both corners inside it is 127."""
    entries = with_boxes(list_images(folder / "images").entries, folder / "voc")
    areas = np.concatenate([entry.boxes.areas for entry in entries])
    names = {label for entry in entries for label in entry.boxes.labels}
    assert (len(areas), len(names), int((areas < 0.1).sum())) == (273, 20, 127)


def test_the_folder_of_xml_files_holds_no_image_that_is_not_there(folder):
    table = read_box_file(folder / "voc")
    assert table.require(path.name for path in (folder / "images").iterdir()).images == tuple(
        sorted(path.name for path in (folder / "images").iterdir())
    )


def test_portraits_among_the_photographs_are_resized_columns_first(folder):
    paths = [entry.path for entry in list_images(folder / "images").entries]
    portraits = [path for path in paths if (size := load_image(path).size)[1] > size[0]]
    assert len(portraits) > 5
    levels = preprocess_images(portraits, ImagePreprocessing(364, mean=(0, 0, 0), std=(1, 1, 1))) * 255
    for path, found in zip(portraits, levels, strict=True):
        with Image.open(path) as picture:
            columns = picture.convert("RGB").resize((364, picture.height), Image.Resampling.BICUBIC)
        expected = np.asarray(columns.resize((364, 364), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
        np.testing.assert_array_equal(np.rint(found), expected)
