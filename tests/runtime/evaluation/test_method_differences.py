"""Differences between methods, their intervals by brute force, and the page that shows them."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from shared_data import shared_folder

from qpert.runtime.evaluation import bootstrap
from qpert.runtime.evaluation.bootstrap import Hits
from qpert.runtime.evaluation.inputs import EvaluationData
from qpert.runtime.evaluation.methods.choices import Choices
from qpert.runtime.evaluation.methods.comparison import Comparison, oriented, table_a
from qpert.runtime.evaluation.methods.differences import Difference, difference
from qpert.runtime.evaluation.methods.report import comparison_report, plain_words, points
from qpert.runtime.evaluation.metrics import SMALL_BIN, size_bins
from qpert.runtime.evaluation.pair_scores import PairScores
from qpert.runtime.evaluation.result import Evaluation
from qpert.runtime.evaluation.schedule import Schedule
from qpert.runtime.inputs.boxes import Boxes
from qpert.runtime.inputs.datasets import RetrievalDataset
from qpert.runtime.inputs.perturbation import Perturbation
from qpert.runtime.report.html import to_html
from qpert.runtime.report.markdown import to_markdown

IMAGES, CAPTIONS = 60, 2
OWNERS = np.repeat(np.arange(IMAGES), CAPTIONS)


@pytest.fixture(scope="module")
def data():
    """60 pictures of two texts, six in each size bin."""
    names = tuple(f"{number}.png" for number in range(IMAGES))
    texts = tuple(f"text {number}" for number in range(len(OWNERS)))
    dataset = RetrievalDataset(Path("/data"), "test", names, texts, OWNERS)
    boxes = tuple(Boxes([[0, 0, 100, 10 * (number % 10) + 5]], (100, 100)) for number in range(IMAGES))
    return EvaluationData(dataset, boxes, boxes, "made up", "made up")


def evaluation(data, method, strength, seed, rerank=5):
    """Random scores in which own pairs stand out by `strength`."""
    rng = np.random.default_rng(seed)
    own = OWNERS[None] == np.arange(IMAGES)[:, None]
    itc = (rng.normal(size=own.shape) + strength * own).astype(np.float32)
    schedule = Schedule.plan(itc, rerank)
    itm = (rng.normal(size=len(schedule)) + own.ravel()[schedule.keys]).astype(np.float32)
    scores = PairScores(itc, schedule, itm)
    metrics, alone = (one.metrics(OWNERS, data.largest_areas) for one in (scores, scores.itc_alone()))
    return Evaluation(
        metrics, alone, scores, data, Perturbation(), rerank, {}, {}, "blip2", method=method, choices=Choices()
    )


@pytest.fixture(scope="module")
def comparison(data):
    """OEs clearly better than q-pert, OrQ-Pert clearly worse."""
    strengths = {"none": 2.0, "q-pert": 2.2, "or-q-pert": 0.7, "oes": 4.0}
    return Comparison(
        tuple(evaluation(data, name, value, seed) for seed, (name, value) in enumerate(strengths.items()))
    )


def brute_force(data, one, other, cut, metric, way):
    """The gain, and the percentiles of gains over the bootstrap's own draws, picture by picture."""
    bins = size_bins(data.largest_areas)

    def found(evaluation):
        scores = evaluation.scores
        if way == "i2t":
            return [[rank < cut] for rank in scores.i2t_ranks(OWNERS)]
        ranks = scores.t2i_ranks(OWNERS)
        return [[ranks[text] < cut for text in np.flatnonzero(image == OWNERS)] for image in range(IMAGES)]

    def recall(hits, chosen):
        values = [hit for image in chosen for hit in hits[image]]
        return 100 * sum(values) / len(values) if values else None

    def score(hits, chosen):
        if metric == "r":
            return recall(hits, chosen)
        by_bin = [recall(hits, [image for image in chosen if bins[image] == number]) for number in range(10)]
        if metric == "small_r":
            return by_bin[SMALL_BIN]
        if metric == "mean_filled_":
            return float(np.mean([value for value in by_bin if value is not None]))
        return 10 / sum(1 / value for value in by_bin) if all(by_bin) else None

    hits = found(one), found(other)
    gains = []
    for part in bootstrap.draws(IMAGES):
        for counts in part.astype(int):
            chosen = np.repeat(np.arange(IMAGES), counts)
            values = [score(side, chosen) for side in hits]
            if None not in values:
                gains.append(values[0] - values[1])
    whole = [score(side, range(IMAGES)) for side in hits]
    return (None if None in whole else whole[0] - whole[1]), np.percentile(gains, [2.5, 97.5]), len(gains)


