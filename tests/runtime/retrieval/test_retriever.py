"""`Retriever` over the demonstration bundle and real photographs, and its two-stage search."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qpert.runtime import Gallery, ImageFeatures, Retriever
from qpert.runtime.errors import InputError, TextError

TEXTS = ["a cat", "A cup of coffee on a red saucer.", "an astronaut", "a rocket on the launch pad at dusk"]


@pytest.fixture(scope="module")
def retriever(demo_bundle):
    with Retriever.open(demo_bundle, provider="cpu") as opened:
        yield opened


@pytest.fixture(scope="module")
def features(retriever, photos, photo_boxes):
    return retriever.encode_images(photos, boxes=photo_boxes)


@pytest.fixture(scope="module")
def gallery(features, photos):
    return Gallery(tuple(photo.name for photo in photos), features)


def test_photographs_with_boxes_become_features_of_the_declared_shapes(retriever, features, photos):
    graphs = retriever.encoder.manifest.graphs
    _, queries, width = graphs["image_query"].outputs[0].shape
    _, tokens, channels = graphs["vision"].outputs[0].shape
    assert features.query_embeds.shape == (len(photos), queries, width)
    assert features.image_embeds.shape == (len(photos), tokens, channels)
    # float32 rounding of a normalised vector
    np.testing.assert_allclose(np.linalg.norm(features.query_embeds, axis=-1), 1, rtol=0, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(retriever.encode_texts(TEXTS), axis=-1), 1, rtol=0, atol=1e-5)


def test_boxes_change_the_queries_and_not_the_image_features(retriever, features, photos):
    plain = retriever.encode_images(photos)
    np.testing.assert_array_equal(plain.image_embeds, features.image_embeds)
    assert (np.abs(plain.query_embeds - features.query_embeds).max(axis=(1, 2)) > 1e-3).all()


def test_scores_have_a_row_for_each_image_and_a_column_for_each_text(retriever, features, photos):
    itc = retriever.itc_scores(features.query_embeds, retriever.encode_texts(TEXTS))
    itm = retriever.itm_scores(features, TEXTS)
    assert itc.shape == itm.shape == (len(photos), len(TEXTS))
    assert np.abs(itc).max() <= 1 + 1e-5
    assert np.isfinite(itm).all()


def test_four_threads_on_one_retriever_get_what_one_gets(retriever, photos, photo_boxes):
    def work(number):
        rows = [(number + i) % len(photos) for i in range(2)]
        found = retriever.encode_images([photos[i] for i in rows], [photo_boxes[i] for i in rows])
        texts = [TEXTS[number % 4], TEXTS[(number + 1) % 4]]
        return found.query_embeds, retriever.encode_texts(texts), retriever.itm_scores(found, texts)

    alone = [work(number) for number in range(4)]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(work, list(range(4)) * 3))
    for number, results in enumerate(together):
        for found, expected in zip(results, alone[number % 4], strict=True):
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)  # threads may split a sum otherwise


def test_search_ranks_by_itm_plus_itc_within_the_shortlist_and_by_itc_below(retriever, gallery, features):
    itc = retriever.itc_scores(features.query_embeds, retriever.encode_texts([TEXTS[1]]))[:, 0]
    itm = retriever.itm_scores(features, [TEXTS[1]])[:, 0]
    by_itc = sorted(range(len(itc)), key=lambda i: -itc[i])
    for rerank in (0, 2, 64):
        hits = retriever.search(TEXTS[1], gallery, k=10, rerank=rerank)
        shortlist = sorted(by_itc[:rerank], key=lambda i: -(itc[i] + itm[i]))
        assert [hit.image for hit in hits] == [gallery.images[i] for i in shortlist + by_itc[rerank:]]
        for hit in hits:
            i = gallery.images.index(hit.image)
            assert hit.rank_itc == by_itc.index(i) + 1
            assert hit.itc == pytest.approx(itc[i], abs=1e-5)
            assert (hit.itm is None) == (i not in shortlist)
            expected = itc[i] + (itm[i] if i in shortlist else 0)
            assert hit.score == pytest.approx(expected, abs=1e-4)


@given(k=st.integers(1, 9), rerank=st.integers(0, 9))
@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_search_returns_the_first_k_of_the_whole_ranking(retriever, gallery, k, rerank):
    everything = retriever.search("a cat", gallery, k=100, rerank=rerank)
    assert sorted(hit.image for hit in everything) == sorted(gallery.images)
    found = retriever.search("a cat", gallery, k=k, rerank=rerank)
    assert [hit.image for hit in found] == [hit.image for hit in everything[:k]]


def test_an_empty_gallery_has_no_hits(retriever, gallery):
    assert retriever.search("a cat", Gallery((), gallery.features.rows([])), k=3) == []


@pytest.mark.parametrize(("k", "rerank"), [(0, 1), (-1, 1), (1, -1)])
def test_numbers_that_make_no_sense_are_refused(retriever, gallery, k, rerank):
    with pytest.raises(InputError) as caught:
        retriever.search("a cat", gallery, k=k, rerank=rerank)
    assert caught.value.code == "count"


def test_an_empty_query_is_refused(retriever, gallery):
    with pytest.raises(TextError, match="text 0 is ''"):
        retriever.search("", gallery)


def test_a_gallery_needs_one_name_for_each_image():
    features = ImageFeatures(np.zeros((2, 1, 1), np.float32), np.zeros((2, 1, 1), np.float32))
    with pytest.raises(InputError, match="got 1 names for 2 images"):
        Gallery(("a",), features)


def test_a_closed_retriever_cannot_be_used(tiny_bundle):
    with Retriever.open(tiny_bundle) as opened:
        pass
    with pytest.raises(InputError, match="session of graph 'text' is closed"):
        opened.encode_texts(["a dog"])


def test_threads_for_operators_can_be_chosen(tiny_bundle):
    with Retriever.open(tiny_bundle, threads=1) as one, Retriever.open(tiny_bundle) as free:
        np.testing.assert_allclose(one.encode_texts(TEXTS), free.encode_texts(TEXTS), rtol=0, atol=1e-5)
