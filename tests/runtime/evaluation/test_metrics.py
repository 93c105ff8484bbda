"""Recall and size bins against cases worked by hand, and ranks against `qpert.runtime.retrieval.scores.ranking`."""

import numpy as np
import pytest

from qpert.runtime.evaluation.metrics import (
    direction_metrics,
    image_to_text_ranks,
    largest_area,
    recall,
    retrieval_metrics,
    size_bins,
    text_to_image_ranks,
)
from qpert.runtime.inputs.boxes import Boxes
from qpert.runtime.retrieval.scores import ranking

# Two images, three texts: texts 0 and 1 belong to image 0, text 2 to image 1.
OWNERS = np.array([0, 0, 1])
SCORES = np.array([[0.9, 0.1, 0.8], [0.2, 0.5, 0.7]], np.float32)


def test_ranks_of_a_case_worked_by_hand():
    # text 0: 0.9 > 0.2, rank 0. text 1: 0.1 < 0.5, rank 1. text 2: 0.7 < 0.8, rank 1.
    assert text_to_image_ranks(SCORES, OWNERS).tolist() == [0, 1, 1]
    # image 0: its best own text is 0 (0.9), first. image 1: its own is text 2 (0.7), first.
    assert image_to_text_ranks(SCORES, OWNERS).tolist() == [0, 0]


def test_any_own_text_counts_for_an_image_and_the_best_of_them_decides():
    scores = np.array([[0.1, 0.6, 0.7], [0.0, 0.0, 0.0]], np.float32)
    assert image_to_text_ranks(scores, OWNERS)[0] == 1  # 0.7 of another image comes first, then its own 0.6


def test_ties_go_to_the_lower_index():
    level = np.zeros((2, 3), np.float32)
    assert text_to_image_ranks(level, OWNERS).tolist() == [0, 0, 1]
    assert image_to_text_ranks(level, OWNERS).tolist() == [0, 2]


def test_ranks_agree_with_the_ranking_of_scores_also_with_ties_and_minus_infinity():
    random = np.random.default_rng(0)
    owners = np.sort(np.concatenate([np.arange(20), random.integers(0, 20, 60)]))
    scores = random.integers(0, 5, (20, 80)).astype(np.float32)
    scores[random.random(scores.shape) < 0.2] = -np.inf
    t2i, i2t = text_to_image_ranks(scores, owners), image_to_text_ranks(scores, owners)
    for text in range(80):
        assert ranking(scores[:, text])[t2i[text]] == owners[text]
    for image in range(20):
        order = owners[ranking(scores[image])]
        assert i2t[image] == np.flatnonzero(order == image)[0]


def test_recall_is_the_share_of_ranks_below_k_in_percent():
    assert recall(np.array([0, 0, 3, 4, 5, 9, 10, 100])) == {1: 25.0, 5: 50.0, 10: 75.0}
    assert recall(np.array([], np.int64)) == {1: None, 5: None, 10: None}


def test_nan_is_an_error():
    bad = SCORES.copy()
    bad[1, 1] = np.nan
    for ranks in (text_to_image_ranks, image_to_text_ranks):
        with pytest.raises(ValueError, match="1 of 6 scores are NaN"):
            ranks(bad, OWNERS)


def test_an_image_without_text_is_an_error():
    with pytest.raises(ValueError, match="image 1 has no text"):
        image_to_text_ranks(SCORES, np.array([0, 0, 0]))


def test_bins_are_tenths_and_an_area_of_one_belongs_to_the_last():
    areas = np.array([0.0, 0.0999, 0.1, 0.3, 0.5, 0.95, 1.0, np.nan])
    assert size_bins(areas).tolist() == [0, 0, 1, 3, 5, 9, 9, -1]
    with pytest.raises(ValueError, match="between 0 and 1"):
        size_bins(np.array([1.2]))


def test_the_largest_box_decides_and_no_boxes_are_nan():
    boxes = Boxes(np.array([[0, 0, 10, 10], [0, 0, 20, 25]]), (100, 50))
    assert largest_area(boxes) == pytest.approx(0.1)
    assert np.isnan(largest_area(None))
    assert np.isnan(largest_area(Boxes.empty((4, 4))))


def test_the_mean_over_bins_is_harmonic():
    bins = np.repeat(np.arange(10), 2)
    ranks = np.where(np.arange(20) == 1, 1, 0)  # bin 0: 50 % at 1, all others 100 %
    metrics = direction_metrics(ranks, bins, bins)
    assert metrics.mean_recall[1] == pytest.approx(10 / (1 / 50 + 9 / 100))  # 90.909…
    assert metrics.mean_of_filled_bins[1] == pytest.approx(95)
    assert metrics.mean_recall[5] == pytest.approx(100)
    assert metrics.reasons == {}


def test_an_empty_bin_makes_the_mean_undefined_and_says_why():
    bins = np.repeat(np.arange(9), 2)
    metrics = direction_metrics(np.zeros(18, np.int64), bins, bins)
    assert metrics.mean_recall == {1: None, 5: None, 10: None}
    assert metrics.reasons[1] == "no queries in size bin 0.9–1 (queries per bin: 2, 2, 2, 2, 2, 2, 2, 2, 2, 0)"
    assert metrics.mean_of_filled_bins[1] == 100
    said = metrics.to_dict()
    assert said["mr1"] is None
    assert "size bin" in said["mr1_reason"]
    assert said["mean_filled_1"] == 100


def test_a_recall_of_zero_makes_the_mean_undefined():
    bins = np.arange(10)
    ranks = np.where(bins == 3, 7, 0)
    metrics = direction_metrics(ranks, bins, bins)
    assert metrics.mean_recall[1] is None
    assert metrics.reasons[1].startswith("R@1 is 0 in size bin 0.3–0.4")
    assert metrics.mean_recall[10] == pytest.approx(100)


def test_the_whole_report_counts_images_and_queries_of_the_small_bin():
    areas = np.array([0.05, np.nan])
    report = retrieval_metrics(SCORES, SCORES, image_of_text=OWNERS, largest_areas=areas).to_dict()
    assert report["t2i"]["r1"] == pytest.approx(100 / 3)
    assert report["i2t"]["r1"] == 100
    assert report["small"]["images"] == 1
    assert report["small"]["queries"] == 2
    assert report["small"]["t2i"]["r1"] == 50
    assert (report["images"], report["texts"], report["unbinned"]) == (2, 3, 1)
