"""Two-stage search in its variants: batches, images for texts, what is refused; the score it must reach is by hand."""

import numpy as np
import pytest

from qpert.runtime.errors import InputError, TextError
from qpert.runtime.gallery.search import Gallery, TextGallery, match_shortlists, reranked
from qpert.runtime.retrieval.features import ImageFeatures
from qpert.runtime.retriever import Retriever

TEXTS = ["a dog", "a cat on a mat", "a round table with a blue cloth", "two boats", "a red house at night"]


@pytest.fixture(scope="module")
def retriever(tiny_bundle):
    with Retriever.open(tiny_bundle, threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def gallery(retriever, random_pictures):
    return Gallery(tuple(f"picture {i}" for i in range(9)), retriever.encode_images(random_pictures(9)))


@pytest.mark.parametrize(("k", "rerank"), [(3, 2), (9, 9), (4, 0), (2, 6)])
def test_a_batch_of_texts_finds_what_each_text_finds_alone(retriever, gallery, k, rerank):
    batch = retriever.search_batch(TEXTS, gallery, k=k, rerank=rerank)
    for text, together in zip(TEXTS, batch, strict=True):
        alone = retriever.search(text, gallery, k=k, rerank=rerank)
        assert [(hit.image, hit.rank_itc) for hit in together] == [(hit.image, hit.rank_itc) for hit in alone]
        for one, other in zip(together, alone, strict=True):
            assert one.score == pytest.approx(other.score, abs=1e-4)  # pair batches of other shapes
            assert (one.itm is None) == (other.itm is None)


@pytest.mark.parametrize("rows", [[[0, 1], [1, 0], [0, 2]], [[0, 1], [2, 3], [4, 5]]], ids=["shared", "apart"])
def test_both_orders_of_the_pair_stage_give_each_pair_its_own_score(retriever, gallery, rows):
    shortlists = np.array(rows)
    found = match_shortlists(retriever.encoder, TEXTS[:3], gallery, shortlists)
    everything = retriever.itm_scores(gallery.features, TEXTS[:3])  # [B, T]
    np.testing.assert_allclose(found, np.take_along_axis(everything.T, shortlists, 1), rtol=0, atol=1e-4)


def test_images_that_shortlists_share_are_read_once(retriever, gallery):
    class Counting:
        def __init__(self):
            self.read = []

        def features_of(self, rows):
            self.read += list(rows)
            return gallery.features_of(rows)

    counting = Counting()
    match_shortlists(retriever.encoder, TEXTS, counting, np.array([[4, 2, 7]] * 5))
    assert sorted(counting.read) == [2, 4, 7]


def test_the_shortlist_comes_first_by_the_sum_and_the_rest_by_itc():
    itc = np.array([0.5, 0.4, 0.3, 0.2], np.float32)
    itm = np.array([-1.0, 2.0], np.float32)
    assert [(place, pytest.approx(score), value) for place, score, value in reranked(itc, itm)] == [
        (1, 2.4, 2.0),
        (0, -0.5, -1.0),
        (2, 0.3, None),
        (3, 0.2, None),
    ]


def test_texts_are_found_for_an_image_by_itm_plus_itc(retriever, random_pictures):
    (picture,) = random_pictures(1)
    features = retriever.encode_images([picture])
    itc = retriever.itc_scores(features.query_embeds, retriever.encode_texts(TEXTS))[0]
    itm = retriever.itm_scores(features, TEXTS)[0]
    by_itc = sorted(range(5), key=lambda i: -itc[i])
    for rerank in (0, 2, 64):
        shortlist = sorted(by_itc[:rerank], key=lambda i: -(itc[i] + itm[i]))
        hits = retriever.search_texts(picture, TEXTS, k=4, rerank=rerank)
        assert [hit.text for hit in hits] == [TEXTS[i] for i in (shortlist + by_itc[rerank:])[:4]]
        for hit in hits:
            i = TEXTS.index(hit.text)
            assert hit.rank_itc == by_itc.index(i) + 1
            assert hit.itc == pytest.approx(itc[i], abs=1e-5)
            assert hit.score == pytest.approx(itc[i] + (itm[i] if i in shortlist else 0), abs=1e-4)
            assert hit.image is None


def test_texts_know_their_images_where_they_are_captions(retriever, random_pictures):
    gallery = TextGallery(tuple(TEXTS), retriever.encode_texts(TEXTS), tuple("abcde"))
    hits = retriever.search_texts(random_pictures(1)[0], gallery, k=5)
    assert {hit.text: hit.image for hit in hits} == dict(zip(TEXTS, "abcde", strict=True))


def test_boxes_of_the_query_image_change_what_is_scored(retriever, random_pictures):
    from qpert.runtime.inputs.boxes import Boxes

    (picture,) = random_pictures(1)
    boxes = Boxes([[5, 5, 25, 25]], (60, 40))
    plain, perturbed = (retriever.search_texts(picture, TEXTS, boxes=given, k=5, rerank=0) for given in (None, boxes))
    assert {hit.text: hit.itc for hit in plain} != {hit.text: hit.itc for hit in perturbed}


def test_nan_from_the_pair_stage_is_refused(retriever, gallery, monkeypatch):
    scores = retriever.encoder.itm_scores
    monkeypatch.setattr(retriever.encoder, "itm_scores", lambda *given: scores(*given) * np.nan)
    with pytest.raises(InputError, match=r"3 of 3 ITM scores are NaN, which cannot be ranked"):
        retriever.search("a dog", gallery, rerank=3)
    with pytest.raises(InputError, match="ITM scores are NaN"):
        retriever.search_texts(np.zeros((9, 9, 3), np.uint8), TEXTS)


def test_nan_in_the_gallery_is_refused(retriever, gallery):
    embeds = gallery.features.query_embeds.copy()
    embeds[3, 0, 0] = np.nan
    broken = Gallery(gallery.images, ImageFeatures(embeds, gallery.features.image_embeds))
    with pytest.raises(InputError, match="NaN"):
        retriever.search("a dog", broken)


def test_what_makes_no_sense_is_refused(retriever, gallery, random_pictures):
    with pytest.raises(InputError, match="got k=0, expected a whole number of at least 1"):
        retriever.search_texts(random_pictures(1)[0], TEXTS, k=0, rerank=1)
    with pytest.raises(InputError, match="no texts"):
        retriever.search_batch([], gallery)
    with pytest.raises(TextError, match="text 1"):
        retriever.search_batch(["a dog", " "], gallery)
    with pytest.raises(InputError, match="got 1 texts for 2 embeddings"):
        TextGallery(("a",), np.zeros((2, 4), np.float32))


def test_no_texts_find_nothing(retriever, random_pictures):
    empty = TextGallery((), np.zeros((0, gallery_width(retriever)), np.float32))
    assert retriever.search_texts(random_pictures(1)[0], empty) == []


def gallery_width(retriever):
    return retriever.encoder.manifest.graphs["image_query"].outputs[0].shape[2]
