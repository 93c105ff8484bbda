"""Readers of LAVIS annotation JSON and Flickr30k Entities: the generated trees, hand-written ones, and bad input."""

import json

import numpy as np
import pytest
from PIL import Image

from qpert.runtime.errors import BoxError, InputError, QpertWarning
from qpert.runtime.inputs.datasets import read_dataset
from qpert.runtime.scenes import generate, write_dataset

XML = """<annotation><filename>{stem}.jpg</filename>
<size><width>40</width><height>30</height><depth>3</depth></size>
<object><name>11</name><scene>1</scene><nobndbox>1</nobndbox></object>
<object><name>12</name><name>15</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>10</xmax><ymax>20</ymax></bndbox></object>
<object><name>13</name><bndbox><xmin>31</xmin><ymin>21</ymin><xmax>40</xmax><ymax>30</ymax></bndbox></object>
<object><name>13</name><bndbox><xmin>5</xmin><ymin>5</ymin><xmax>5</xmax><ymax>5</ymax></bndbox></object>
<object><name>99</name><bndbox><xmin>2</xmin><ymin>2</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></object>
</annotation>"""


@pytest.fixture
def tree(tmp_path):
    """Two pictures, of which the first has an Entities file."""
    for part in ("annotations", "flickr30k-images", "flickr30k_entities/Annotations", "flickr30k_entities/Sentences"):
        (tmp_path / part).mkdir(parents=True)
    for stem in ("7", "8"):
        Image.new("RGB", (40, 30)).save(tmp_path / "flickr30k-images" / f"{stem}.jpg")
    entities = tmp_path / "flickr30k_entities"
    (entities / "Annotations" / "7.xml").write_text(XML.format(stem="7"))
    lines = (
        "[/EN#12/people A man] and [/EN#13/other two dots] .\n[/EN#0/notvisual Nothing] in [/EN#11/scene a park] .\n"
    )
    (entities / "Sentences" / "7.txt").write_text(lines)
    write(tmp_path, [entry("7", "a", "b"), entry("8", "Café — ☃ 猫")])
    return tmp_path


def entry(stem, *captions):
    return {"image": f"flickr30k-images/{stem}.jpg", "caption": list(captions)}


def write(root, entries):
    (root / "annotations" / "test.json").write_text(json.dumps(entries))


def test_texts_are_numbered_in_order_and_know_their_image(tree):
    with pytest.warns(QpertWarning, match="1 of 2 images are not in"):
        dataset = read_dataset(tree)
    assert dataset.names == ("flickr30k-images/7.jpg", "flickr30k-images/8.jpg")
    assert dataset.images[1] == tree / "flickr30k-images" / "8.jpg"
    assert dataset.captions == ("a", "b", "Café — ☃ 猫")
    assert dataset.image_of_caption.tolist() == [0, 0, 1]
    assert dataset.take(1).captions == ("a", "b")


def test_boxes_count_when_a_sentence_names_their_chain_and_are_zero_based_half_open(tree):
    with pytest.warns(QpertWarning, match="no boxes"):
        dataset = read_dataset(tree)
    assert dataset.boxes_of(0, (40, 30)).xyxy.tolist() == [[0, 0, 10, 20], [30, 20, 40, 30], [4, 4, 5, 5]]
    assert len(dataset.boxes_of(1, (40, 30))) == 0


def test_without_a_sentences_file_all_boxes_count(tree):
    (tree / "flickr30k_entities" / "Sentences" / "7.txt").unlink()
    with pytest.warns(QpertWarning, match="no boxes"):
        assert len(read_dataset(tree).boxes_of(0, (40, 30))) == 4


def test_the_releases_reading_of_corners_can_be_chosen(tree):
    with pytest.warns(QpertWarning) as said:
        dataset = read_dataset(tree, xml_coordinates="one_based_shift_all")
    assert any("left out" in str(one.message) for one in said)
    assert dataset.boxes_of(0, (40, 30)).xyxy.tolist() == [[0, 0, 9, 19], [30, 20, 39, 29]]


def test_without_entities_no_boxes_are_read(tree):
    (tree / "flickr30k_entities").rename(tree / "elsewhere")
    assert read_dataset(tree, entities=False).boxes is None
    with pytest.raises(BoxError, match="neither flickr30k_entities/Annotations nor coco_entities/Annotations"):
        read_dataset(tree)


def test_an_entry_without_image_file_is_an_error_that_counts(tree):
    write(tree, [entry("7", "a"), entry("9", "b"), entry("10", "c")])
    with pytest.raises(InputError, match=r"2 of 3 images are not under .*: flickr30k-images/9.jpg"):
        read_dataset(tree)


def test_a_repeated_image_is_an_error_that_names_both_entries(tree):
    write(tree, [entry("7", "a"), entry("8", "b"), entry("7", "c")])
    with pytest.raises(InputError, match=r"\[2\] repeats the image 'flickr30k-images/7.jpg' of \[0\]"):
        read_dataset(tree)


