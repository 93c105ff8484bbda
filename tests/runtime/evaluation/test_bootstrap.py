"""The bootstrap: scores of a draw against the metrics of that draw, and intervals against formulas."""

import math

import numpy as np
import pytest

from qpert.runtime.evaluation.bootstrap import Hits, scores, uncertainty
from qpert.runtime.evaluation.metrics import metrics_of_ranks

IMAGES = 60
AREAS = np.where(np.arange(IMAGES) < 3, np.nan, (np.arange(IMAGES) % 10) / 10 + 0.05)
"""Six images or so in every bin, three images without boxes."""
OWNERS = np.repeat(np.arange(IMAGES), 1 + np.arange(IMAGES) % 4)
"""One to four captions an image."""


def ranks(seed, size, share=0.7):
    return np.where(np.random.default_rng(seed).uniform(size=size) < share, 0, 3)


@pytest.fixture
def hits():
    return Hits.of_texts([ranks(seed, len(OWNERS)) for seed in range(4)], OWNERS, AREAS)


def drawn_metrics(draw, found):
    """The metrics of a split in which each image occurs as often as it was drawn."""
    images = np.repeat(np.arange(IMAGES), draw)
    texts = [np.flatnonzero(image == OWNERS) for image in images]
    owners = np.repeat(np.arange(len(images)), [len(part) for part in texts])
    t2i = found[np.concatenate(texts)]
    return metrics_of_ranks(t2i, np.zeros(len(images), np.int64), image_of_text=owners, largest_areas=AREAS[images]).t2i


@pytest.mark.parametrize("seed", range(5))
def test_the_scores_of_a_draw_are_the_metrics_of_its_images(seed, hits):
    draw = np.random.default_rng(seed).multinomial(3 * IMAGES, np.full(IMAGES, 1 / IMAGES))  # no bin stays empty
    for number in range(4):
        expected = drawn_metrics(draw, ranks(number, len(OWNERS)))
        values = {
            "r1": expected.recall[1],
            "mr1": expected.mean_recall[1] or 0.0,
            "small": expected.bins[0].recall[1],
        }
        for score, value in values.items():
            assert scores(hits, draw[None].astype(float), score)[0, number] == pytest.approx(value, abs=1e-9), score


def test_the_harmonic_mean_is_zero_where_a_bin_finds_nothing():
    found = np.where(AREAS[OWNERS] < 0.1, 5, 0)
    hits = Hits.of_texts([found], OWNERS, AREAS)
    assert scores(hits, np.ones((1, IMAGES)), "mr1")[0, 0] == 0
    assert scores(hits, np.ones((1, IMAGES)), "small")[0, 0] == 0


def test_a_bin_of_which_nothing_was_drawn_is_left_out_of_the_mean():
    hits = Hits.of_images([np.zeros(IMAGES, np.int64)], AREAS)
    draw = np.where(AREAS < 0.5, 1.0, 0.0)[None]
    assert scores(hits, draw, "mr1")[0, 0] == pytest.approx(100)
    assert math.isnan(scores(hits, np.where(AREAS < 0.1, 0.0, 1.0)[None], "small")[0, 0])


def test_the_standard_error_of_r1_is_that_of_a_proportion():
    found = ranks(1, 400, share=0.8)
    hits = Hits.of_images([found, found], np.full(400, 0.05))
    p = float(np.mean(found == 0))
    # 2,000 draws know a standard error to 1/√4000 = 1.6 %; 8 % is five times that
    assert uncertainty([hits], "r1", 0, none=1).standard_error == pytest.approx(
        100 * math.sqrt(p * (1 - p) / 400), rel=0.08
    )


def test_the_interval_of_a_gain_is_paired():
    """A setting that finds 20 of 400 images more and loses none: the interval follows from those 20 alone."""
    none = ranks(1, 400, share=0.6)
    better = none.copy()
    better[np.flatnonzero(none)[:20]] = 0
    found = uncertainty([Hits.of_images([better, none], np.full(400, 0.05))], "r1", 0, none=1)
    error = 100 * math.sqrt(0.05 * 0.95 / 400)  # of a proportion of 20 in 400: 1.1 points; unpaired it would be 3.4
    low, high = found.gain_interval
    assert low == pytest.approx(5 - 1.96 * error, abs=0.4)  # steps of 0.25 points
    assert high == pytest.approx(5 + 1.96 * error, abs=0.4)
    assert found.within_noise == (True, False)
    assert found.p_value < 0.01


def test_the_best_of_many_useless_settings_is_called_chance():
    """Forty settings, as good as none but for luck: the luckiest looks good alone, and not as the best of forty."""
    every = [ranks(seed, 300, share=0.7) for seed in range(41)]
    hits = Hits.of_images(every, np.full(300, 0.05))
    once = scores(hits, np.ones((1, 300)), "r1")[0]
    best = int(once[:40].argmax())
    found = uncertainty([hits], "r1", best, none=40)
    assert once[best] - once[40] > 3
    assert found.p_value > 0.05
    assert sum(found.within_noise) > 20


def test_the_same_seed_gives_the_same_numbers(hits):
    assert uncertainty([hits], "mr1", 0, none=3) == uncertainty([hits], "mr1", 0, none=3)
    assert uncertainty([hits], "mr1", 0, none=3) != uncertainty([hits], "mr1", 0, none=3, seed=1)


def test_the_mean_of_both_directions_is_drawn_together():
    """Two sides, 40 images: the gain in one direction is undone by the other's loss on the very same images."""
    rng = np.random.default_rng(5)
    gained = rng.integers(0, 2, 40)
    zeros, areas = np.zeros(40, np.int64), np.full(40, 0.05)
    there = Hits.of_images([1 - gained, zeros + 1], areas)  # side 0 finds what was gained, side 1 nothing
    back = Hits.of_images([gained, zeros], areas)  # side 0 loses the same images, side 1 finds everything
    found = uncertainty([there, back], "r1", 0, none=1)
    assert found.gain_interval == pytest.approx((0, 0), abs=1e-12), "whichever images are drawn"
    assert uncertainty([there], "r1", 0, none=1).gain_interval[0] > 10
