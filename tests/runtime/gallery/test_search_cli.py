"""`qpert index` and `qpert search`: the JSON that others rely on, the page, and what users get wrong."""

import json
import re
import shutil

import pytest
from PIL import Image

from qpert.runtime.cli import run
from qpert.runtime.cli.search import lines
from qpert.runtime.retriever import Retriever

BOX = {"x1": 2, "y1": 3, "x2": 20, "y2": 25, "label": "a <b>cup</b>"}
CAPTIONS = ["a dog on a mat", "a cat", "a red boat at night", "two houses"]


@pytest.fixture(scope="module")
def images(tmp_path_factory, random_pictures):
    """Four pictures with annotation, a box file and a folder for them alone."""
    root = tmp_path_factory.mktemp("set")
    (root / "images").mkdir()
    names = [f"images/{number}.png" for number in range(4)]
    for name, pixels in zip(names, random_pictures(4), strict=True):
        Image.fromarray(pixels).save(root / name)
    annotation = [{"image": name, "caption": [caption]} for name, caption in zip(names, CAPTIONS, strict=True)]
    (root / "test.json").write_text(json.dumps(annotation))
    (root / "boxes.jsonl").write_text(json.dumps({"image": names[1], **BOX}))
    return root


@pytest.fixture(scope="module")
def indexed(tmp_path_factory, tiny_bundle, images):
    """A gallery with captions and boxes. Not to be written to."""
    out = tmp_path_factory.mktemp("indexed") / "gallery"
    assert run(["index", str(tiny_bundle), f"{images}/test.json", "--boxes", f"{images}/boxes.jsonl",
                "--out", str(out)]) == 0  # fmt: skip
    return out


