"""What `qpert index` makes of a folder, a list, an annotation, and boxes beside them."""

import json

import numpy as np
import pytest
from PIL import Image
from shared_data import shared_folder

from qpert.runtime.errors import BoxError, InputError, QpertWarning
from qpert.runtime.gallery.entries import image_size, list_images, read_entries, with_boxes
from qpert.runtime.inputs.images import load_image


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "images"
    for name, size in (("b.png", (40, 30)), ("a.jpg", (20, 10)), ("sub/c.JPEG", (8, 9)), (".hidden/d.png", (5, 5))):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size).save(root / name)
    (root / "notes.md").write_text("no image")
    return root


def test_a_folder_is_its_images_in_order_of_their_names(folder):
    entries = list_images(folder).entries
    assert [entry.name for entry in entries] == ["a.jpg", "b.png", "sub/c.JPEG"]
    assert [entry.path for entry in entries] == [folder / entry.name for entry in entries]


def test_what_is_no_image_is_counted_and_named(folder):
    for name in (".DS_Store", "._a.jpg", "Thumbs.db", "sub/desktop.ini"):
        (folder / name).write_bytes(b"x")
    (folder / "gone.jpg").symlink_to(folder / "nowhere.jpg")
    (folder / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0heicmif1")
    listing = list_images(folder)
    assert listing.left_out == (
        (".hidden", "hidden"),
        ("gone.jpg", "links to nothing"),
        ("notes.md", "no picture that this Pillow can decode"),
        ("photo.heic", "no picture that this Pillow can decode"),
    )
    assert listing.left_out_lines()[-1] == "left out 2, no picture that this Pillow can decode: notes.md, photo.heic"
    with pytest.warns(QpertWarning, match=r"images: left out 2, no picture .*: notes\.md, photo\.heic"):
        assert len(read_entries(folder)) == 3


def test_of_many_files_left_out_the_first_are_named(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    for number in range(7):
        (tmp_path / f"{number}.txt").write_text("x")
    (line,) = list_images(tmp_path).left_out_lines()
    assert line.startswith("left out 7, ")
    assert line.endswith(": 0.txt, 1.txt, 2.txt, 3.txt, 4.txt and 2 more")


EVERY_SUFFIX = {
    "JPEG": ("jfif", "jpe", "JPG", "jpeg"),
    "AVIF": ("avif",),
    "MPO": ("mpo",),
    "JPEG2000": ("jp2", "j2k"),
    "PPM": ("ppm", "pgm", "pnm"),
    "TGA": ("tga",),
    "PCX": ("pcx",),
    "ICO": ("ico",),
    "DIB": ("dib",),
    "QOI": ("qoi",),
    "PNG": ("apng",),
    "TIFF": ("TIF",),
}


def test_what_pillow_can_decode_is_indexed_whatever_its_extension(tmp_path):
    Image.init()
    picture = Image.fromarray(np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3))
    names = [f"a.{suffix}" for kind, suffixes in EVERY_SUFFIX.items() if kind in Image.SAVE for suffix in suffixes]
    kinds = {suffix: kind for kind, suffixes in EVERY_SUFFIX.items() for suffix in suffixes}
    for name in names:
        picture.save(tmp_path / name, kinds[name.split(".")[1]])
    picture.save(tmp_path / "without", "JPEG")
    picture.save(tmp_path / "photo.jpg_large", "WEBP")
    listing = list_images(tmp_path)
    assert {entry.name for entry in listing.entries} == {*names, "without", "photo.jpg_large"}
    assert len(names) >= 15
    assert listing.left_out == ()
    assert {load_image(entry.path).size for entry in listing.entries} == {(16, 16)}


@pytest.mark.parametrize("suffix", ["h5", "grib", "mpg", "eps", "pdf", "dng"])
def test_what_pillow_only_names_is_left_out_so_that_it_does_not_stop_the_run(tmp_path, suffix):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    Image.new("RGB", (4, 4)).save(tmp_path / f"b.{suffix}", "TIFF")  # cameras' raw files begin as TIFF does
    assert [name for name, _ in list_images(tmp_path).left_out] == [f"b.{suffix}"]


def test_linked_folders_are_read_once_and_loops_end(folder, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    Image.new("RGB", (4, 4)).save(outside / "d.png")
    (outside / "back").symlink_to(folder)
    (folder / "aa").symlink_to(outside)
    (folder / "again").symlink_to(folder / "sub")
    (folder / "sub" / "loop").symlink_to(folder)
    (folder / "self").symlink_to(folder / "self")
    (folder / "e.png").symlink_to(outside / "d.png")
    listing = list_images(folder)
    assert [entry.name for entry in listing.entries] == ["a.jpg", "aa/d.png", "b.png", "e.png", "sub/c.JPEG"]
    seen = "a folder that is read under another name"
    assert [name for name, why in listing.left_out if why == seen] == ["aa/back", "again", "sub/loop"]
    assert ("self", "links to nothing") in listing.left_out


def test_a_list_is_read_in_its_own_order_with_names_as_written(folder):
    (folder / "list.txt").write_text("\ufeff# two of them\nsub/c.JPEG\n\n  b.png \n", encoding="utf-8")
    listing = list_images(folder / "list.txt")
    assert [(entry.name, entry.path) for entry in listing.entries] == [
        ("sub/c.JPEG", folder / "sub/c.JPEG"),
        ("b.png", folder / "b.png"),
    ]
    assert listing.left_out == (("line 1 '# two of them'", "a comment (#)"),)


ODD_NAMES = [
    "#1 photo.png",
    "# 2.png",
    "a\x0cb.png",
    "a\x85b.png",
    "a\u2028b.png",
    "a\x1cb.png",
    "\u00a0c.png",
    " d.png",
]


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_lines_of_a_list_end_at_line_feeds_alone_and_a_name_may_begin_with_a_hash(tmp_path, ending):
    for name in ODD_NAMES:
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "list.txt").write_bytes(ending.join(["\ufeff" + ODD_NAMES[0], *ODD_NAMES[1:], ""]).encode())
    listing = list_images(tmp_path / "list.txt")
    assert [entry.name for entry in listing.entries] == ODD_NAMES
    assert all(entry.path.is_file() for entry in listing.entries)
    assert listing.left_out == ()


@pytest.mark.parametrize("source", ["list.txt", "test.json"])
def test_an_image_is_found_under_the_other_unicode_form_of_its_name(tmp_path, source):
    composed, decomposed = "caf\u00e9.png", "cafe\u0301.png"
    Image.new("RGB", (4, 4)).save(tmp_path / decomposed)
    content = composed if source == "list.txt" else json.dumps([{"image": composed, "caption": "a"}])
    (tmp_path / source).write_text(content, encoding="utf-8")
    (entry,) = read_entries(tmp_path / source)
    assert (entry.name, entry.path) == (composed, tmp_path / decomposed)


def test_the_lists_of_public_reports_name_both_of_their_images():
    listing = list_images(shared_folder("cases/list") / "list.txt")
    assert [entry.name for entry in listing.entries] == ["#1 photo.jpg", "b c.jpg"]
    assert all(entry.path.is_file() for entry in listing.entries)


def test_an_annotation_of_one_entry_a_caption_is_read_as_lavis_writes_its_training_split(tmp_path):
    entries = [
        {"image": "im/1.jpg", "caption": "a cup", "image_id": "coco_1"},
        {"image": "im/2.jpg", "caption": "a dog", "image_id": "coco_2"},
        {"image": "im/1.jpg", "caption": "a mug", "image_id": "coco_1"},
    ]
    (tmp_path / "im").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "im" / "1.jpg")
    (tmp_path / "train.json").write_text(json.dumps(entries))
    assert [(entry.name, entry.captions) for entry in read_entries(tmp_path / "train.json")] == [
        ("im/1.jpg", ("a cup", "a mug")),
        ("im/2.jpg", ("a dog",)),
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
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(
        InputError, match=r"has no image below it that Pillow can decode; left out 1, .*: notes\.md"
    ) as caught:
        read_entries(tmp_path)
    assert caught.value.code == "no-images"


def test_boxes_are_those_of_the_file_and_others_get_none(folder):
    lines = [{"image": "b.png", "x1": 1, "y1": 2, "x2": 11, "y2": 12, "label": "cup"}]
    (folder / "boxes.jsonl").write_text("\n".join(map(json.dumps, lines)))
    by_name = {entry.name: entry.boxes for entry in with_boxes(list_images(folder).entries, folder / "boxes.jsonl")}
    assert by_name["b.png"].xyxy.tolist() == [[1, 2, 11, 12]]
    assert by_name["b.png"].size == (40, 30)
    assert by_name["b.png"].labels == ("cup",)
    assert len(by_name["a.jpg"]) == 0
    (folder / "boxes.jsonl").write_text(json.dumps({**lines[0], "image": "zebra.png"}))
    with pytest.raises(BoxError, match=r"boxes for the image 'zebra.png', which is not among the 3 images"):
        with_boxes(list_images(folder).entries, folder / "boxes.jsonl")


def test_an_image_that_cannot_be_opened_stays_without_boxes_for_indexing_to_tell(folder):
    (folder / "b.png").write_bytes(b"no image")
    (folder / "boxes.csv").write_text("image,x1,y1,x2,y2\nb.png,1,2,3,4\n")
    by_name = {entry.name: entry.boxes for entry in with_boxes(list_images(folder).entries, folder / "boxes.csv")}
    assert by_name["b.png"] is None


@pytest.mark.parametrize("orientation", range(1, 9))
def test_sizes_are_those_of_the_picture_as_it_is_seen(tmp_path, orientation):
    image = Image.fromarray(np.zeros((30, 50, 3), np.uint8))
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.jpg", exif=exif)
    assert image_size(tmp_path / "a.jpg") == load_image(tmp_path / "a.jpg").size
