"""The two scans against NumPy, and the bound that makes the fast one exact."""

import numpy as np
import pytest

from qpert.runtime.errors import InputError
from qpert.runtime.gallery import scan
from qpert.runtime.gallery.products import best_products
from qpert.runtime.gallery.scan import encode_codes, nearest, top


def unit(array):
    return (array / np.linalg.norm(array, axis=-1, keepdims=True)).astype(np.float32)


def clustered(rng, images, queries=8, width=64, clusters=40, spread=0.08):
    """Images around cluster centres that share a direction, as embeddings of one model do."""
    centres = unit(rng.standard_normal((clusters, queries, width))) + 0.7 * unit(rng.standard_normal(width))
    return unit(centres[rng.integers(0, clusters, images)] + spread * rng.standard_normal((images, queries, width)))


def near_texts(rng, vectors, count, spread=0.1):
    picked = vectors[rng.integers(0, len(vectors), count), rng.integers(0, vectors.shape[1], count)]
    return unit(picked + spread * rng.standard_normal(picked.shape))


def brute_force(vectors, texts):
    """float64 [T, n]."""
    return np.einsum("nqe,te->tnq", vectors.astype(np.float64), texts.astype(np.float64)).max(-1)


def assert_nearest(found, scores, count):
    """`found` is a best `count` by `scores`: where neighbours are closer than float32 tells apart, either may lead."""
    in_order = np.sort(scores, axis=1)[:, ::-1][:, :count]
    np.testing.assert_allclose(found.scores, in_order, rtol=0, atol=2e-6)  # float32 sums of a hundred products
    np.testing.assert_allclose(np.take_along_axis(scores, found.rows, 1), in_order, rtol=0, atol=2e-6)
    assert all(len(set(rows)) == count for rows in found.rows.tolist())


@pytest.mark.parametrize("spread", [0.02, 0.3])
@pytest.mark.parametrize("texts", [1, 5, 260])  # more than are scanned at once
def test_the_fast_scan_finds_the_best_64_of_the_exact_one(spread, texts):
    rng = np.random.default_rng(texts)
    vectors = clustered(rng, 4500, queries=4, width=48, spread=spread)
    queries = near_texts(rng, vectors, texts)
    assert len(vectors) >= scan.FAST_FROM
    fast = nearest(vectors, queries, 64, codes=encode_codes(vectors))
    exact = nearest(vectors, queries, 64, exact=True)
    scores = brute_force(vectors, queries)
    assert_nearest(fast, scores, 64)
    assert_nearest(exact, scores, 64)


def test_no_score_in_8_bits_is_off_by_more_than_its_bound():
    rng = np.random.default_rng(2)
    vectors = np.concatenate([clustered(rng, 300, width=32), unit(rng.laplace(size=(300, 8, 32)) ** 3)])  # spiky ones
    texts = np.concatenate([near_texts(rng, vectors, 20), unit(rng.laplace(size=(20, 32)) ** 3)])
    codes = encode_codes(vectors)
    text_codes, scale, lost = scan._encode_texts(texts)
    products = best_products(codes.codes, text_codes)
    approximate = products * codes.stats[:, 0] * scale[:, None]
    bound = codes.stats[:, 1] + codes.stats[:, 2] * lost[:, None] + scan.ROUNDING
    error = np.abs(approximate - brute_force(vectors, texts))
    assert (error <= bound).all()
    assert error.max() > 1e-4  # the codes do lose something: a bound of nothing would not be tested


def test_images_that_the_codes_cannot_tell_apart_are_told_apart():
    """All within one step of the 8-bit codes: only the exact scores know the order."""
    rng = np.random.default_rng(3)
    centre = unit(rng.standard_normal((1, 4, 32)))
    vectors = unit(np.repeat(centre, 5000, axis=0) + 1e-3 * rng.standard_normal((5000, 4, 32)))
    texts = near_texts(rng, vectors, 3)
    assert_nearest(nearest(vectors, texts, 64, codes=encode_codes(vectors)), brute_force(vectors, texts), 64)


def test_dead_rows_are_not_found_by_either_scan():
    rng = np.random.default_rng(4)
    vectors = clustered(rng, 5000)
    texts = near_texts(rng, vectors, 4)
    scores = brute_force(vectors, texts)
    alive = np.ones(5000, bool)
    alive[scores.argmax(axis=1)] = False
    for exact in (True, False):
        found = nearest(vectors, texts, 10, codes=encode_codes(vectors), alive=alive, exact=exact)
        assert_nearest(found, np.where(alive, scores, -np.inf), 10)


def test_more_results_than_images_are_all_images():
    rng = np.random.default_rng(5)
    vectors = clustered(rng, 7)
    found = nearest(vectors, near_texts(rng, vectors, 2), 100, codes=encode_codes(vectors))
    assert [sorted(rows) for rows in found.rows.tolist()] == [list(range(7))] * 2


def test_ties_go_to_the_lower_row():
    vectors = np.zeros((9, 1, 4), np.float32)
    vectors[:, 0, 0] = [0.5, 1, 1, 0.5, 1, 0, 1, 0.5, 0.5]
    text = np.array([[1, 0, 0, 0]], np.float32)
    assert nearest(vectors, text, 6).rows.tolist() == [[1, 2, 4, 6, 0, 3]]
    assert top(np.array([0, 0, 0], np.float32), 2).tolist() == [0, 1]


def test_ties_go_to_the_lower_row_in_the_fast_scan_too():
    vectors = np.zeros((5000, 1, 4), np.float32)
    vectors[:, 0, 0] = np.arange(5000) % 50 == 7
    vectors[:, 0, 1] = 0.1
    found = nearest(vectors, np.array([[1, 0, 0, 0]], np.float32), 30, codes=encode_codes(vectors))
    assert found.rows.tolist() == [list(range(7, 1507, 50))]


@pytest.mark.parametrize("place", ["image", "text"])
@pytest.mark.parametrize("images", [10, 5000])
def test_nan_is_refused(place, images):
    rng = np.random.default_rng(6)
    vectors = clustered(rng, images)
    texts = near_texts(rng, vectors, 1)
    codes = encode_codes(vectors)
    if place == "text":
        texts[0, 3] = np.nan
    else:
        vectors[np.argmax(brute_force(vectors, texts))] = np.nan  # codes were made before: a damaged float32 file
    with pytest.raises(InputError, match="NaN"):
        nearest(vectors, texts, 3, codes=codes)


def test_an_image_of_zeros_has_codes():
    codes = encode_codes(np.zeros((1, 2, 4), np.float32))
    assert (codes.codes == 128).all()
    assert np.isfinite(codes.stats).all()
