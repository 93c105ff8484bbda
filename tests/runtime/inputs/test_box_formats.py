"""What box files of real tools hold beyond plain boxes: crowds, rotation, two values for one thing, bad boxes."""

import json
import math
import warnings

import numpy as np
import pytest
from shared_data import shared_folder

from qpert.runtime.errors import BoxError, QpertWarning
from qpert.runtime.inputs.box_files import read_box_file
from qpert.runtime.inputs.boxes import Boxes

SIZE = (100, 80)


def write(folder, name, content):
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def instances(*annotations, images=({"id": 1, "file_name": "a.jpg"},)):
    listed = [{"id": place, "image_id": 1, "category_id": 1, **one} for place, one in enumerate(annotations, start=1)]
    return {"images": list(images), "annotations": listed, "categories": [{"id": 1, "name": "p"}]}


def xml(inner, tag="bndbox", after=""):
    return f"<annotation><object><name>dog</name><{tag}>{inner}</{tag}>{after}</object></annotation>"


CORNERS = "<xmin>11</xmin><ymin>31</ymin><xmax>70</xmax><ymax>40</ymax>"
"""The COCO box [10, 30, 60, 10], as VOC writes it."""

ROTATION = "<attributes><attribute><name>rotation</name><value>{}</value></attribute></attributes>"


def hull(centre, size, degrees):
    """The smallest upright box around a turned one, from its four corners turned one by one."""
    angle = math.radians(degrees)
    offsets = np.array([(x * size[0] / 2, y * size[1] / 2) for x in (-1, 1) for y in (-1, 1)])
    turned = offsets @ np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    return [*(centre + turned.min(axis=0)), *(centre + turned.max(axis=0))]


# Two values for one thing


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("b.csv", "image,x1,y1,x2,y2,x1\na.jpg,1,2,30,40,7\n", "box-column-twice"),
        ("b.csv", "image,x1,y1,x2,y2,score,score \na.jpg,1,2,30,40,1,1\n", "box-column-twice"),
        ("b.csv", "image,label,x1,y1,x2,y2,image\na.jpg,x,1,2,30,40,b.jpg\n", "box-column-twice"),
        ("b.jsonl", '{"image": "a.jpg", "x1": 1, "y1": 2, "x2": 30, "y2": 40, "x1": 7}', "box-file-json"),
        ("b.json", '[{"image_id": 1, "bbox": [1, 2, 3, 4], "bbox": [1, 2, 3, 5]}]', "box-file-json"),
        ("b.xml", xml(CORNERS + "<xmin>7</xmin>"), "box-column-twice"),
        (
            "b.json",
            instances(images=[{"id": 1, "file_name": "a.jpg"}, {"id": 1, "file_name": "b.jpg"}]),
            "box-id-twice",
        ),
    ],
)
def test_two_values_for_one_thing_are_an_error(tmp_path, name, content, code):
    with pytest.raises(BoxError) as caught:
        read_box_file(write(tmp_path, name, content))
    assert caught.value.code == code


def test_columns_without_a_name_and_blanks_around_names_are_no_repetition(tmp_path):
    table = read_box_file(write(tmp_path, "b.csv", "image, x1,y1,x2 ,y2,,\na.jpg,1,2,30,40,7,8\n"))
    assert table.for_image("a.jpg", SIZE).xyxy.tolist() == [[1, 2, 30, 40]]


@pytest.mark.parametrize("number", ["1_0", "\uff11\uff10", "0x10", "1,5", ""])
@pytest.mark.parametrize("reader", ["csv", "csv score", "xml", "robndbox", "rotation"])
def test_a_number_is_plain_decimal_in_every_reader(tmp_path, reader, number):
    quoted = f'"{number}"'
    files = {
        "csv": ("b.csv", f"image,x1,y1,x2,y2\na.jpg,{quoted},2,30,40\n"),
        "csv score": ("b.csv", f"image,x1,y1,x2,y2,score\na.jpg,1,2,30,40,{quoted if number else 'x'}\n"),
        "xml": ("b.xml", xml(CORNERS.replace(">11<", f">{number}<"))),
        "robndbox": ("b.xml", xml(f"<cx>{number}</cx><cy>9</cy><w>5</w><h>5</h><angle>0</angle>", "robndbox")),
        "rotation": ("b.xml", xml(CORNERS, after=ROTATION.format(number))),
    }
    with pytest.raises(BoxError) as caught:
        read_box_file(write(tmp_path, *files[reader]))
    assert caught.value.code in ("box-number", "box-column-missing")