@pytest.mark.parametrize(
    ("way", "metric", "cut"),
    [("t2i", "r", 1), ("i2t", "r", 5), ("t2i", "mr", 10), ("i2t", "mean_filled_", 1), ("t2i", "small_r", 1)],
)
def test_differences_and_intervals_are_those_of_brute_force(data, comparison, way, metric, cut):
    oes, perturbed = comparison.evaluation("oes"), comparison.evaluation("q-pert")
    gain, interval, defined = brute_force(data, oes, perturbed, cut, metric, way)
    found = comparison.contrast("oes", "q-pert", "final").metrics[way][f"{metric}{cut}"]
    assert found.gain == pytest.approx(gain)
    if defined < bootstrap.RESAMPLES / 2:
        assert (found.low, found.high) == (None, None)
    else:
        assert (found.low, found.high) == pytest.approx(tuple(interval))


def test_gains_are_the_differences_of_the_reported_recalls(comparison):
    for stage, metrics_of in (("final", lambda one: one.metrics), ("itc", lambda one: one.itc)):
        for method in ("q-pert", "or-q-pert", "oes"):
            ours, none = (metrics_of(comparison.evaluation(name)) for name in (method, "none"))
            contrast = comparison.contrast(method, "none", stage)
            for cut in (1, 5, 10):
                assert contrast.metrics["t2i"][f"r{cut}"].gain == pytest.approx(
                    ours.t2i.recall[cut] - none.t2i.recall[cut]
                )
            assert contrast.bins["i2t"][3].gain == pytest.approx(
                ours.i2t.bins[3].recall[1] - none.i2t.bins[3].recall[1]
            )


def test_a_pair_the_other_way_round_has_the_opposite_sign(comparison):
    one, other = comparison.contrast("q-pert", "none", "itc"), comparison.contrast("none", "q-pert", "itc")
    found, turned = one.metrics["t2i"]["r1"], other.metrics["t2i"]["r1"]
    assert (turned.gain, turned.low, turned.high) == (-found.gain, -found.high, -found.low)
    assert turned.verdict == -found.verdict


def test_others_are_compared_against_no_boxes_or_the_perturbation():
    assert oriented("none", "oes") == ("oes", "none")
    assert oriented("oes", "q-pert") == ("oes", "q-pert")
    assert oriented("q-pert", "none") == ("q-pert", "none")
    assert oriented("or-q-pert", "oes") == ("oes", "or-q-pert")


def test_a_difference_that_is_undefined_says_why():
    drawn = np.array([1.0, 2.0, np.nan, np.nan, np.nan])
    assert difference(float("nan"), drawn).reason == "a size bin that it needs has no query, or a recall of 0"
    found = difference(1.5, drawn)
    assert (found.gain, found.low) == (1.5, None)
    assert "most resamples" in found.reason
    assert difference(1.5, drawn[:4]).high == pytest.approx(1.975)
    assert (points(found), points(Difference(None, None, None, "x"))) == ("+1.50", "–")


def test_the_mean_over_filled_bins_leaves_out_bins_without_pictures():
    hits = Hits(np.array([[1.0], [0.0], [1.0]]), np.array([2.0, 1.0, 1.0]), np.array([0, 0, 4]))
    draws = np.array([[1.0, 1.0, 1.0], [2.0, 0.0, 0.0], [0.0, 0.0, 3.0]])
    found = bootstrap.scores(hits, draws, "mean_filled")[:, 0]
    np.testing.assert_allclose(found, [(100 / 3 + 100) / 2, 50, 100])


