"""Arguments of the Python API: any iterable works as a list does, and what is of a wrong kind is refused by name."""

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from qpert.runtime import Boxes, Gallery, Perturbation, Retriever, StoredGallery, TextGallery
from qpert.runtime.errors import InputError, QpertError
from qpert.runtime.gallery.entries import ImageEntry
from qpert.runtime.gallery.indexing import index_images

TEXTS = ["a dog", "two cats on a sofa", "a cup"]
SHOWN_TO_A_USER = re.compile(r"expected|give one entry|give each image one name")


@pytest.fixture(scope="module")
def retriever(tiny_bundle):
    with Retriever.open(tiny_bundle) as opened:
        yield opened


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(4)
    return [rng.integers(0, 256, (30, 40, 3), dtype=np.uint8) for _ in range(3)]


@pytest.fixture(scope="module")
def features(retriever, pictures):
    return retriever.encode_images(pictures)


@pytest.fixture(scope="module")
def stored(retriever, pictures, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stored")
    for number, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{number}.png")
    entries = [ImageEntry(str(number), folder / f"{number}.png") for number in range(3)]
    index_images(folder / "gallery", retriever.encoder, entries)
    with retriever.open_gallery(folder / "gallery") as opened:
        yield opened


ITERABLES = {
    "tuple": tuple,
    "generator": lambda values: (value for value in values),
    "iterator": iter,
    "dict values": lambda values: dict(enumerate(values)).values(),
}


@pytest.mark.parametrize("kind", ITERABLES.values(), ids=ITERABLES.keys())
def test_any_iterable_of_images_and_boxes_is_taken_as_a_list_is(retriever, pictures, kind):
    boxes = [None, Boxes([[1, 2, 20, 25]], (40, 30)), None]
    expected = retriever.encode_images(pictures, boxes).query_embeds
    assert (retriever.encode_images(kind(pictures), kind(boxes)).query_embeds == expected).all()


def test_one_array_of_several_images_is_those_images(retriever, pictures, features):
    assert (retriever.encode_images(np.stack(pictures)).query_embeds == features.query_embeds).all()


@pytest.mark.parametrize("kind", [*ITERABLES.values(), np.array], ids=[*ITERABLES.keys(), "NumPy array"])
def test_any_iterable_of_texts_is_taken_as_a_list_is(retriever, features, kind):
    gallery = Gallery(("a", "b", "c"), features)
    assert (retriever.encode_texts(kind(TEXTS)) == retriever.encode_texts(TEXTS)).all()
    assert (retriever.itm_scores(features, kind(TEXTS)) == retriever.itm_scores(features, TEXTS)).all()
    assert retriever.search_batch(kind(TEXTS), gallery) == retriever.search_batch(TEXTS, gallery)
    assert retriever.text_gallery(kind(TEXTS)).texts == tuple(TEXTS)
    picture = np.zeros((30, 40, 3), np.uint8)
    assert retriever.search_texts(picture, kind(TEXTS)) == retriever.search_texts(picture, TEXTS)


def test_texts_that_come_back_are_plain_strings(retriever):
    assert {type(text) for text in retriever.text_gallery(np.array(TEXTS)).texts} == {str}


@pytest.mark.parametrize("kind", [list, tuple, np.array, iter, lambda rows: (iter(row) for row in rows)])
def test_corners_scores_and_labels_of_boxes_are_any_iterables(kind):
    corners = [[1, 2, 20, 25], [3.5, 4, 9, 9]]
    boxes = Boxes(kind(corners), (40, 30), scores=iter([0.5, 1]), labels=iter(["a", "b"]))
    assert boxes.xyxy.tolist() == corners
    assert (boxes.scores.tolist(), boxes.labels) == ([0.5, 1], ("a", "b"))


@pytest.mark.parametrize("kind", [list, iter, np.array])
def test_names_of_a_gallery_are_any_iterable(features, kind):
    assert Gallery(kind(["a", "b", "c"]), features).images == ("a", "b", "c")
    assert Gallery([Path("a"), Path("b"), Path("c")], features).images == ("a", "b", "c")


@pytest.mark.parametrize("number", [np.int64(2), np.uint8(2), 2])
def test_whole_numbers_of_numpy_are_counts(retriever, features, number):
    hits = retriever.search("a dog", Gallery(("a", "b", "c"), features), k=number, rerank=number)
    assert len(hits) == 2


@pytest.mark.parametrize("rows", [[2, 0], (2, 0), np.array([2, 0], np.uint8), iter([2, 0])])
def test_rows_are_any_iterable_of_whole_numbers(stored, features, rows):
    found = stored.features_of(rows)
    np.testing.assert_allclose(found.query_embeds, features.query_embeds[[2, 0]], atol=1e-6)  # other batches


def test_lists_of_numbers_are_scored(retriever):
    assert retriever.itc_scores([[[1, 0], [0, 1]]], [[0, 1]]).tolist() == [[1.0]]


REFUSED = {
    "one picture": ("images-kind", lambda c: c.retriever.encode_images(c.pictures[0])),
    "one path": ("images-kind", lambda c: c.retriever.encode_images("a.jpg")),
    "one PIL image": ("images-kind", lambda c: c.retriever.encode_images(Image.fromarray(c.pictures[0]))),
    "a number as images": ("images-kind", lambda c: c.retriever.encode_images(7)),
    "no value as images": ("images-kind", lambda c: c.retriever.encode_images(None)),
    "a dict of images": ("images-kind", lambda c: c.retriever.encode_images({"a": c.pictures[0]})),
    "a set of images": ("images-kind", lambda c: c.retriever.encode_images({"a.jpg", "b.jpg"})),
    "an empty generator": ("no-images", lambda c: c.retriever.encode_images(iter([]))),
    "a number among images": ("image-type", lambda c: c.retriever.encode_images([7])),
    "one Boxes": ("boxes-kind", lambda c: c.retriever.encode_images(c.pictures, Boxes.empty((40, 30)))),
    "corners as boxes": ("boxes-kind", lambda c: c.retriever.encode_images(c.pictures, [[[1, 2, 3, 4]]] * 3)),
    "an array as boxes": ("boxes-kind", lambda c: c.retriever.encode_images(c.pictures, np.ones((3, 1, 4)))),
    "a dict as boxes": ("boxes-kind", lambda c: c.retriever.encode_images(c.pictures, {"a.jpg": None})),
    "a dict as one entry": ("boxes-kind", lambda c: c.retriever.encode_images(c.pictures, [{"xyxy": []}] * 3)),
    "a number as boxes": ("boxes-kind", lambda c: c.retriever.encode_images(c.pictures, 3)),
    "too few boxes": ("boxes-count", lambda c: c.retriever.encode_images(c.pictures, iter([None]))),
    "a dict as corners": ("box-dtype", lambda c: Boxes({"x1": 1}, (40, 30))),
    "labels that are a number": ("box-labels", lambda c: Boxes([[1, 2, 3, 4]], (40, 30), labels=3)),
    "one text": ("texts-kind", lambda c: c.retriever.encode_texts("a dog")),
    "a number as texts": ("texts-kind", lambda c: c.retriever.encode_texts(5)),
    "bytes as texts": ("texts-kind", lambda c: c.retriever.encode_texts(b"a dog")),
    "a number among texts": ("text-kind", lambda c: c.retriever.encode_texts(["a dog", 5])),
    "texts two deep": ("text-kind", lambda c: c.retriever.encode_texts(np.array([["a", "b"]]))),
    "no texts": ("no-texts", lambda c: c.retriever.encode_texts(iter([]))),
    "no texts to match": ("no-texts", lambda c: c.retriever.itm_scores(c.features, [])),
    "a list to search for": ("text-kind", lambda c: c.retriever.search(["a dog"], c.gallery)),
    "an array as features": ("features-kind", lambda c: c.retriever.itm_scores(c.features.query_embeds, TEXTS)),
    "an array in a gallery": ("features-kind", lambda c: Gallery(("a",), c.features.query_embeds)),
    "one name": ("names-kind", lambda c: Gallery("abc", c.features)),
    "two names": ("names-count", lambda c: Gallery(("a", "b"), c.features)),
    "too few embeddings": ("texts-count", lambda c: TextGallery(TEXTS, np.zeros((2, 4), np.float32))),
    "k 1.0": ("count", lambda c: c.retriever.search("a", c.gallery, k=1.0)),
    "k True": ("count", lambda c: c.retriever.search("a", c.gallery, k=True)),
    "k 0": ("count", lambda c: c.retriever.search("a", c.gallery, k=0)),
    "k None": ("count", lambda c: c.retriever.search("a", c.gallery, k=None)),
    "k '3'": ("count", lambda c: c.retriever.search_texts(c.pictures[0], TEXTS, k="3")),
    "rerank -1": ("count", lambda c: c.retriever.search("a", c.gallery, rerank=-1)),
    "rerank 2.0": ("count", lambda c: c.retriever.search("a", c.gallery, rerank=np.float64(2))),
    "a path as a gallery": ("gallery-kind", lambda c: c.retriever.search("a", "gallery")),
    "a Path as a gallery": ("gallery-kind", lambda c: c.retriever.search_batch(["a"], Path("gallery"))),
    "features as a gallery": ("gallery-kind", lambda c: c.retriever.search("a", c.features)),
    "no gallery": ("gallery-kind", lambda c: c.retriever.search("a", None)),
    "a retriever as an encoder": ("encoder-kind", lambda c: StoredGallery.open("gallery", c.retriever)),
    "a number as a gallery's path": ("path", lambda c: c.retriever.open_gallery(3)),
    "a row that is not there": ("rows", lambda c: c.stored.features_of([3])),
    "a row from the end": ("rows", lambda c: c.gallery.features_of([-1])),
    "a row that is no number": ("rows", lambda c: c.stored.boxes_of(1.0)),
    "one row": ("rows", lambda c: c.stored.features_of(1)),
    "no bundle": ("path", lambda c: Retriever.open(None)),
    "a list as provider": ("provider", lambda c: Retriever.open(c.bundle, ["cpu"])),
    "a float as threads": ("count", lambda c: Retriever.open(c.bundle, threads=2.0)),
    "negative threads": ("count", lambda c: Retriever.open(c.bundle, threads=-1)),
    "a dict as perturbation": ("perturbation-kind", lambda c: Retriever.open(c.bundle, perturbation={"alpha": 1})),
    "words as embeddings": ("numbers", lambda c: c.retriever.itc_scores([["a"]], [["b"]])),
    "ragged embeddings": ("numbers", lambda c: c.retriever.itc_scores([[1, 2], [3]], [[1]])),
    "flat embeddings": ("score-shapes", lambda c: c.retriever.itc_scores([[1, 2]], [[1, 2]])),
}


@pytest.mark.parametrize(("code", "call"), REFUSED.values(), ids=REFUSED.keys())
def test_a_wrong_kind_is_refused_with_what_was_got_and_what_was_expected(
    retriever, pictures, features, stored, tiny_bundle, code, call
):
    given = SimpleNamespace(
        retriever=retriever,
        pictures=pictures,
        features=features,
        gallery=Gallery(("a", "b", "c"), features),
        stored=stored,
        bundle=tiny_bundle,
    )
    with pytest.raises(InputError) as caught:
        call(given)
    assert caught.value.code == code
    assert SHOWN_TO_A_USER.search(str(caught.value))
    assert isinstance(caught.value, QpertError)


def test_a_perturbation_is_taken(tiny_bundle, retriever):
    settings = retriever.encoder.perturbation.to_dict() | {"alpha": 2.0}
    with Retriever.open(tiny_bundle, perturbation=Perturbation.from_dict(settings), threads=np.int64(1)) as opened:
        assert opened.encoder.perturbation.alpha == 2.0