# Crowds, annotations without a box, nothing at all


@pytest.mark.parametrize("crowd", [1, True, 1.0])
def test_crowd_regions_are_no_objects_as_for_pycocotools(tmp_path, crowd):
    path = write(
        tmp_path,
        "c.json",
        instances({"bbox": [0, 0, 99, 79], "iscrowd": crowd}, {"bbox": [1, 2, 30, 40], "iscrowd": 0}),
    )
    with pytest.warns(QpertWarning, match=r"1 of 2 boxes are crowd regions .*: .*annotations\[0\]") as said:
        boxes = read_box_file(path).for_image("a.jpg", SIZE)
    assert boxes.xyxy.tolist() == [[1, 2, 31, 42]]
    assert said[0].filename == __file__


@pytest.mark.parametrize("bbox", [[], None])
def test_an_annotation_without_a_box_is_left_out_and_counted(tmp_path, bbox):
    path = write(tmp_path, "c.json", instances({"bbox": bbox}, {"bbox": [1, 2, 30, 40]}))
    with pytest.warns(QpertWarning, match="1 of 2 boxes are annotations without a box"):
        assert read_box_file(path).for_image("a.jpg", SIZE).xyxy.tolist() == [[1, 2, 31, 42]]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("b.json", []),
        ("b.json", instances()),
        ("b.jsonl", "\n"),
        ("b.csv", "image,x1,y1,x2,y2\n"),
        ("b.xml", "<annotation></annotation>"),
    ],
)
def test_a_file_without_any_box_is_said(tmp_path, name, content):
    with pytest.warns(QpertWarning, match="holds no boxes"):
        assert read_box_file(write(tmp_path, name, content)).rows == ()


# Rotation


@pytest.mark.parametrize("degrees", [45, 30.0, -20, 90, 200.5, "45.0"])
def test_a_box_that_cvat_has_rotated_becomes_the_upright_box_around_it(tmp_path, degrees):
    expected = hull((40, 35), (60, 10), float(degrees))
    coco = write(tmp_path, "c.json", instances({"bbox": [10, 30, 60, 10], "attributes": {"rotation": degrees}}))
    voc = write(tmp_path, "a.xml", xml(CORNERS, after=ROTATION.format(degrees)))
    for path in (coco, voc):
        with pytest.warns(QpertWarning, match="1 of 1 boxes are rotated"):
            row = read_box_file(path).rows[0]
        np.testing.assert_allclose(row.xyxy, expected, atol=1e-9)


def test_a_right_angle_exchanges_width_and_height():
    np.testing.assert_allclose(hull((40, 35), (60, 10), 90), [35, 5, 45, 65], atol=1e-9)


def test_without_rotation_nothing_is_changed_or_said(tmp_path):
    coco = write(tmp_path, "c.json", instances({"bbox": [10, 30, 60, 10], "attributes": {"rotation": 0.0}}))
    voc = write(tmp_path, "a.xml", xml(CORNERS, after=ROTATION.format("0.0")))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for path in (coco, voc):
            assert read_box_file(path).for_image("a.jpg", SIZE).xyxy.tolist() == [[10, 30, 70, 40]]


def test_rolabelimgs_rotated_box_becomes_the_upright_box_around_it(tmp_path):
    inner = "<cx>40</cx><cy>35</cy><w>60</w><h>10</h><angle>0.7853981633974483</angle>"
    with pytest.warns(QpertWarning, match="are rotated"):
        table = read_box_file(write(tmp_path, "a.xml", xml(inner, "robndbox")))
    np.testing.assert_allclose(table.rows[0].xyxy, hull((40, 35), (60, 10), 45), atol=1e-9)
    assert table.rows[0].names == ("dog",)


def test_an_object_with_both_boxes_is_one_box(tmp_path):
    inner = "<cx>40</cx><cy>35</cy><w>60</w><h>10</h><angle>0</angle>"
    path = write(tmp_path, "a.xml", xml(inner, "robndbox", after=f"<bndbox>{CORNERS}</bndbox>"))
    with pytest.warns(QpertWarning, match="1 of 1 boxes are rotated"):
        assert [row.xyxy for row in read_box_file(path).rows] == [(10, 30, 70, 40)]


