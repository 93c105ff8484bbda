"""What `qpert index` makes of a folder, a list, an annotation, and boxes beside them."""

import json

import numpy as np
import pytest
from PIL import Image

from qpert.runtime.errors import BoxError, InputError
from qpert.runtime.gallery.entries import image_size, read_entries, with_boxes


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "images"
    for name, size in (("b.png", (40, 30)), ("a.jpg", (20, 10)), ("sub/c.JPEG", (8, 9)), (".hidden/d.png", (5, 5))):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size).save(root / name)
    (root / "notes.md").write_text("no image")
    return root


def test_a_folder_is_its_images_in_order_of_their_names(folder):
    entries = read_entries(folder)
    assert [entry.name for entry in entries] == ["a.jpg", "b.png", "sub/c.JPEG"]
    assert [entry.path for entry in entries] == [folder / entry.name for entry in entries]


def test_a_list_is_read_in_its_own_order_with_names_as_written(folder):
    (folder / "list.txt").write_text("\ufeff# two of them\nsub/c.JPEG\n\n  b.png \n", encoding="utf-8")
    assert [(entry.name, entry.path) for entry in read_entries(folder / "list.txt")] == [
        ("sub/c.JPEG", folder / "sub/c.JPEG"),
        ("b.png", folder / "b.png"),
    ]


@pytest.mark.parametrize("place", [".", "annotations"])
def test_an_annotation_brings_captions_and_lies_beside_its_images_or_below(folder, place):
    path = folder / place / "test.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps([{"image": "b.png", "caption": ["one", "two"]}, {"image": "a.jpg", "caption": "x"}]))
    entries = read_entries(path)
    assert [(entry.name, entry.captions) for entry in entries] == [("b.png", ("one", "two")), ("a.jpg", ("x",))]
    assert [entry.path.is_file() for entry in entries] == [True, True]


def test_an_annotation_without_its_images_is_refused(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"image": "b.png", "caption": ["one"]}]))
    with pytest.raises(InputError, match=r"none of the first images .* b.png for instance"):
        read_entries(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nothing", None, "does not exist; expected a folder of images"),
        ("list.csv", b"a", "is neither a folder"),
        ("list.txt", b"\n# none\n", "names no image"),
        ("list.txt", b"\xff\xfe\xff", "cannot be read as UTF-8"),
        ("a.json", b"{}", "is not a list"),
    ],
)
def test_what_is_no_list_of_images_is_refused(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_entries(tmp_path / name)


def test_a_folder_without_images_is_refused(tmp_path):
    with pytest.raises(InputError, match="has no image below it"):
        read_entries(tmp_path)


def test_boxes_are_those_of_the_file_and_others_get_none(folder):
    lines = [{"image": "b.png", "x1": 1, "y1": 2, "x2": 11, "y2": 12, "label": "cup"}]
    (folder / "boxes.jsonl").write_text("\n".join(map(json.dumps, lines)))
    by_name = {entry.name: entry.boxes for entry in with_boxes(read_entries(folder), folder / "boxes.jsonl")}
    assert by_name["b.png"].xyxy.tolist() == [[1, 2, 11, 12]]
    assert by_name["b.png"].size == (40, 30)
    assert by_name["b.png"].labels == ("cup",)
    assert len(by_name["a.jpg"]) == 0
    (folder / "boxes.jsonl").write_text(json.dumps({**lines[0], "image": "zebra.png"}))
    with pytest.raises(BoxError, match=r"boxes for the image 'zebra.png', which is not among the 3 images"):
        with_boxes(read_entries(folder), folder / "boxes.jsonl")


def test_an_image_that_cannot_be_opened_stays_without_boxes_for_indexing_to_tell(folder):
    (folder / "b.png").write_bytes(b"no image")
    (folder / "boxes.csv").write_text("image,x1,y1,x2,y2\nb.png,1,2,3,4\n")
    by_name = {entry.name: entry.boxes for entry in with_boxes(read_entries(folder), folder / "boxes.csv")}
    assert by_name["b.png"] is None


@pytest.mark.parametrize("orientation", range(1, 9))
def test_sizes_are_those_of_the_picture_as_it_is_seen(tmp_path, orientation):
    from qpert.runtime.inputs.images import load_image

    image = Image.fromarray(np.zeros((30, 50, 3), np.uint8))
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.jpg", exif=exif)
    assert image_size(tmp_path / "a.jpg") == load_image(tmp_path / "a.jpg").size
