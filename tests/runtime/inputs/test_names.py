"""Which name means which image: one rule for every format and command."""

import json
import unicodedata

import pytest
from shared_data import shared_folder

from qpert.runtime.errors import BoxError
from qpert.runtime.inputs.box_files import read_box_file
from qpert.runtime.inputs.box_table import BoxRow, BoxTable
from qpert.runtime.inputs.names import NameIndex, image_stem, is_litter, named_file

SIZE = (100, 80)
COMPOSED, DECOMPOSED = "caf\u00e9.jpg", "cafe\u0301.jpg"


def table(*names):
    return BoxTable(tuple(BoxRow(name, (1, 2, 3, 4), f"row {place}") for place, name in enumerate(names, start=1)))


def found(name, *images):
    """What a box file's name means among images."""
    return NameIndex(images, "image").find(name)[1]


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("a.jpg", "a"),
        ("a.JPG", "a"),
        ("x/y.z/a.tar.png", "a.tar"),
        ("clip.0001", "clip.0001"),
        ("clip.0001.jpg", "clip.0001"),
        ("v1.0", "v1.0"),
        (".jpg", ".jpg"),
        ("x\\b.webp", "b"),
        ("IMG_2020.01.31", "IMG_2020.01.31"),
    ],
)
def test_only_an_extension_of_pictures_is_taken_off(name, stem):
    assert image_stem(name) == stem


@pytest.mark.parametrize(
    ("name", "images", "expected"),
    [
        ("clip.0001", ["clip.jpg"], ()),
        ("clip.0001", ["clip.jpg", "clip.0001.jpg", "clip.0002.jpg"], ("clip.0001.jpg",)),
        ("clip.0001.jpg", ["clip.jpg"], ()),
        ("v1.0", ["v1.png", "v1.0.png"], ("v1.0.png",)),
        ("clip", ["clip.0001"], ()),
        ("clip", ["clip.0001.jpg"], ()),
        ("a.png", ["a.png.jpg", "a.jpg"], ("a.png.jpg",)),
        ("a", ["a.jpg", "a.png"], ("a.jpg", "a.png")),
        ("a.jpg", ["x/a.jpg", "x/a.png"], ("x/a.jpg",)),
        ("a.jpg", ["a.png"], ("a.png",)),
        (COMPOSED, [DECOMPOSED], (DECOMPOSED,)),
        (DECOMPOSED, [COMPOSED, DECOMPOSED], (DECOMPOSED,)),
        ("cafe\u0301", ["x/" + COMPOSED], ("x/" + COMPOSED,)),
        ("139", ["000000000139.jpg"], ("000000000139.jpg",)),
        ("139", ["139.jpg", "000000000139.jpg"], ("139.jpg",)),
        ("13", ["000000000139.jpg"], ()),
        ("000139", ["COCO_val2014_000000000139.jpg"], ("COCO_val2014_000000000139.jpg",)),
        ("139.0", ["000000000139.jpg"], ("000000000139.jpg",)),
        ("139.0", ["139.0.jpg", "139.jpg"], ("139.0.jpg",)),
        ("139.5", ["139.jpg", "5.jpg"], ()),
        ("0", ["000.jpg"], ("000.jpg",)),
    ],
)
def test_an_equal_name_wins_then_an_equal_stem_and_a_tie_is_all_of_its_candidates(name, images, expected):
    assert found(name, *images) == expected
    for image in expected:
        assert name in NameIndex([name], "annotation").find(image)[1]


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "json", "instances.json", "xml"])
def test_every_format_means_the_same_image_by_a_name_with_a_dot(tmp_path, suffix):
    box = {"x1": 0, "y1": 1, "x2": 3, "y2": 4}
    corners = "<xmin>1</xmin><ymin>2</ymin><xmax>3</xmax><ymax>4</ymax>"
    contents = {
        "jsonl": json.dumps({"image": "clip.0001", **box}),
        "csv": "image,x1,y1,x2,y2\nclip.0001,0,1,3,4\n",
        "json": json.dumps([{"image_id": "clip.0001", "bbox": [0, 1, 3, 3]}]),
        "instances.json": json.dumps(
            {
                "images": [{"id": 1, "file_name": "clip.0001"}],
                "annotations": [{"image_id": 1, "bbox": [0, 1, 3, 3]}],
            }
        ),
        "xml": f"<annotation><filename>clip.0001</filename><object><bndbox>{corners}</bndbox></object></annotation>",
    }
    path = tmp_path / f"clip.0001.{suffix}"
    path.write_text(contents[suffix])
    boxes = read_box_file(path)
    assert len(boxes.for_image("clip.jpg", SIZE)) == 0
    assert boxes.for_image("clip.0001.jpg", SIZE).xyxy.tolist() == [[0, 1, 3, 4]]
    named = boxes.require(["clip.jpg", "clip.0001.jpg", "clip.0002.jpg"])
    assert named.images == ("clip.0001.jpg",)
    with pytest.raises(BoxError) as caught:
        boxes.require(["clip.jpg"])
    assert caught.value.code == "box-image-unknown"