def result(capsys, *arguments):
    """(exit code, stdout, stderr) of one command line."""
    capsys.readouterr()
    code = run([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def document(capsys, *arguments):
    code, out, err = result(capsys, *arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def test_index_reports_what_it_did_and_does_nothing_twice(capsys, tmp_path, tiny_bundle, images):
    arguments = ("index", tiny_bundle, images / "images", "--out", tmp_path / "g")
    first = document(capsys, *arguments)
    assert {key: first[key] for key in ("images", "added", "unchanged", "replaced", "deleted", "skipped", "texts")} == {
        "images": 4, "added": 4, "unchanged": 0, "replaced": 0, "deleted": 0, "skipped": [], "texts": 0,
    }  # fmt: skip
    assert first["bytes"] == sum(path.stat().st_size for path in (tmp_path / "g").rglob("*") if path.is_file())
    second = document(capsys, *arguments)
    assert (second["added"], second["unchanged"]) == (0, 4)


def test_index_counts_and_names_what_it_leaves_out_after_its_result(capsys, tmp_path, tiny_bundle, images):
    (tmp_path / "set").mkdir()
    shutil.copy(images / "images/0.png", tmp_path / "set" / "0.PNG")
    (tmp_path / "set" / "notes.md").write_text("x")
    code, out, err = result(capsys, "index", tiny_bundle, tmp_path / "set", "--out", tmp_path / "g", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["added"] == 1
    assert found["left_out"] == [{"name": "notes.md", "reason": "no picture that this Pillow can decode"}]
    assert err.strip().splitlines()[-1] == "left out 1, no picture that this Pillow can decode: notes.md"


def test_bad_boxes_stop_index_and_search_unless_they_are_to_be_skipped(capsys, tmp_path, tiny_bundle, images):
    rows = [{"image": "images/1.png", **BOX}, {"image": "images/1.png", **BOX, "x2": 2}]
    (tmp_path / "boxes.jsonl").write_text("\n".join(map(json.dumps, rows)))
    boxes = ("--boxes", tmp_path / "boxes.jsonl")
    index = ("index", tiny_bundle, images / "test.json", "--out", tmp_path / "g", *boxes)
    search = ("search", tmp_path / "g", "--image", images / "images/1.png", *boxes)
    code, _, err = result(capsys, *index)
    assert code == 2
    assert "boxes.jsonl:2: box (2, 3, 2, 25) is empty" in err
    assert not (tmp_path / "g").exists()
    code, _, err = result(capsys, *index, "--skip-bad-boxes")
    assert code == 0
    assert "1 of 2 boxes cannot be used and are left out (--skip-bad-boxes)" in err
    with Retriever.open(tiny_bundle) as retriever, retriever.open_gallery(tmp_path / "g") as gallery:
        assert gallery.boxes_of(1).xyxy.tolist() == [[2, 3, 20, 25]]
    assert result(capsys, *search)[0] == 2
    assert result(capsys, *search, "--skip-bad-boxes")[0] == 0


def test_detections_that_hold_no_box_are_said(capsys, tmp_path, tiny_bundle, images):
    (tmp_path / "none.json").write_text("[]")
    arguments = ("index", tiny_bundle, images / "images", "--out", tmp_path / "g", "--boxes", tmp_path / "none.json")
    code, _, err = result(capsys, *arguments)
    assert code == 0
    assert f"warning: {tmp_path / 'none.json'} holds no boxes" in err


def test_texts_of_a_file_end_at_line_feeds_alone(tmp_path):
    texts = ["a dog\u2028on a mat", "a cat\x0cat night", "two\x85houses", "a\x1cboat"]
    (tmp_path / "texts.txt").write_bytes("\r\n".join(["\ufeff" + texts[0], *texts[1:], " ", ""]).encode())
    assert lines(tmp_path / "texts.txt") == texts


def test_search_prints_the_contracts_json(capsys, indexed, tiny_bundle):
    found = document(capsys, "search", indexed, "a dog", "-k", 3, "--rerank", 2)
    assert found.keys() == {"query", "hits"}
    assert found["query"] == "a dog"
    assert [hit.keys() for hit in found["hits"]] == [{"image", "score", "itc", "itm", "rank_itc", "box"}] * 3
    assert [hit["itm"] is None for hit in found["hits"]] == [False, False, True]
    with Retriever.open(tiny_bundle) as retriever, retriever.open_gallery(indexed) as gallery:
        expected = retriever.search("a dog", gallery, k=3, rerank=2)
    assert [hit["image"] for hit in found["hits"]] == [hit.image for hit in expected]
    assert [hit["score"] for hit in found["hits"]] == pytest.approx([hit.score for hit in expected], abs=1e-5)


def test_several_texts_are_searched_at_once(capsys, indexed):
    found = document(capsys, "search", indexed, "a dog", "a boat", "-k", 2)
    assert [search["query"] for search in found["searches"]] == ["a dog", "a boat"]
    alone = document(capsys, "search", indexed, "a boat", "-k", 2)
    assert [hit["image"] for hit in found["searches"][1]["hits"]] == [hit["image"] for hit in alone["hits"]]


def test_exact_finds_the_same(capsys, indexed):
    one, other = (document(capsys, "search", indexed, "a dog", *more) for more in ((), ("--exact",)))
    assert [hit["image"] for hit in one["hits"]] == [hit["image"] for hit in other["hits"]]


def test_an_image_finds_the_captions_of_the_gallery(capsys, indexed, images, tiny_bundle):
    image = images / "images/1.png"
    found = document(capsys, "search", indexed, "--image", image, "-k", 4)
    assert found["query"] == str(image)
    assert {hit["text"]: hit["image"] for hit in found["hits"]} == {
        caption: f"images/{number}.png" for number, caption in enumerate(CAPTIONS)
    }
    with Retriever.open(tiny_bundle) as retriever:
        expected = retriever.search_texts(image, CAPTIONS, k=4)
    assert [hit["text"] for hit in found["hits"]] == [hit.text for hit in expected]


def test_an_image_finds_given_texts_and_its_boxes_count(capsys, indexed, images, tmp_path):
    (tmp_path / "texts.txt").write_text("a dog\n\na boat\n")
    image = images / "images/1.png"
    plain = document(capsys, "search", indexed, "--image", image, "--texts", tmp_path / "texts.txt")
    assert {hit["text"] for hit in plain["hits"]} == {"a dog", "a boat"}
    assert [hit["image"] for hit in plain["hits"]] == [None, None]
    boxed = document(
        capsys,
        "search",
        indexed,
        "--image",
        image,
        "--texts",
        tmp_path / "texts.txt",
        "--boxes",
        images / "boxes.jsonl",
    )
    assert [hit["itc"] for hit in plain["hits"]] != [hit["itc"] for hit in boxed["hits"]]


def test_the_page_is_self_contained_and_shows_pictures_boxes_and_ranks(capsys, indexed, tmp_path):
    found = document(capsys, "search", indexed, "<i>dog</i> & co", "-k", 4, "--html", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert page.count("data:image/jpeg;base64,") == 4
    assert page.count("<rect ") == 1
    assert "a &lt;b&gt;cup&lt;/b&gt;" in page
    assert "“&lt;i&gt;dog&lt;/i&gt; &amp; co”" in page
    for hit in found["hits"]:
        assert hit["image"] in page
        assert f"ITM {hit['itm']:.3f} + ITC {hit['itc']:.3f}, rank {hit['rank_itc']} by ITC" in page


def test_a_page_of_texts_shows_the_query_and_a_lost_picture_is_said_to_be_lost(capsys, tmp_path, tiny_bundle, images):
    own = shutil.copytree(images, tmp_path / "own")
    assert run(["index", str(tiny_bundle), f"{own}/test.json", "--out", f"{tmp_path}/g"]) == 0
    document(capsys, "search", tmp_path / "g", "--image", own / "images/0.png", "--html", tmp_path / "texts.html")
    page = (tmp_path / "texts.html").read_text(encoding="utf-8")
    assert page.count("data:image/jpeg;base64,") == 1
    assert all(caption in page for caption in CAPTIONS)
    (own / "images/2.png").unlink()
    document(capsys, "search", tmp_path / "g", "a dog", "--html", tmp_path / "images.html")
    assert "no longer at" in (tmp_path / "images.html").read_text(encoding="utf-8")


def test_delete_and_compact_need_no_images(capsys, tmp_path, tiny_bundle, images, indexed):
    gallery = shutil.copytree(indexed, tmp_path / "g")
    told = document(capsys, "index", tiny_bundle, "--out", gallery, "--delete", "images/0.png", "--compact")
    assert (told["deleted"], told["compacted"]) == (1, 1)
    found = document(capsys, "search", gallery, "a dog")
    assert {hit["image"] for hit in found["hits"]} == {f"images/{number}.png" for number in (1, 2, 3)}
    code, _, err = result(capsys, "index", tiny_bundle, "--out", gallery, "--delete", "images/0.png")
    assert (code, "has no image named 'images/0.png'" in err) == (2, True)


def test_repair_encodes_again_what_is_damaged(capsys, tmp_path, tiny_bundle, images, indexed):
    gallery = shutil.copytree(indexed, tmp_path / "g")
    (shard,) = (gallery / "features").iterdir()
    shard.write_bytes(shard.read_bytes()[:-1])
    code, _, err = result(capsys, "search", gallery, "a dog")
    assert (code, f"{shard} was altered" in err, "--repair" in err) == (2, True, True)
    told = document(
        capsys,
        "index",
        tiny_bundle,
        images / "test.json",
        "--boxes",
        images / "boxes.jsonl",
        "--out",
        gallery,
        "--repair",
    )
    assert (told["images"], told["added"]) == (4, 4)
    assert len(document(capsys, "search", gallery, "a dog")["hits"]) == 4


def test_recomputed_features_find_the_same_and_are_remembered(capsys, tmp_path, tiny_bundle, images, indexed):
    arguments = ("index", tiny_bundle, images / "test.json", "--boxes", images / "boxes.jsonl", "--out", tmp_path / "g")
    document(capsys, *arguments, "--features", "recomputed")
    assert not (tmp_path / "g/features").exists()
    assert document(capsys, *arguments)["unchanged"] == 4
    one, other = (document(capsys, "search", gallery, "a dog")["hits"] for gallery in (indexed, tmp_path / "g"))
    assert [hit["image"] for hit in one] == [hit["image"] for hit in other]
    assert [hit["score"] for hit in one] == pytest.approx([hit["score"] for hit in other], abs=1e-4)


def test_unreadable_images_stop_or_are_told(capsys, tmp_path, tiny_bundle, images):
    own = shutil.copytree(images / "images", tmp_path / "own")
    (own / "1.png").write_bytes(b"no image")
    code, _, err = result(capsys, "index", tiny_bundle, own, "--out", tmp_path / "g")
    assert (code, "1.png is not an image" in err) == (2, True)
    told = document(capsys, "index", tiny_bundle, own, "--out", tmp_path / "g", "--skip-unreadable")
    assert (told["images"], [entry["image"] for entry in told["skipped"]]) == (3, ["1.png"])
    code, out, _ = result(capsys, "index", tiny_bundle, own, "--out", tmp_path / "g", "--skip-unreadable")
    assert (code, "skipped 1.png: " in out) == (0, True)


def test_the_bundle_is_remembered_and_may_have_moved(capsys, tmp_path, tiny_bundle, half_bundle, images):
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    assert run(["index", str(bundle), f"{images}/images", "--out", f"{tmp_path}/g"]) == 0
    bundle.rename(tmp_path / "moved")
    code, _, err = result(capsys, "search", tmp_path / "g", "a dog")
    assert (code, f"no longer at {bundle.resolve()}; pass its new folder with --bundle" in err) == (2, True)
    assert len(document(capsys, "search", tmp_path / "g", "a dog", "--bundle", tmp_path / "moved")["hits"]) == 4
    code, _, err = result(capsys, "search", tmp_path / "g", "a dog", "--bundle", half_bundle)
    assert (code, "was made with the bundle" in err) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give either a text"),
        (("a dog", "--image", "x.png"), "give either a text"),
        (("a dog", "--boxes", "x"), "--boxes, --detector and --texts need --image"),
        (("a dog", "-k", "0"), "got k=0"),
        (("",), "text 0 is ''"),
        (("--image", "nothing.png"), "nothing.png does not exist"),
        (("--image", "nothing.png", "--texts", "nothing.txt"), "--texts nothing.txt cannot be read"),
        (("a dog", "--html", "nowhere/page.html"), "--html nowhere/page.html cannot be written"),
    ],
)
def test_what_search_cannot_use_is_said(capsys, indexed, arguments, message):
    code, out, err = result(capsys, "search", indexed, *arguments)
    assert (code, out) == (2, "")
    assert message in err


def test_a_gallery_without_captions_says_how_to_get_texts(capsys, tmp_path, tiny_bundle, images):
    assert run(["index", str(tiny_bundle), f"{images}/images", "--out", f"{tmp_path}/g"]) == 0
    code, _, err = result(capsys, "search", tmp_path / "g", "--image", images / "images/0.png")
    assert (code, "has no texts to search for an image" in err, "--texts FILE" in err) == (2, True, True)


def test_boxes_that_are_of_no_query_image_are_refused(capsys, indexed, images, tmp_path):
    (tmp_path / "boxes.jsonl").write_text(json.dumps({"image": "zebra.png", **BOX}))
    code, _, err = result(
        capsys, "search", indexed, "--image", images / "images/0.png", "--boxes", tmp_path / "boxes.jsonl"
    )
    assert (code, "has no boxes for" in err) == (2, True)


def test_what_is_no_gallery_is_said(capsys, tmp_path):
    code, _, err = result(capsys, "search", tmp_path, "a dog")
    assert (code, "is not a gallery; expected a folder made by `qpert index`" in err) == (2, True)


def test_index_without_images_is_refused(capsys, tmp_path, tiny_bundle):
    code, _, err = result(capsys, "index", tiny_bundle, "--out", tmp_path / "g")
    assert (code, "IMAGES is missing" in err) == (2, True)
    assert not (tmp_path / "g").exists()