def test_the_training_layout_of_one_entry_a_caption_is_grouped_by_image(tree):
    entries = [("7", "a"), ("8", "b"), ("7", "c"), ("8", "..."), ("7", "a")]
    listed = [{"image": f"flickr30k-images/{stem}.jpg", "caption": text, "image_id": stem} for stem, text in entries]
    (tree / "annotations" / "train.json").write_text(json.dumps(listed))
    dataset = read_dataset(tree, "train", entities=False)
    assert dataset.names == ("flickr30k-images/7.jpg", "flickr30k-images/8.jpg")
    assert dataset.captions == ("a", "c", "a", "b", "...")
    assert dataset.image_of_caption.tolist() == [0, 0, 0, 1, 1]
    assert dataset.take(1).captions == ("a", "c", "a")


@pytest.mark.parametrize("captions", [(["a"], "b"), ("a", ["b"]), (["a"], ["b"])])
def test_an_image_that_comes_back_in_the_evaluation_layout_is_an_error(tree, captions):
    write(tree, [{"image": "flickr30k-images/7.jpg", "caption": caption} for caption in captions])
    with pytest.raises(InputError) as caught:
        read_dataset(tree, entities=False)
    assert caught.value.code == "annotation-image-twice"


def test_an_entry_with_two_captions_of_one_key_is_an_error(tree):
    (tree / "annotations" / "test.json").write_text(
        '[{"image": "flickr30k-images/7.jpg", "caption": "a", "caption": "b"}]'
    )
    with pytest.raises(InputError) as caught:
        read_dataset(tree, entities=False)
    assert caught.value.code == "annotation-file"


def test_images_and_entities_are_found_under_the_other_unicode_form_of_their_names(tree):
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    Image.new("RGB", (40, 30)).save(tree / "flickr30k-images" / f"{decomposed}.jpg")
    entities = tree / "flickr30k_entities"
    (entities / "Annotations" / f"{decomposed}.xml").write_text(XML.format(stem=composed), encoding="utf-8")
    write(tree, [entry(composed, "a")])
    dataset = read_dataset(tree)
    assert dataset.images == (tree / "flickr30k-images" / f"{decomposed}.jpg",)
    assert len(dataset.boxes_of(0, (40, 30))) == 4


def test_entities_are_those_of_the_whole_name_before_its_extension(tree):
    for stem in ("clip", "clip.0001"):
        Image.new("RGB", (40, 30)).save(tree / "flickr30k-images" / f"{stem}.jpg")
    (tree / "flickr30k_entities" / "Annotations" / "clip.0001.xml").write_text(XML.format(stem="clip.0001"))
    write(tree, [entry("clip", "a"), entry("clip.0001", "b")])
    with pytest.warns(QpertWarning, match="1 of 2 images are not in .*: flickr30k-images/clip.jpg"):
        dataset = read_dataset(tree)
    assert [len(dataset.boxes_of(index, (40, 30))) for index in (0, 1)] == [0, 4]


def test_two_images_of_one_entities_file_are_an_error(tree):
    Image.new("RGB", (40, 30)).save(tree / "flickr30k-images" / "7.png")
    write(tree, [entry("7", "a"), {"image": "flickr30k-images/7.png", "caption": ["b"]}])
    with pytest.raises(BoxError) as caught:
        read_dataset(tree)
    assert caught.value.code == "box-image-twice"