def test_an_object_drawn_as_something_else_is_said_to_be_left_out(tmp_path):
    polygon = "<object><name>x</name><polygon><x1>1</x1><y1>2</y1></polygon></object>"
    scene = "<object><name>1</name><scene>1</scene><nobndbox>1</nobndbox></object>"
    path = write(tmp_path, "a.xml", xml(CORNERS).replace("</annotation>", f"{polygon}{scene}</annotation>"))
    with pytest.warns(QpertWarning, match=r"1 of 2 boxes are objects without a <bndbox>.*: .*object 2$") as said:
        assert len(read_box_file(path).rows) == 1
    assert len(said) == 1


@pytest.mark.parametrize(("column", "value"), [("rotation", 30), ("angle", 0.5)])
def test_a_rotation_that_is_not_read_is_said(tmp_path, column, value):
    row = {"image": "a.jpg", "x1": 1, "y1": 2, "x2": 3, "y2": 4}
    path = write(tmp_path, "b.jsonl", json.dumps({**row, column: value}) + "\n" + json.dumps({**row, column: 0}))
    with pytest.warns(QpertWarning, match=f"1 of 2 boxes have a {column}, which is not read"):
        assert len(read_box_file(path).rows) == 2


# COCO's relatives


@pytest.mark.parametrize(("image_id", "own"), [(139.0, 139), (139, 139.0), ("139", 139), (139, "139")])
def test_an_id_is_the_same_as_float_or_string(tmp_path, image_id, own):
    document = {
        "images": [{"id": own, "file_name": "a.jpg"}],
        "annotations": [{"image_id": image_id, "bbox": [1, 2, 3, 4], "category_id": 18.0}],
        "categories": [{"id": 18, "name": "dog"}],
    }
    boxes = read_box_file(write(tmp_path, "i.json", document)).for_image("a.jpg", SIZE)
    assert boxes.labels == ("dog",)
    results = [{"image_id": image_id, "bbox": [1, 2, 3, 4]}]
    assert len(read_box_file(write(tmp_path, "r.json", results)).for_image("000000000139.jpg", SIZE)) == 1


@pytest.mark.parametrize("image_id", [1.5, float("nan"), float("inf"), True, None, [1]])
def test_what_is_no_id_is_an_error(tmp_path, image_id):
    with pytest.raises(BoxError) as caught:
        read_box_file(write(tmp_path, "r.json", [{"image_id": image_id, "bbox": [1, 2, 3, 4]}]))
    assert caught.value.code == "box-identifier"


def test_lvis_names_its_images_by_url(tmp_path):
    url = "http://images.cocodataset.org/val2017/000000397133.jpg"
    path = write(tmp_path, "l.json", instances({"bbox": [1, 2, 3, 4]}, images=[{"id": 1, "coco_url": url}]))
    table = read_box_file(path)
    assert table.images == ("val2017/000000397133.jpg",)
    assert len(table.require(["x/000000397133.jpg"]).for_image("x/000000397133.jpg", SIZE)) == 1


# Bad boxes


def test_bad_boxes_can_be_left_out_and_are_counted_and_named(tmp_path):
    bad = [
        {"x1": 5, "y1": 2, "x2": 5, "y2": 4},
        {"x1": 9, "y1": 2, "x2": 5, "y2": 4},
        {"x1": 1, "x2": 5, "y2": 4},
        {"x1": float("nan"), "y1": 2, "x2": 5, "y2": 4},
        {"x1": "x", "y1": 2, "x2": 5, "y2": 4},
    ]
    rows = [{"image": "a.jpg", **one} for one in [*bad, {"x1": 1, "y1": 2, "x2": 3, "y2": 4}]]
    path = write(tmp_path, "b.jsonl", "\n".join(map(json.dumps, rows)))
    with pytest.raises(BoxError, match=r"b\.jsonl:1: box .* is empty; .*--skip-bad-boxes"):
        read_box_file(path)
    with pytest.warns(QpertWarning, match=r"5 of 6 boxes cannot be used .*b\.jsonl:1: .*; .*b\.jsonl:2: .* and 2 more"):
        table = read_box_file(path, skip_bad_boxes=True)
    assert table.for_image("a.jpg", SIZE).xyxy.tolist() == [[1, 2, 3, 4]]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("b.csv", "image,x1,y1,x2,y2\na.jpg,1,2,,4\na.jpg,1,2,nan,4\na.jpg,1,2,3,4\n"),
        ("b.json", [{"image_id": "a", "bbox": b} for b in ([1, 2, 0.5, 0.0], [1, 2, -3, 4], [1, 2], [1, 2, 2, 2])]),
        ("b.json", [{"image_id": "a"}, {"image_id": "a", "bbox": [1, 2, 2, 2]}]),
        ("b.xml", "<annotation>{}{}</annotation>".format(
            "<object><bndbox><xmin>5</xmin><ymin>3</ymin><xmax>2</xmax><ymax>4</ymax></bndbox></object>",
            "<object><bndbox><xmin>2</xmin><ymin>3</ymin><xmax>3</xmax><ymax>4</ymax></bndbox></object>")),
    ],
)  # fmt: skip
def test_bad_boxes_can_be_left_out_of_every_format(tmp_path, name, content):
    path = write(tmp_path, name, content)
    with pytest.raises(BoxError):
        read_box_file(path)
    with pytest.warns(QpertWarning, match="cannot be used and are left out"):
        table = read_box_file(path, skip_bad_boxes=True)
    assert [row.xyxy for row in table.rows] == [(1, 2, 3, 4)]


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("b.jsonl", "{", "box-file-json"),
        ("b.csv", "image,x1\na,1\n", "box-file-header"),
        ("b.json", {"images": []}, "box-file-coco"),
        ("b.json", [{"bbox": [1, 2, 3, 4]}], "box-file-entry"),
    ],
)
def test_what_is_wrong_with_the_file_itself_is_an_error_all_the_same(tmp_path, name, content, code):
    with pytest.raises(BoxError) as caught:
        read_box_file(write(tmp_path, name, content), skip_bad_boxes=True)
    assert caught.value.code == code


