"""The score formulas, against loops and cases worked by hand."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qpert.runtime.errors import InputError
from qpert.runtime.retrieval import scores
from qpert.runtime.retrieval.scores import final_scores, itc_scores, itc_scores_of_text, ranking


def test_itc_is_the_best_query_of_each_image_for_each_text():
    queries = np.array([[[1, 0], [0, 1]], [[0.6, 0.8], [-1, 0]]], np.float32)
    texts = np.array([[1, 0], [0, 1], [-0.6, -0.8]], np.float32)
    expected = [[1, 1, -0.6], [0.6, 0.8, 0.6]]
    found = itc_scores(queries, texts)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-6)  # float32 products of two numbers


def test_the_scores_of_one_text_are_those_of_all():
    rng = np.random.default_rng(0)
    queries, texts = rng.standard_normal((7, 5, 96), np.float32), rng.standard_normal((3, 96), np.float32)
    exact = np.einsum("bqe,te->bqt", queries.astype(np.float64), texts.astype(np.float64)).max(axis=1)
    for column, text in enumerate(texts):
        found = itc_scores_of_text(queries, text)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, exact[:, column], atol=1e-5)  # sums of 96 products in float32, of order 10


@given(
    st.tuples(*[st.integers(1, 4)] * 4).flatmap(
        lambda n: st.tuples(
            hnp.arrays(np.float32, n[:3], elements=st.floats(-1, 1, width=32)),
            hnp.arrays(np.float32, (n[3], n[2]), elements=st.floats(-1, 1, width=32)),
        )
    )
)
def test_itc_equals_the_loops_of_its_definition(arrays):
    queries, texts = arrays
    found = itc_scores(queries, texts)
    for b, image in enumerate(queries):
        for t, text in enumerate(texts):
            expected = max(float(np.dot(query.astype(float), text.astype(float))) for query in image)
            assert found[b, t] == pytest.approx(expected, abs=1e-6)  # float32 sums of at most four products


def test_no_images_give_no_rows():
    assert itc_scores(np.zeros((0, 4, 3), np.float32), np.zeros((2, 3), np.float32)).shape == (0, 2)


@pytest.mark.parametrize("images_at_once", [1, 2, 3, 5])
def test_a_gallery_larger_than_a_block_is_scored_block_by_block(monkeypatch, images_at_once):
    """Five images of two queries against three texts, in blocks that divide five and that do not."""
    rng = np.random.default_rng(8)
    queries, texts = rng.integers(-9, 9, (5, 2, 4)), rng.integers(-9, 9, (3, 4))
    expected = [[max(int(query @ text) for query in image) for text in texts] for image in queries]
    monkeypatch.setattr(scores, "BLOCK", images_at_once * 2 * 3)
    assert itc_scores(queries.astype(np.float32), texts.astype(np.float32)).tolist() == expected


@pytest.mark.parametrize(
    ("queries", "texts"),
    [((2, 4), (3, 4)), ((1, 2, 2, 4), (3, 4)), ((1, 2, 4), (4,)), ((1, 2, 4), (1, 3, 4)), ((1, 2, 4), (3, 5))],
    ids=["one image", "two batch axes", "one text", "batched texts", "other widths"],
)
def test_shapes_that_are_no_images_and_texts_are_refused(queries, texts):
    with pytest.raises(InputError) as caught:
        itc_scores(np.zeros(queries, np.float32), np.zeros(texts, np.float32))
    assert caught.value.code == "score-shapes"
    assert f"got query_embeds {list(queries)} and text_embeds {list(texts)}" in str(caught.value)


def test_the_final_score_is_the_sum():
    found = final_scores(np.array([1.5, -2], np.float32), np.array([0.25, 0.5], np.float32))
    np.testing.assert_array_equal(found, np.array([1.75, -1.5], np.float32))


def test_ranking_goes_from_high_to_low_and_ties_go_to_the_lower_index():
    np.testing.assert_array_equal(ranking(np.array([0.1, 0.9, 0.5, 0.9, -np.inf], np.float32)), [1, 3, 2, 0, 4])


@given(hnp.arrays(np.float32, st.integers(0, 30), elements=st.floats(-1, 1, width=16)))
def test_a_ranking_holds_every_index_once_in_falling_order(scores):
    order = ranking(scores)
    assert sorted(order) == list(range(len(scores)))
    assert all(scores[a] > scores[b] or (scores[a] == scores[b] and a < b) for a, b in itertools.pairwise(order))


def test_nan_has_no_rank():
    with pytest.raises(ValueError, match="1 of 3 scores are NaN"):
        ranking(np.array([0, np.nan, 1], np.float32))
