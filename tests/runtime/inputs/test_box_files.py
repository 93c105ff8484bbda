"""Box files of every format, image names, and files that are wrong."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest

from qpert.runtime.errors import BoxError, QpertWarning
from qpert.runtime.inputs.box_files import read_box_file
from qpert.runtime.inputs.boxes import Boxes
from qpert.runtime.inputs.images import load_image

PHOTOS = Path(__file__).parents[3] / "examples" / "photos"
SIZE = (100, 80)

ENTITIES = """<annotation>
  <filename>36979.jpg</filename>
  <size><width>100</width><height>80</height><depth>3</depth></size>
  <object><name>11</name><name>12</name>
    <bndbox><xmin>1</xmin><ymin>1</ymin><xmax>100</xmax><ymax>80</ymax></bndbox></object>
  <object><name>13</name><bndbox><xmin>11</xmin><ymin>21</ymin><xmax>20</xmax><ymax>21</ymax></bndbox></object>
  <object><name>14</name><scene>1</scene><nobndbox>0</nobndbox></object>
  <object><name>15</name><scene>0</scene><nobndbox>1</nobndbox></object>
</annotation>"""


def write(folder, name, content):
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def box(image="a.jpg", x1=1, y1=2, x2=3, y2=4, **extra):
    return {"image": image, "x1": x1, "y1": y1, "x2": x2, "y2": y2, **extra}


def xml(objects, head=""):
    return f"{head}<annotation>{objects}</annotation>"


def corners(xmin, ymin, xmax, ymax):
    values = {"xmin": xmin, "ymin": ymin, "xmax": xmax, "ymax": ymax}
    inner = "".join(f"<{key}>{value}</{key}>" for key, value in values.items())
    return f"<object><name>dog</name><bndbox>{inner}</bndbox></object>"


def test_jsonl_boxes_are_read_by_image_with_scores_and_labels(tmp_path):
    path = write(tmp_path, "b.jsonl", lines(box(score=0.5, label="dog"), box("b.jpg"), box(x1=0.25, score=1, label=7)))
    table = read_box_file(path)
    assert table.images == ("a.jpg", "b.jpg")
    boxes = table.for_image("a.jpg", SIZE)
    np.testing.assert_array_equal(boxes.xyxy, [[1, 2, 3, 4], [0.25, 2, 3, 4]])
    np.testing.assert_array_equal(boxes.scores, [0.5, 1])
    assert boxes.labels == ("dog", "7")
    assert boxes.sources == (f"{path}:1", f"{path}:3")
    assert table.for_image("b.jpg", SIZE).scores is None


def test_csv_is_read_as_jsonl_is(tmp_path):
    text = '\ufeffimage,x1,y1,x2,y2,score,label,area\na.jpg,1,2,3,4,0.5,"dog, wet",9\n\nb.jpg, 1.5,2,3,4,,,\n'
    table = read_box_file(write(tmp_path, "b.csv", text))
    boxes = table.for_image("a.jpg", SIZE)
    np.testing.assert_array_equal(boxes.xyxy, [[1, 2, 3, 4]])
    assert boxes.labels == ("dog, wet",)
    assert table.for_image("b.jpg", SIZE).labels is None
    assert [row.source.rsplit(":")[-1] for row in table.rows] == ["2", "4"]


def test_an_image_without_boxes_has_none(tmp_path):
    boxes = read_box_file(write(tmp_path, "b.jsonl", lines(box()))).for_image("other.jpg", SIZE)
    assert isinstance(boxes, Boxes)
    assert len(boxes) == 0
    assert boxes.size == SIZE


def test_coco_results_are_left_top_width_height(tmp_path):
    results = [{"image_id": 42, "bbox": [10, 20, 30, 40], "score": 0.9, "category_id": 18}]
    table = read_box_file(write(tmp_path, "r.json", results))
    boxes = table.for_image("COCO_val2014_000000000042.jpg", SIZE)
    np.testing.assert_array_equal(boxes.xyxy, [[10, 20, 40, 60]])
    assert boxes.labels == ("18",)
    np.testing.assert_array_equal(boxes.scores, [0.9])
    assert len(table.for_image("COCO_val2014_000000000142.jpg", SIZE)) == 0


def test_coco_instances_give_file_and_category_names(tmp_path):
    document = {
        "images": [{"id": 42, "file_name": "x.jpg", "width": 100, "height": 80}],
        "annotations": [{"id": 1, "image_id": 42, "bbox": [0, 0, 100, 80], "category_id": 18}],
        "categories": [{"id": 18, "name": "dog"}],
    }
    boxes = read_box_file(write(tmp_path, "i.json", document)).for_image("val/x.jpg", SIZE)
    np.testing.assert_array_equal(boxes.xyxy, [[0, 0, 100, 80]])
    assert boxes.labels == ("dog",)


def test_xml_counts_from_one_and_includes_both_corners(tmp_path):
    table = read_box_file(write(tmp_path, "36979.xml", ENTITIES))
    boxes = table.for_image("flickr30k-images/36979.jpg", SIZE)
    np.testing.assert_array_equal(boxes.xyxy, [[0, 0, 100, 80], [10, 20, 20, 21]])
    assert boxes.labels == ("11 12", "13")
    assert table.rows[0].names == ("11", "12")
    np.testing.assert_allclose(boxes.areas, [1, 10 / 8000])


def test_xml_with_one_subtracted_from_all_corners_loses_a_row_and_a_column(tmp_path):
    path = write(tmp_path, "36979.xml", ENTITIES)
    with pytest.warns(
        QpertWarning, match=r"1 of 2 boxes of one pixel's width or height are empty .* are left out"
    ) as said:
        boxes = read_box_file(path, xml_coordinates="one_based_shift_all").for_image("36979", SIZE)
    np.testing.assert_array_equal(boxes.xyxy, [[0, 0, 99, 79]])
    assert said[0].filename == __file__


def test_xml_that_counts_from_zero_stays_as_it_is_and_is_suspected_otherwise(tmp_path):
    path = write(tmp_path, "z.xml", xml(corners(0, 0, 10, 20)))
    boxes = read_box_file(path, xml_coordinates="zero_based").for_image("z.jpg", SIZE)
    np.testing.assert_array_equal(boxes.xyxy, [[0, 0, 10, 20]])
    with pytest.warns(QpertWarning, match=r"1 of 1 boxes start at 0 or below.*xml_coordinates='zero_based'"):
        read_box_file(path)


def test_a_folder_of_xml_files_is_one_table(tmp_path):
    write(tmp_path, "36979.xml", ENTITIES)
    write(tmp_path, "7.xml", xml("<filename>stale_name.jpg</filename>" + corners(1, 1, 2, 2)))
    table = read_box_file(tmp_path)
    assert table.images == ("36979.jpg", "7")
    assert len(table.for_image("7.jpg", SIZE)) == 1


def test_rows_can_be_selected(tmp_path):
    table = read_box_file(write(tmp_path, "36979.xml", ENTITIES)).select(lambda row: "12" in row.names)
    assert [row.names for row in table.rows] == [("11", "12")]


def test_a_stated_size_that_is_not_the_images_is_said(tmp_path):
    table = read_box_file(write(tmp_path, "36979.xml", ENTITIES))
    with pytest.warns(QpertWarning, match=r"object 1: drawn on an image of 100×80 pixels, but 36979\.jpg has 200×160"):
        table.for_image("36979.jpg", (200, 160))


def test_clipping_and_refusal_name_file_and_line(tmp_path):
    table = read_box_file(write(tmp_path, "b.jsonl", lines(box(x2=500), box("b.jpg", x1=200, x2=300))))
    with pytest.warns(QpertWarning, match=r"b.jsonl:1: box \(1, 2, 500, 4\) reached out of the image of 100×80"):
        np.testing.assert_array_equal(table.for_image("a.jpg", SIZE).xyxy, [[1, 2, 100, 4]])
    with pytest.raises(BoxError, match=r"b\.jsonl:2: box .* lies outside the image"):
        table.for_image("b.jpg", SIZE)


def test_names_match_exactly_then_by_file_name_then_by_stem(tmp_path):
    table = read_box_file(write(tmp_path, "b.jsonl", lines(box("train/a.jpg"), box("val/a.jpg", x1=2), box("c.png"))))
    assert table.for_image("val/a.jpg", SIZE).xyxy[0, 0] == 2
    assert len(table.for_image("/data/c.png", SIZE)) == len(table.for_image("c.jpg", SIZE)) == 1
    assert len(table.for_image("d.png", SIZE)) == 0
    with pytest.raises(BoxError, match=r"other/a\.jpg is ambiguous: it matches train/a\.jpg, val/a\.jpg"):
        table.for_image("other/a.jpg", SIZE)


def test_only_a_bare_number_matches_by_number(tmp_path):
    table = read_box_file(write(tmp_path, "b.jsonl", lines(box("cat_7.jpg"), box(8))))
    assert len(table.for_image("dog_7.jpg", SIZE)) == 0
    assert len(table.for_image("dog_008.jpg", SIZE)) == 1
    with pytest.raises(BoxError, match=r"no image has a name like it|near matches"):
        table.require(["dog_7.jpg", "dog_008.jpg"])


def test_required_names_are_the_only_ones_that_match_afterwards(tmp_path):
    table = read_box_file(write(tmp_path, "b.jsonl", lines(box("x\\a.jpg"))))
    assert len(table.require(["images/a.jpg", "images/b.jpg"]).for_image("images/a.jpg", SIZE)) == 1
    both = read_box_file(write(tmp_path, "c.jsonl", lines(box("one/a.jpg")))).require(["one/a.jpg", "two/a.jpg"])
    assert len(both.for_image("one/a.jpg", SIZE)) == 1
    assert len(both.for_image("two/a.jpg", SIZE)) == 0


@pytest.mark.parametrize(
    ("own", "names", "message"),
    [
        (["dgo.jpg"], ["dog.jpg", "cat.jpg"], "b.jsonl:1: boxes for the image 'dgo.jpg', .* near matches: dog.jpg"),
        (["zzz"], ["dog.jpg"], "which is not among the 1 images; no image has a name like it"),
        (["a.jpg"], ["x/a.jpg", "y/a.jpg"], "'a.jpg' is ambiguous: it matches x/a.jpg, y/a.jpg"),
        (["a"], ["a.jpg", "a.png"], "'a' is ambiguous"),
        (["a.jpg", "x/a.jpg"], ["y/a.jpg"], "'a.jpg' and 'x/a.jpg' both match the image 'y/a.jpg'"),
        (["7"], ["p_7.jpg", "q_007.jpg"], "'7' is ambiguous"),
    ],
)
def test_boxes_of_an_unknown_or_ambiguous_image_are_an_error(tmp_path, own, names, message):
    table = read_box_file(write(tmp_path, "b.jsonl", lines(*(box(name) for name in own))))
    with pytest.raises(BoxError, match=message):
        table.require(names)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"image": "a", "x1": 1, "y1": 2, "x2": 3}', "b.jsonl:1 lacks y2"),
        ('\n{"image": "a"', "b.jsonl:2 is not JSON"),
        ("[1, 2]", "b.jsonl:1 is a list; expected a JSON object"),
        (lines(box(), box(x1=float("nan"))), "b.jsonl:2: x1 is nan; expected a finite number"),
        (lines(box(x1="1")), "b.jsonl:1: x1 is '1'; expected a number"),
        (lines(box(x1=True)), "x1 is True; expected a number"),
        (lines(box(x1=None)), "x1 is None"),
        (lines(box(x1=10**400)), "x1 is 1000"),
        (lines(box(x1=9)), r"b.jsonl:1: box \(9, 2, 3, 4\) is inverted"),
        (lines(box(x1=3)), "b.jsonl:1: box .* is empty"),
        (lines(box(score="high")), "score is 'high'"),
        (lines(box(image=[1])), "image's name is .*; expected"),
        (lines(box(image=" ")), "image's name is empty"),
        ("[" * 100_000, "b.jsonl:1 is not JSON"),
    ],
)
def test_a_bad_jsonl_line_is_an_error_that_names_it(tmp_path, content, message):
    with pytest.raises(BoxError, match=message):
        read_box_file(write(tmp_path, "b.jsonl", content))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"b.csv:1 has the columns \(none\)"),
        ("a.jpg,1,2,3,4\n", "b.csv:1 has the columns a.jpg, 1, 2, 3, 4 and lacks image"),
        ("image,x1,y1,x2\na,1,2,3\n", "lacks y2; expected a header"),
        ("image,x1,y1,x2,y2\na,1,2,3,4\nb,1,2,x,4\n", "b.csv:3: x2 is 'x'; expected a number"),
        ("image,x1,y1,x2,y2\na,1,2,nan,4\n", "b.csv:2: x2 is nan"),
        ("image,x1,y1,x2,y2\na,1,2,,4\n", "b.csv:2 lacks x2"),
        ("image,x1,y1,x2,y2\na,1,2\n", "b.csv:2 does not have 5 cells, as its header does"),
        ("image,x1,y1,x2,y2\na,1,2,3,4,5\n", "b.csv:2 does not have 5 cells"),
        ("image,x1,y1,x2,y2\na,5,2,3,4\n", "b.csv:2: box .* is inverted"),
        ("image,x1,y1,x2,y2\na,3,2,3,4\n", "b.csv:2: box .* is empty"),
        ('image,x1,y1,x2,y2\n"a,1,2,3,4\n', "is not CSV"),
    ],
)
def test_a_bad_csv_row_is_an_error_that_names_it(tmp_path, content, message):
    with pytest.raises(BoxError, match=message):
        read_box_file(write(tmp_path, "b.csv", content))


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"a": 1}, "neither COCO results"),
        ("text", "neither COCO results"),
        ([{"bbox": [1, 2, 3, 4]}], r"\[0\] lacks 'image_id'; it has bbox"),
        ([{"image_id": 1, "bbox": [1, 2, 3, 4]}, {"image_id": 1}], r"\[1\] lacks 'bbox'"),
        ([{"image_id": 1, "bbox": [1, 2, 3]}], r"\[0\]: bbox is \[1, 2, 3\]; expected \[x, y, width, height\]"),
        ([{"image_id": 1, "bbox": [1, 2, 0, 4]}], "an empty box"),
        ([{"image_id": 1, "bbox": [1, 2, -3, 4]}], "an empty box"),
        ([{"image_id": 1, "bbox": [1, "2", 3, 4]}], r"bbox\[1\] is '2'; expected a number"),
        ([{"image_id": 1, "bbox": [1, float("inf"), 3, 4]}], "expected a finite number"),
        ([{"image_id": 1.5, "bbox": [1, 2, 3, 4]}], "image_id is 1.5; expected a whole number or a string"),
        ([7], r"\[0\] is a int; expected a JSON object"),
        ({"annotations": []}, "has no list 'images'"),
        (
            {"images": [], "annotations": [{"image_id": 3, "bbox": [1, 2, 3, 4]}]},
            r"annotations\[0\] is of image_id 3, which is not among",
        ),
        (
            {
                "images": [{"id": 3, "file_name": "a.jpg"}],
                "annotations": [{"image_id": 3, "bbox": [1, 2, 3, 4], "category_id": 9}],
                "categories": [],
            },
            "category_id is 9, which is not among",
        ),
        ({"images": [{}], "annotations": []}, r"images\[0\] lacks 'id'"),
    ],
)
def test_a_bad_coco_entry_is_an_error_that_names_it(tmp_path, document, message):
    with pytest.raises(BoxError, match=message):
        read_box_file(write(tmp_path, "c.json", json.dumps(document)))


BOMB = '<!DOCTYPE x [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;">]>'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("<annotation>", "is not XML"),
        ("", "is not XML"),
        ("<html></html>", "has the root <html>; expected <annotation>"),
        (xml(corners("one", 1, 2, 2)), "object 1: xmin is 'one'; expected a number"),
        (xml(corners(1, 1, 2, 2) + corners(1, 1, "nan", 2)), "object 2: xmax is nan"),
        (xml(corners(9, 1, 2, 2)), r"object 1 \(9, 1, 3, 3\) is inverted"),
        (xml(corners(3, 1, 2, 2)), "object 1 .* is empty"),
        (xml("<object><bndbox><xmin>1</xmin></bndbox></object>"), "object 1 lacks <ymin>"),
        (xml("<filename>&b;</filename>", BOMB), "declares a DOCTYPE"),
        (xml("", '<!DOCTYPE x SYSTEM "file:///etc/passwd">'), "declares a DOCTYPE"),
    ],
)
def test_a_bad_xml_file_is_an_error_that_names_it(tmp_path, content, message):
    with pytest.raises(BoxError, match=message) as caught:
        read_box_file(write(tmp_path, "36979.xml", content))
    assert "36979.xml" in str(caught.value)


def test_a_doctype_is_refused_in_any_encoding(tmp_path):
    (tmp_path / "u.xml").write_bytes(('<?xml version="1.0" encoding="utf-16"?>' + xml("", BOMB)).encode("utf-16"))
    with pytest.raises(BoxError, match="declares a DOCTYPE"):
        read_box_file(tmp_path / "u.xml")


def test_files_that_are_no_box_files_are_errors(tmp_path):
    with pytest.raises(BoxError, match="does not exist; expected a box file"):
        read_box_file(tmp_path / "none.jsonl")
    with pytest.raises(BoxError, match=r"cannot read .*none\.xml"):
        read_box_file(tmp_path / "none.xml")
    with pytest.raises(BoxError, match=r"extension '\.txt'; expected \.jsonl, \.csv"):
        read_box_file(write(tmp_path, "b.txt", ""))
    with pytest.raises(BoxError, match=r"has no \.xml file"):
        read_box_file(tmp_path)
    (tmp_path / "b.csv").write_bytes(b"\xff\xfe")
    with pytest.raises(BoxError, match="is not UTF-8"):
        read_box_file(tmp_path / "b.csv")
    with pytest.raises(BoxError, match="xml_coordinates is 'voc'; expected one of one_based_inclusive"):
        read_box_file(tmp_path / "b.csv", xml_coordinates="voc")


def test_the_example_boxes_fit_the_example_photographs():
    photos = sorted(PHOTOS.glob("*.jpg"))
    table = read_box_file(PHOTOS / "boxes.jsonl").require(photo.name for photo in photos)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for photo in photos:
            boxes = table.for_image(photo.name, load_image(photo).size)
            assert 2 <= len(boxes) <= 5
            assert boxes.labels is not None