@pytest.mark.parametrize(("box", "code"), [([300, 2, 5, 5], "box-outside"), ([100, 2, 5, 5], None)])
def test_boxes_outside_their_image_can_be_left_out(tmp_path, box, code):
    path = write(tmp_path, "b.json", [{"image_id": "a", "bbox": b} for b in (box, [1, 2, 2, 2])])
    if code:
        with pytest.raises(BoxError) as caught:
            read_box_file(path).for_image("a.jpg", SIZE)
        assert caught.value.code == code
    table = read_box_file(path, skip_bad_boxes=True)
    with pytest.warns(QpertWarning, match=r"1 boxes outside a\.jpg \(100×80 pixels\) are left out .*\[0\]"):
        assert table.for_image("a.jpg", SIZE).xyxy.tolist() == [[1, 2, 3, 4]]
    only = read_box_file(write(tmp_path, "c.json", [{"image_id": "a", "bbox": [300, 2, 5, 5]}]), skip_bad_boxes=True)
    with pytest.warns(QpertWarning):
        assert isinstance(only.for_image("a.jpg", SIZE), Boxes)


# Folders of XML files


def test_what_systems_leave_in_a_folder_of_xml_files_is_no_annotation(tmp_path):
    write(tmp_path, "a.xml", xml(CORNERS))
    write(tmp_path, "b.XML", xml(CORNERS))
    for name in ("._a.xml", ".DS_Store", "Thumbs.db", "._pictures", ".hidden.xml"):
        (tmp_path / name).write_bytes(b"\0\5\x16\7\0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_box_file(tmp_path).images == ("a", "b")


def test_a_folder_of_litter_alone_is_refused(tmp_path):
    (tmp_path / "._a.xml").write_bytes(b"\0\5\x16\7")
    with pytest.raises(BoxError) as caught:
        read_box_file(tmp_path)
    assert caught.value.code == "box-folder-empty"


def test_the_cases_of_public_reports_are_read(tmp_path):
    cases = shared_folder("cases/box")
    expected = {
        "coco_crowd.json": [[1, 2, 31, 42]],
        "coco_emptybbox.json": [],
        "coco_edge.json": [[1, 1, 6, 6]],
        "coco_rotattr.json": [hull((40, 35), (60, 10), 45)],
        "none.json": [],
    }
    for name, boxes in expected.items():
        image = "1.jpg" if name == "coco_edge.json" else "a.jpg"
        with pytest.warns(QpertWarning):
            found = read_box_file(cases / name).for_image(image, SIZE)
        np.testing.assert_allclose(found.xyxy, np.array(boxes).reshape(-1, 4), atol=1e-9)
    with pytest.warns(QpertWarning, match="1 of 2 boxes cannot be used"):
        table = read_box_file(cases / "coco_zero.json", skip_bad_boxes=True)
    assert table.for_image("000000200365.jpg", SIZE).xyxy.tolist() == [[1, 2, 31, 42]]
    with pytest.raises(BoxError) as caught:
        read_box_file(cases / "dup.csv")
    assert caught.value.code == "box-column-twice"