# JSON and page


def test_several_methods_keep_the_contracts_shape_and_add_a_list(comparison):
    document = json.loads(json.dumps(comparison.to_dict()))
    first = comparison.evaluations[0].to_dict()
    assert {key: document[key] for key in first} == json.loads(json.dumps(first))
    assert [one["method"]["name"] for one in document["methods"]] == ["none", "q-pert", "or-q-pert", "oes"]
    assert document["methods"][3]["t2i"]["r1"] == comparison.evaluation("oes").metrics.t2i.recall[1]
    assert document["methods"][3]["method"]["choices"] == {
        "oes-pooling": "mean",
        "oes-similarity": "max",
        "oes-joins": "all",
    }
    assert len(document["differences"]) == 12  # six pairs at two stages
    assert document["bootstrap"]["seed"] == bootstrap.SEED
    one = document["differences"][0]
    assert (one["method"], one["against"], one["stage"]) == ("q-pert", "none", "final")
    assert one["t2i"]["r1"]["interval"][0] <= one["t2i"]["r1"]["gain"] <= one["t2i"]["r1"]["interval"][1]
    assert len(one["bins_r1"]["t2i"]) == 10


def test_without_reranking_there_is_one_stage(data):
    found = Comparison(tuple(evaluation(data, name, 2.0, 3, rerank=0) for name in ("none", "q-pert")))
    assert [one.stage for one in found.contrasts] == ["itc"]
    assert found.contrasts[0].metrics["t2i"]["r1"] == Difference(0.0, 0.0, 0.0)
    page = to_html(comparison_report(found))
    assert "not told apart" in page
    assert "ITC + ITM" not in page


def test_the_page_says_plainly_when_a_baseline_is_better(comparison):
    page = to_html(comparison_report(comparison))
    gain = comparison.contrast("oes", "q-pert", "itc").metrics["t2i"]["r1"].gain
    assert f"Better than Q-Pert in R@1: OEs (text → image, by {gain:.2f} points)" in page
    assert f"{comparison.evaluation('oes').metrics.t2i.recall[1]:.2f}" in page
    assert "<script" not in page
    text = to_markdown(comparison_report(comparison))
    assert "| OrQ-Pert | text → image | worse |" in text
    assert "| OEs, paper | 56.00 | 78.48 | 94.84 | 74.28 | 94.10 |" in text


def test_plain_words_follow_the_intervals():
    better, worse, open_ = Difference(1.0, 0.5, 2.0), Difference(-1.0, -2.0, -0.5), Difference(1.0, -0.5, 2.0)
    assert plain_words({("oes", "t"): better, ("none", "t"): worse}, "q-pert").tone == "bad"
    assert plain_words({("oes", "t"): worse, ("none", "t"): worse}, "q-pert").tone == "good"
    assert plain_words({("oes", "t"): open_, ("none", "t"): worse}, "q-pert").tone == "unsure"


def test_one_baseline_has_its_own_report_with_choices_and_table_a(comparison):
    alone = Comparison((replace(comparison.evaluation("oes"), rerank=0),))
    page = to_html(comparison_report(alone))
    assert "--oes-pooling mean" in page
    assert "56.00" in page
    document = alone.to_dict()
    assert "methods" not in document
    assert document["table_a"]["rows"]["oes"]["r1"] == 78.48


def test_table_a_is_the_papers():
    paper = json.loads((shared_folder("data") / "paper_tables.json").read_text())["A_[small,R1,R5,mR1,mR5]"]
    for name, key in (("none", "base"), ("q-pert", "E"), ("oes", "OEs"), ("or-q-pert", "OrQ")):
        row = table_a()["rows"][name]
        assert [row[metric] for metric in ("small_r1", "r1", "r5", "mr1", "mr5")] == paper[key]
