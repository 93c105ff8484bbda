"""Metadata of images in the gallery, from the list to the filtered search."""

import dataclasses
import json
import pickle
import sqlite3

import numpy as np
import pytest
from PIL import Image

from qpert.runtime.cli import run
from qpert.runtime.errors import GalleryError, InputError
from qpert.runtime.filters.tree import holds
from qpert.runtime.gallery.entries import ImageEntry, list_images
from qpert.runtime.gallery.indexing import index_images
from qpert.runtime.gallery.reader import StoredGallery
from qpert.runtime.gallery.scan import nearest
from qpert.runtime.gallery.writer import open_writer
from qpert.runtime.retriever import Gallery, Retriever

COUNT = 9
ROWS = [{"album": "even" if n % 2 == 0 else "odd", "year": 2015 + n, "ok": n > 4} for n in range(COUNT)]
ROWS[8] = {}


@pytest.fixture(scope="module")
def listed(tmp_path_factory, random_pictures):
    """A folder with pictures, and `list.jsonl`, which describes them."""
    folder = tmp_path_factory.mktemp("listed")
    lines = []
    for number, pixels in enumerate(random_pictures(COUNT)):
        Image.fromarray(pixels).save(folder / f"{number}.png")
        captions = {"captions": [f"a dog number {number}"]} if number < 3 else {}
        lines.append(json.dumps({"image": f"{number}.png", **ROWS[number], **captions, "nothing": None}))
    (folder / "list.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def retriever(tiny_bundle):
    with Retriever.open(tiny_bundle, threads=1) as opened:
        yield opened


@pytest.fixture
def gallery(tmp_path, retriever, listed):
    index_images(tmp_path / "gallery", retriever.encoder, list_images(listed / "list.jsonl").entries)
    return tmp_path / "gallery"


def test_a_list_carries_captions_and_metadata(listed):
    entries = list_images(listed / "list.jsonl").entries
    assert [dict(entry.metadata) for entry in entries] == ROWS
    assert entries[1].captions == ("a dog number 1",)
    assert entries[1].path == listed / "1.png"


@pytest.mark.parametrize(
    ("line", "code"),
    [("{", "image-list-line"), ("[]", "image-list-line"), ('{"album": "x"}', "image-list-line"),
     ('{"image": 3}', "image-list-line"), ('{"image": "a.png", "captions": "x"}', "image-list-line"),
     ('{"image": "a.png", "x": NaN}', "image-list-line"), ('{"image": "a.png", "x": []}', "metadata"),
     ('{"image": "a.png", "in": 1}', "metadata")],
)  # fmt: skip
def test_a_line_that_is_wrong_is_named(tmp_path, line, code):
    (tmp_path / "list.jsonl").write_text('{"image": "a.png"}\n\n' + line)
    with pytest.raises(InputError) as found:
        list_images(tmp_path / "list.jsonl")
    assert found.value.code == code
    assert "list.jsonl, line 3" in str(found.value)


def test_a_filtered_search_is_the_search_of_a_gallery_of_those_images(retriever, gallery, listed):
    kept = [n for n in range(COUNT) if ROWS[n].get("album") == "even" and ROWS[n]["year"] >= 2017]
    paths = [listed / f"{n}.png" for n in kept]
    alone = Gallery(tuple(path.name for path in paths), retriever.encode_images(paths))
    where = 'album = "even" and year >= 2017'
    with retriever.open_gallery(gallery) as opened:
        for rerank in (0, 2):
            wanted = retriever.search("a dog", alone, k=20, rerank=rerank)
            found = retriever.search("a dog", opened, k=20, rerank=rerank, where=where)
            assert [hit.image for hit in found] == [hit.image for hit in wanted]
            np.testing.assert_allclose([h.score for h in found], [h.score for h in wanted], atol=1e-5)  # float32 sums
        assert retriever.search("a dog", opened, where="year > 3000") == []
        assert retriever.search_batch(["a dog", "a cat"], opened, where="year > 3000") == [[], []]
        assert len(retriever.search("a dog", opened, k=20, where="album != 'even'")) == 5


def test_features_in_memory_are_filtered_too(retriever, listed):
    paths = [listed / f"{n}.png" for n in range(COUNT)]
    memory = Gallery(tuple(path.name for path in paths), retriever.encode_images(paths), metadata=tuple(ROWS))
    found = retriever.search("a dog", memory, k=20, rerank=0, where="ok = true")
    assert {hit.image for hit in found} == {"5.png", "6.png", "7.png"}
    with pytest.raises(InputError, match="metadata of 1 images for 9 names"):
        dataclasses.replace(memory, metadata=({},))


def test_metadata_survive_deletion_compaction_and_copies(retriever, gallery):
    with open_writer(gallery) as writer:
        writer.delete(["0.png", "3.png"])
    with retriever.open_gallery(gallery) as before:
        names = {before.images[row] for row in before.rows_where("album = 'even'")}
        assert names == {"2.png", "4.png", "6.png"}
        copy = pickle.loads(pickle.dumps(before))
        assert copy.metadata == before.metadata
        with open_writer(gallery) as writer:
            assert writer.compact() == 2
        with pytest.raises(GalleryError) as found:
            before.rows_where("album = 'even'")
        assert found.value.code == "gallery-compacted"
    with retriever.open_gallery(gallery) as after:
        assert {after.images[row] for row in after.rows_where("album = 'even'")} == names
        assert dict(zip(after.images, map(dict, after.metadata), strict=True)) == {
            f"{n}.png": ROWS[n] for n in range(COUNT) if n not in (0, 3)
        }


def test_changed_metadata_are_taken_over_without_encoding(monkeypatch, retriever, gallery, listed):
    entries = list(list_images(listed / "list.jsonl").entries)
    entries[2] = dataclasses.replace(entries[2], metadata={"album": "new"})
    with pytest.raises(GalleryError) as found:
        index_images(gallery, retriever.encoder, entries)
    assert found.value.code == "image-changed"
    assert "metadata" in str(found.value)
    monkeypatch.setattr(retriever.encoder, "encode_images", None)
    summary = index_images(gallery, retriever.encoder, entries, replace=True)
    assert (summary.relabelled, summary.unchanged, summary.replaced, summary.images) == (1, COUNT - 1, 0, COUNT)
    with retriever.open_gallery(gallery) as opened:
        assert [opened.images[row] for row in opened.rows_where("album = 'new'")] == ["2.png"]


def test_a_gallery_of_the_second_schema_is_read_and_written_on(retriever, gallery, listed):
    with sqlite3.connect(gallery / "gallery.sqlite") as connection:
        connection.execute("DROP TABLE field")
        connection.execute("UPDATE meta SET schema_version = 2")
    connection.close()
    with retriever.open_gallery(gallery) as opened:
        assert len(opened.rows_where("album = null")) == COUNT
        assert len(opened.rows_where("album = 'even'")) == 0
    plain = [ImageEntry(f"{n}.png", listed / f"{n}.png") for n in range(3, COUNT)]
    assert index_images(gallery, retriever.encoder, plain).unchanged == COUNT - 3
    index_images(gallery, retriever.encoder, list_images(listed / "list.jsonl").entries, replace=True)
    with retriever.open_gallery(gallery) as opened:
        assert len(opened.rows_where("album = 'even'")) == 4


def test_captions_of_filtered_images(retriever, gallery):
    with retriever.open_gallery(gallery) as opened:
        assert opened.captions("album = 'odd'").texts == ("a dog number 1",)
        assert opened.captions("year > 3000").texts == ()
        assert len(opened.captions().texts) == 3


def test_the_command_filters(capsys, tiny_bundle, listed, tmp_path):
    assert run(["index", str(tiny_bundle), str(listed / "list.jsonl"), "--out", str(tmp_path / "g")]) == 0
    capsys.readouterr()
    arguments = ["search", str(tmp_path / "g"), "a dog", "--rerank", "0", "--json", "--where"]
    assert run([*arguments, "album in ('odd') and not ok = true"]) == 0
    hits = json.loads(capsys.readouterr().out)["hits"]
    assert {hit["image"] for hit in hits} == {"1.png", "3.png"}
    assert run([*arguments, "album = odd"]) == 2
    assert "the filter at column 9: got 'odd', expected" in capsys.readouterr().err


@pytest.mark.parametrize("share", [0.001, 0.1, 0.6])
def test_the_scan_of_some_images_is_exact(share):
    random = np.random.default_rng(1)
    vectors = random.standard_normal((6000, 2, 16)).astype(np.float32)
    texts = random.standard_normal((3, 16)).astype(np.float32)
    alive = random.random(6000) < share
    from qpert.runtime.gallery.scan import encode_codes

    found = nearest(vectors, texts, 20, codes=encode_codes(vectors), alive=alive)
    scores = np.where(alive[:, None], (vectors @ texts.T).max(axis=1), -np.inf)
    for row, text in enumerate(scores.T):
        count = min(20, int(alive.sum()))
        assert found.rows[row].tolist() == np.argsort(-text, kind="stable")[:count].tolist()


def test_an_open_gallery_sees_metadata_as_they_are_now(retriever, gallery):
    with retriever.open_gallery(gallery) as opened:
        with open_writer(gallery) as writer:
            writer.set_metadata({"8.png": {"album": "even"}})
        assert len(opened.rows_where("album = 'even'")) == 5
    with StoredGallery.open(gallery, retriever.encoder) as again:
        assert all(holds_of(again, row) for row in again.rows_where("album = 'even'"))


def holds_of(gallery, row):
    from qpert.runtime.filters.parsing import parse

    return holds(parse("album = 'even'"), gallery.metadata[row])
