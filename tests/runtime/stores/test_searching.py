"""Images in an engine are found, re-ranked and shown as those of a gallery are."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from qpert.runtime.cli import run
from qpert.runtime.errors import GalleryError, ImageError, InputError
from qpert.runtime.gallery.entries import ImageEntry
from qpert.runtime.gallery.indexing import index_images
from qpert.runtime.gallery.reader import StoredGallery
from qpert.runtime.inputs.boxes import Boxes
from qpert.runtime.retriever import Retriever
from qpert.runtime.stores.indexing import copy_gallery, index_store
from qpert.runtime.stores.recall import measure_recall, sample_queries
from qpert.runtime.stores.searching import StoreGallery

ENGINES = ("gallery", "postgresql", "qdrant-edge", "qdrant-local")
EXACT = ("gallery", "postgresql")
"""Keep vectors as float32."""
COUNT = 14
HALF = 2.0**-11
"""What float16 rounds a number by, as a share; products of unit vectors are off by no more."""
SUMS = 1e-5
"""float32 products of other shapes."""


@pytest.fixture(scope="module")
def entries(tmp_path_factory, random_pictures):
    folder = tmp_path_factory.mktemp("pictures")
    found = []
    for number, pixels in enumerate(random_pictures(COUNT)):
        path = folder / f"{number}.png"
        Image.fromarray(pixels).save(path)
        size = (pixels.shape[1], pixels.shape[0])
        corners = [[4 * i, 3 * i, 15 + 4 * i, 20 + 2 * i] for i in range(number % 4)]
        labels = tuple(f"thing {i}" for i in range(len(corners)))
        boxes = Boxes(corners, size, labels=labels) if corners else None
        found.append(ImageEntry(path.name, path, boxes, metadata={"album": "ab"[number % 2], "n": number}))
    return found


@pytest.fixture(scope="module")
def retriever(demo_bundle):
    """A query set for each box: images have one to four."""
    with Retriever.open(demo_bundle, threads=1) as plain:
        usual = plain.encoder.perturbation
    settings = dataclasses.replace(usual, alpha=4.0, reduction="each", keep_stock=True)
    with Retriever.open(demo_bundle, perturbation=settings, threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def gallery(tmp_path_factory, retriever, entries):
    """The same images in a gallery, with features. Not to be written to."""
    folder = tmp_path_factory.mktemp("made") / "gallery"
    index_images(folder, retriever.encoder, entries)
    return folder


@pytest.fixture(params=ENGINES)
def engine(request):
    return request.param


@pytest.fixture
def store(engine, open_engine, tmp_path, request):
    with open_engine(engine, tmp_path, "s" + f"{abs(hash(request.node.nodeid)) % 10**9}") as opened:
        yield opened


def assert_same_hits(found, wanted, engine):
    tolerance = SUMS if engine in EXACT else HALF + SUMS
    assert [hit.image for hit in found] == [hit.image for hit in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert one.itc == pytest.approx(other.itc, abs=tolerance)
        assert one.box == other.box
        if other.itm is None:
            assert one.itm is None
        else:
            assert one.itm == pytest.approx(other.itm, abs=1e-4)  # the pair graph in batches of other sizes


@pytest.mark.parametrize("copied", [False, True])
def test_hits_are_those_of_a_gallery(store, engine, copied, retriever, entries, gallery):
    with StoredGallery.open(gallery, retriever.encoder) as own:
        if copied:
            assert copy_gallery(store, own).added == COUNT
        else:
            assert index_store(store, retriever.encoder, entries).added == COUNT
        opened = StoreGallery.open(store, retriever.encoder)
        assert (opened.features is not None) == copied
        for text in ("a red star", "two small circles"):
            for where in (None, "album = 'a' and n > 3"):
                found = retriever.search(text, opened, k=5, rerank=6, where=where)
                wanted = retriever.search(text, own, k=5, rerank=6, where=where)
                assert_same_hits(found, wanted, engine)
        assert any(hit.box for hit in retriever.search("a red star", opened, k=COUNT, rerank=0))
        assert retriever.search("a red star", opened, where="n > 100") == []
        assert len(retriever.search("a red star", opened, k=50, rerank=0)) == COUNT


def test_what_is_there_is_not_encoded_again(monkeypatch, store, retriever, entries):
    assert index_store(store, retriever.encoder, entries[:5]).images == 5
    again = index_store(store, retriever.encoder, entries[:7])
    assert (again.added, again.unchanged, again.images) == (2, 5, 7)
    monkeypatch.setattr(retriever.encoder, "encode_images", None)
    assert index_store(store, retriever.encoder, entries[:7]).unchanged == 7
    changed = [dataclasses.replace(entries[0], metadata={"album": "c"}), *entries[1:7]]
    with pytest.raises(GalleryError) as found:
        index_store(store, retriever.encoder, changed)
    assert found.value.code == "image-changed"
    assert "metadata" in str(found.value)
    assert index_store(store, retriever.encoder, changed, replace=True).relabelled == 1
    opened = StoreGallery.open(store, retriever.encoder)
    assert len(retriever.search("a red star", opened, rerank=0, where="album = 'c'")) == 1


def test_changed_files_and_boxes_need_replace(store, retriever, entries, tmp_path):
    path = tmp_path / "one.png"
    shutil.copy(entries[1].path, path)
    entry = ImageEntry("one", path, entries[1].boxes)
    index_store(store, retriever.encoder, [entry])
    for change in ("boxes", "file"):
        if change == "file":
            shutil.copy(entries[5].path, path)
            entry = dataclasses.replace(entry, boxes=entries[5].boxes)
        else:
            entry = dataclasses.replace(entry, boxes=None)
        with pytest.raises(GalleryError) as found:
            index_store(store, retriever.encoder, [entry])
        assert found.value.code == "image-changed"
        assert index_store(store, retriever.encoder, [entry], replace=True).replaced == 1
    path.unlink()
    with pytest.raises(ImageError):
        retriever.search("a red star", StoreGallery.open(store, retriever.encoder), rerank=1)


def test_a_store_of_another_bundle_or_other_settings_is_refused(store, retriever, entries, demo_bundle, tiny_bundle):
    index_store(store, retriever.encoder, entries[:1])
    for bundle, code in ((tiny_bundle, "gallery-other-bundle"), (demo_bundle, "gallery-other-perturbation")):
        with Retriever.open(bundle, threads=1) as other:
            for call in (lambda: index_store(store, other.encoder, entries[:1]),
                         lambda: StoreGallery.open(store, other.encoder)):  # fmt: skip
                with pytest.raises(GalleryError) as found:
                    call()
                assert found.value.code == code
    assert store.count() == 1


def test_recall_is_measured_against_exact_scores(store, retriever, entries, gallery, monkeypatch):
    with StoredGallery.open(gallery, retriever.encoder) as own:
        copy_gallery(store, own)
        queries = sample_queries(store, 6, own)
        found = measure_recall(store, queries, own)
        assert (found.queries, found.r64, found.against) == (6, None, "gallery")
        assert found.r10 >= 1 - 1 / 10 / 6 * 2, "two swaps of nearly equal images, by float16"
        stored = measure_recall(store, sample_queries(store, 3))
        assert (stored.queries, stored.against) == (3, "stored")
        assert stored.r10 >= 1 - 1 / 10 / 3
        search = store.search
        monkeypatch.setattr(store, "search", lambda query, count: search(query, count)[2:])
        assert measure_recall(store, queries, own).r10 == pytest.approx(0.8, abs=0.04)


def test_features_that_are_of_other_files_are_refused(store, retriever, entries, tmp_path):
    index_store(store, retriever.encoder, entries[:3])
    index_images(tmp_path / "g", retriever.encoder, entries[:2])
    opened = StoreGallery.open(store, retriever.encoder, tmp_path / "g")
    with pytest.raises(GalleryError) as found:
        retriever.search("a red star", opened, rerank=3)
    assert found.value.code == "store-features"
    assert "2.png" in str(found.value)


def test_a_copy_follows_its_gallery(store, retriever, entries, tmp_path):
    index_images(tmp_path / "g", retriever.encoder, entries[:4])
    with StoredGallery.open(tmp_path / "g", retriever.encoder) as own:
        copy_gallery(store, own)
    index_store(store, retriever.encoder, entries[4:5])
    index_images(tmp_path / "g", retriever.encoder, [dataclasses.replace(entries[0], metadata={})], replace=True)
    with StoredGallery.open(tmp_path / "g", retriever.encoder) as own:
        found = copy_gallery(store, own)
    assert (found.images, found.added, found.replaced, found.unchanged) == (4, 0, 1, 3)
    assert {one.name for one in store.scan()} == {"0.png", "1.png", "2.png", "3.png"}


@pytest.mark.parametrize("kind", ["postgresql", "qdrant-edge"])
def test_the_commands_take_stores(capfd, request, kind, demo_bundle, entries, tmp_path):
    lines = [json.dumps({"image": str(one.path), **one.metadata}) for one in entries]
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    server = request.getfixturevalue("postgres") if kind == "postgresql" else None
    address = f"{server.url}?gallery=command" if server else f"qdrant-edge:{tmp_path / 'edge'}"
    shown = []

    def command(*arguments, code=0):
        capfd.readouterr()
        assert run([str(one) for one in arguments]) == code
        out, err = capfd.readouterr()
        shown.extend((out, err))
        return out if code == 0 else err

    index = ("index", demo_bundle, tmp_path / "list.jsonl", "--store", address)
    first = json.loads(command(*index, "--json"))
    assert (first["added"], first["images"], first["bytes"]) == (COUNT, COUNT, None)
    assert first["recall"]["queries"] == COUNT
    assert first["recall"]["r10"] == pytest.approx(1, abs=0.02)
    assert f"{COUNT} unchanged" in command(*index)
    both = json.loads(command(*index, "--out", tmp_path / "g", "--json"))
    assert both["copied"] == {"added": 0, "replaced": 0, "unchanged": COUNT}
    assert both["recall"]["against"] == "gallery"
    search = ("search", address, "a red star", "-k", "3", "--where", "album = 'b'", "--json")
    found = json.loads(command(*search, "--html", tmp_path / "page.html"))["hits"]
    wanted = json.loads(command("search", tmp_path / "g", *search[2:]))["hits"]
    assert [hit["image"] for hit in found] == [hit["image"] for hit in wanted]
    assert (tmp_path / "page.html").read_text().count("data:image/") >= 3
    command("index", demo_bundle, "--store", address, "--delete", entries[0].path)
    assert "no image named" in command("index", demo_bundle, "--store", address, "--delete", "x", code=2)
    assert "column 9" in command(*search[:6], "album = b", code=2)
    assert "has no texts" in command("search", address, "--image", entries[0].path, code=2)
    assert "give --out" in command(*index, "--compact", code=2)
    if server:
        server_down = address.replace(str(server.port), "1")
        assert "cannot be used" in command("search", server_down, "x", code=3)
        wrong = command("search", address.replace("s3cret", "wr0ng"), "x", code=3)
        assert "password" in wrong
        assert not any(secret in text for text in shown for secret in ("s3cret", "p@ss", "wr0ng", "p%40ss"))


def test_nothing_answers_for_qdrant(capfd, demo_bundle, entries):
    assert run(["search", "qdrant://127.0.0.1:1/photos", "x"]) == 3
    assert "does not answer" in capfd.readouterr().err


def test_queries_are_no_names(retriever, store, entries):
    index_store(store, retriever.encoder, entries[:2])
    with pytest.raises(InputError):
        retriever.search("a red star", StoreGallery.open(store, retriever.encoder), where="album is 'x'")
    assert np.isfinite([hit.score for hit in retriever.search("a", StoreGallery.open(store, retriever.encoder))]).all()