def test_what_macos_leaves_beside_entities_is_no_annotation(tree):
    (tree / "flickr30k_entities" / "Annotations" / "._7.xml").write_bytes(b"\0\5\x16\7")
    (tree / "flickr30k_entities" / "Annotations" / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    write(tree, [entry("7", "a")])
    assert len(read_dataset(tree).boxes_of(0, (40, 30))) == 3


def test_bad_entities_boxes_can_be_left_out(tree):
    annotation = tree / "flickr30k_entities" / "Annotations" / "7.xml"
    annotation.write_text(annotation.read_text().replace("<xmin>31</xmin>", "<xmin>41</xmin>"))
    write(tree, [entry("7", "a")])
    with pytest.raises(BoxError) as caught:
        read_dataset(tree)
    assert caught.value.code == "box-empty"
    with pytest.warns(QpertWarning, match=r"1 of 4 boxes cannot be used .*7\.xml: object 3") as said:
        dataset = read_dataset(tree, skip_bad_boxes=True)
    assert said[0].filename == __file__
    assert dataset.boxes_of(0, (40, 30)).xyxy.tolist() == [[0, 0, 10, 20], [4, 4, 5, 5]]


@pytest.mark.parametrize(
    "bad",
    [
        {"image": "../7.jpg", "caption": ["a"]},
        {"image": "/etc/7.jpg", "caption": ["a"]},
        {"image": "", "caption": ["a"]},
        {"image": 7, "caption": ["a"]},
        {"caption": ["a"]},
        {"image": "flickr30k-images/7.jpg"},
        {"image": "flickr30k-images/7.jpg", "caption": []},
        {"image": "flickr30k-images/7.jpg", "caption": ["a", " "]},
        {"image": "flickr30k-images/7.jpg", "caption": [3]},
        "flickr30k-images/7.jpg",
    ],
)
def test_a_malformed_entry_is_an_error_that_names_it(tree, bad):
    write(tree, [entry("8", "b"), bad])
    with pytest.raises(InputError, match=r"test.json: \[1\]"):
        read_dataset(tree)


def test_annotations_that_are_missing_or_no_list_are_errors(tree):
    with pytest.raises(InputError, match=r"has no annotations/val\.json"):
        read_dataset(tree, "val")
    with pytest.raises(InputError, match="expected one of train, val, test"):
        read_dataset(tree, "dev")
    with pytest.raises(InputError, match="does not exist"):
        read_dataset(tree / "nowhere")
    (tree / "annotations" / "test.json").write_text("{}")
    with pytest.raises(InputError, match="expected LAVIS annotation JSON"):
        read_dataset(tree)
    (tree / "annotations" / "test.json").write_text("[")
    with pytest.raises(InputError, match="cannot read the annotation"):
        read_dataset(tree)


@pytest.mark.parametrize(("layout", "folder"), [("flickr30k", "flickr30k-images"), ("coco", "val2014")])
def test_the_generators_output_is_read_back_with_the_boxes_of_the_scenes(tmp_path, layout, folder):
    write_dataset(tmp_path, "test", 12, seed=5, layout=layout)
    dataset = read_dataset(tmp_path)
    assert len(dataset) == 12
    assert all(name.startswith(folder) for name in dataset.names)
    assert dataset.image_of_caption.tolist() == np.repeat(np.arange(12), 5).tolist()
    for index, (scene, captions) in enumerate(generate("test", 12, 5)):
        assert dataset.captions[5 * index : 5 * index + 5] == tuple(caption.text for caption in captions)
        with Image.open(dataset.images[index]) as picture:
            boxes = dataset.boxes_of(index, picture.size)
        named = {piece.group for caption in captions for piece in caption.pieces if not isinstance(piece, str)}
        expected = [list(item.box) for item in scene.objects if item.group in named]
        assert boxes.xyxy.tolist() == expected


def coco_tree(root, document):
    """Two COCO pictures and COCO Entities' own JSON."""
    for part in ("annotations", "val2014"):
        (root / part).mkdir()
    names = [f"val2014/COCO_val2014_{number:012d}.jpg" for number in (42, 7)]
    for name in names:
        Image.new("RGB", (40, 30)).save(root / name)
    write(root, [{"image": name, "caption": ["a"]} for name in names])
    (root / "coco_entities_release.json").write_text(json.dumps(document))
    return names


def test_coco_entities_json_is_read_directly_zero_based_and_each_detection_once(tmp_path):
    dog, cat = [3, [1.5, 2, 10, 12]], [5, [0, 0, 4, 4]]
    said = {"det_sequences": [], "noun_chunks": [["a dog", "dog"]], "split": "test"}
    document = {
        "42": {
            "a dog": {**said, "detections": {"dog": [dog]}},
            "a dog and a cat": {**said, "detections": {"dog": [dog], "cat": [cat]}},
        }
    }
    coco_tree(tmp_path, document)
    with pytest.warns(QpertWarning, match="1 of 2 images are not in"):
        dataset = read_dataset(tmp_path)
    boxes = dataset.boxes_of(0, (40, 30))
    assert boxes.xyxy.tolist() == [[1.5, 2, 10, 12], [0, 0, 4, 4]]
    assert boxes.labels == ("dog", "cat")
    assert len(dataset.boxes_of(1, (40, 30))) == 0


@pytest.mark.parametrize("number", ["1_0", "1", True, None])
def test_numbers_in_coco_entities_are_json_numbers(tmp_path, number):
    coco_tree(tmp_path, {"42": {"a": {"detections": {"dog": [[1, [number, 0, 20, 9]]]}}}, "7": {}})
    with pytest.raises(BoxError) as caught:
        read_dataset(tmp_path)
    assert caught.value.code == "box-number"


def test_macos_litter_beside_coco_entities_is_not_read(tmp_path):
    names = coco_tree(tmp_path, {"42": {}, "7": {}})
    (tmp_path / "coco_entities").mkdir()
    (tmp_path / "coco_entities" / "._release.json").write_bytes(b"\0\5\x16\7")
    assert read_dataset(tmp_path).names == tuple(names)


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        ({"a": {"detections": {"dog": [[1, [5, 5, 2, 9]]]}}}, "inverted"),
        ({"a": {"detections": {"dog": [[1, [5, 5, 9]]]}}}, "has 3 numbers"),
        ({"a": {"noun_chunks": []}}, "not as COCO Entities has it"),
        (["a"], "not as COCO Entities has it"),
    ],
)
def test_malformed_coco_entities_are_errors_that_name_the_image(tmp_path, captions, message):
    coco_tree(tmp_path, {"42": captions, "7": {}})
    with pytest.raises(BoxError, match=rf"000000000042\.jpg.*{message}"):
        read_dataset(tmp_path)