def test_a_tie_is_an_error_that_shows_the_candidates():
    with pytest.raises(BoxError, match=r"'a' is ambiguous: it matches a.jpg, a.png") as caught:
        table("a").require(["a.jpg", "a.png"])
    assert caught.value.code == "box-image-ambiguous"
    with pytest.raises(BoxError, match=r"a\.jpg, a\.png") as caught:
        table("a.jpg", "a.png").for_image("a.webp", SIZE)
    assert caught.value.code == "box-image-ambiguous"


def test_of_a_table_that_knows_more_images_each_image_gets_the_boxes_of_the_closest_name():
    found = table("a.png", "a.jpg", "elsewhere.jpg").of_images(["a.jpg", "b.jpg"])
    assert [(row.image, row.source) for row in found.table.rows] == [("a.jpg", "row 2")]
    assert found.others == ("a.png", "elsewhere.jpg")
    assert len(found.table.for_image("b.jpg", SIZE)) == 0
    swapped = table("a.jpg", "a.png").of_images(["a.jpg"])
    assert [row.source for row in swapped.table.rows] == ["row 1"]


@pytest.mark.parametrize(
    ("names", "images", "code"),
    [
        (["a.jpg"], ["x/a.jpg", "y/a.jpg"], "box-image-ambiguous"),
        (["x/a.jpg", "y/a.jpg"], ["z/a.jpg"], "box-image-twice"),
    ],
)
def test_a_table_that_knows_more_images_may_not_be_ambiguous_either(names, images, code):
    with pytest.raises(BoxError) as caught:
        table(*names).of_images(images)
    assert caught.value.code == code


def test_a_file_is_found_under_the_other_unicode_form_of_its_name(tmp_path):
    (tmp_path / DECOMPOSED).write_bytes(b"x")
    assert named_file(tmp_path, COMPOSED) == tmp_path / DECOMPOSED
    (tmp_path / COMPOSED).write_bytes(b"x")
    assert named_file(tmp_path, COMPOSED) == tmp_path / COMPOSED
    assert named_file(tmp_path, "gone\u00e9.jpg") == tmp_path / "gone\u00e9.jpg"
    assert unicodedata.normalize("NFD", COMPOSED) == DECOMPOSED != COMPOSED


def test_what_systems_leave_behind_is_known_by_its_name():
    assert [name for name in (".DS_Store", "._a.xml", "Thumbs.db", "a.xml", "_a.jpg") if is_litter(name)] == [
        ".DS_Store",
        "._a.xml",
        "Thumbs.db",
    ]


def test_the_cases_of_public_reports_give_the_right_image():
    cases = shared_folder("cases/box")
    assert read_box_file(cases / "dot.jsonl").require(["clip.0001.jpg", "clip.jpg"]).images == ("clip.0001.jpg",)
    assert read_box_file(cases / "coco_floatid.json").require(["000000000139.jpg"]).images == ("000000000139.jpg",)
    lvis = read_box_file(cases / "lvis.json").require(["000000397133.jpg"])
    assert lvis.for_image("000000397133.jpg", SIZE).xyxy.tolist() == [[1, 2, 4, 6]]
    assert read_box_file(cases / "nfc.jsonl").require([DECOMPOSED]).images == (DECOMPOSED,)
