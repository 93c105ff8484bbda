"""The search against `qpert eval`, setting by setting, and against its own interruptions."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest

import qpert.calibration.perturbation.search as module
from qpert.calibration.perturbation.apply import apply_settings
from qpert.calibration.perturbation.grid import REDUCTIONS, Grid, Setting
from qpert.calibration.perturbation.score_cache import ScoreBlocks
from qpert.calibration.perturbation.search import search, without_boxes
from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.evaluation.evaluate import evaluate
from qpert.runtime.retrieval.encoder import Encoder

GRID = Grid(alphas=(2.0, 8.0), weights=("constant", "S-0.5"), thresholds=(0.8, 0.96))
RERANK = 5


@pytest.fixture(scope="module")
def encoder(itc_bundle):
    encoder = Encoder(Bundle.open(itc_bundle), "cpu", threads=1)
    yield encoder
    encoder.close()


@pytest.fixture(scope="module")
def found(encoder, boxed_data, tmp_path_factory):
    return search(encoder, boxed_data, GRID, work=tmp_path_factory.mktemp("work"), rerank=RERANK, threads=1)


def summary(result):
    """Everything of a search but times."""
    trials = {"none": result.none, **{str(setting): trial for setting, trial in result.trials.items()}}
    ranks = {name: (trial.t2i_ranks.tolist(), trial.i2t_ranks.tolist()) for name, trial in trials.items()}
    return {name: trial.metrics.to_dict() for name, trial in trials.items()}, ranks, result.itm_pairs


def evaluated(bundle, data, perturbation, rerank=RERANK):
    encoder = Encoder(bundle, "cpu", perturbation, threads=1)
    try:
        return evaluate(encoder, data, rerank=rerank)
    finally:
        encoder.close()


def test_every_setting_of_the_grid_is_tried(found):
    assert tuple(found.trials) == GRID.settings()
    assert len({json.dumps(trial.metrics.to_dict()) for trial in found.trials.values()}) > 4, "they all score alike"


def test_a_setting_of_each_reduction_gives_exactly_what_the_evaluation_gives(found, encoder, boxed_data):
    candidates = [setting for setting in found.trials if setting.threshold == encoder.manifest.perturbation.threshold]
    for reduction in REDUCTIONS:
        setting = random.Random(0).choice([one for one in candidates if one.reduction == reduction])
        perturbation = setting.perturbation(encoder.manifest.perturbation)
        expected = evaluated(encoder.bundle, boxed_data, perturbation)
        assert found.trials[setting].metrics.to_dict() == expected.metrics.to_dict(), setting


@pytest.mark.parametrize("reduction", ["mean", "each+stock"])
def test_another_threshold_gives_exactly_what_the_evaluation_of_the_calibrated_bundle_gives(
    reduction, found, encoder, boxed_data, tmp_path
):
    setting = Setting(0.8, reduction, "S-0.5", 8.0)
    perturbation = setting.perturbation(encoder.manifest.perturbation)
    bundle = apply_settings(encoder.bundle, perturbation, tmp_path / "new", provenance={}, reports={})
    assert bundle.manifest.perturbation == perturbation
    expected = evaluated(bundle, boxed_data, None)
    assert found.trials[setting].metrics.to_dict() == expected.metrics.to_dict()


def test_no_perturbation_is_what_the_evaluation_without_boxes_gives(found, encoder, boxed_data):
    expected = evaluated(encoder.bundle, without_boxes(boxed_data), None)
    assert found.none.metrics.to_dict() == expected.metrics.to_dict()


def test_without_reranking_the_ranks_are_those_of_itc(encoder, boxed_data, tmp_path):
    grid = Grid(alphas=(8.0,), weights=("constant",), thresholds=(0.96,), reductions=("sum",))
    result = search(encoder, boxed_data, grid, work=tmp_path, rerank=0, threads=1)
    (setting,) = grid.settings()
    expected = evaluated(encoder.bundle, boxed_data, setting.perturbation(encoder.manifest.perturbation), rerank=0)
    assert result.trials[setting].metrics.to_dict() == expected.metrics.to_dict()
    assert result.itm_pairs == 0


# Interruption


class Stop(BaseException):
    """Like KeyboardInterrupt: nothing may catch it."""


class Stopping:
    """Counts calls of a function, and stops the search at one of them."""

    def __init__(self, function, at):
        self.function, self.left, self.calls = function, at, 0

    def __call__(self, *arguments, **options):
        self.calls += 1
        self.left -= 1
        if self.left == 0:
            raise Stop
        return self.function(*arguments, **options)


@pytest.mark.parametrize(
    ("where", "name", "at"),
    [
        ("while queries are computed", "query_sets", 10),
        ("while settings are ranked", "ranks", 6),
        ("while pairs are matched", "itm_scores", 7),
    ],
)
def test_an_interrupted_search_goes_on_and_finds_the_same(
    where, name, at, found, encoder, boxed_data, tmp_path, monkeypatch
):
    monkeypatch.setattr("qpert.calibration.perturbation.score_cache.BLOCK_BYTES", 1 << 13)  # a few images a file
    monkeypatch.setattr("qpert.runtime.evaluation.journal.COMMIT_SECONDS", 0)  # nothing is lost, so it can be counted
    owner = {"query_sets": module.SplitEncoder, "ranks": module._Split, "itm_scores": type(encoder)}[name]
    function = getattr(owner, name)
    first = Stopping(function, at)
    monkeypatch.setattr(owner, name, lambda self, *a, **o: first(self, *a, **o))
    with pytest.raises(Stop):
        search(encoder, boxed_data, GRID, work=tmp_path, rerank=RERANK, threads=1)
    again = Stopping(function, 0)
    monkeypatch.setattr(owner, name, lambda self, *a, **o: again(self, *a, **o))
    result = search(encoder, boxed_data, GRID, work=tmp_path, rerank=RERANK, threads=1)
    assert summary(result) == summary(found)
    assert result.resumed["images"] == 16
    settings = {"query_sets": 0, "ranks": 5, "itm_scores": len(GRID)}[name]
    assert result.resumed["settings"] == settings
    total = {"query_sets": 1 + 2 * 16, "ranks": 1 + len(GRID), "itm_scores": 16}[
        name
    ]  # 1: the check; the unperturbed one
    assert again.calls < total, f"nothing was kept {where}"


def test_a_finished_search_is_read_from_its_folder(found, encoder, boxed_data, tmp_path, monkeypatch):
    search(encoder, boxed_data, GRID, work=tmp_path, rerank=RERANK, threads=1)

    def never(*_):
        raise AssertionError("computed again")

    monkeypatch.setattr(module.SplitEncoder, "query_sets", never)
    monkeypatch.setattr(type(encoder), "itm_scores", never)
    assert summary(search(encoder, boxed_data, GRID, work=tmp_path, rerank=RERANK, threads=1)) == summary(found)


def test_a_larger_grid_computes_only_what_is_new(found, encoder, boxed_data, tmp_path):
    smaller = replace(GRID, alphas=(2.0,))
    search(encoder, boxed_data, smaller, work=tmp_path, rerank=RERANK, threads=1)
    result = search(encoder, boxed_data, GRID, work=tmp_path, rerank=RERANK, threads=1)
    assert result.resumed["settings"] == len(smaller)
    assert summary(result) == summary(found)


def test_a_damaged_file_of_scores_is_computed_again(tmp_path):
    settings = Grid(alphas=(2.0,), thresholds=(0.9,)).settings()
    blocks = ScoreBlocks(tmp_path / "q", settings, images=3, texts=4)
    blocks.step = 2

    def compute(row):
        return np.arange(len(settings) * 4, dtype=np.float32).reshape(len(settings), 4) + row

    seen = []
    blocks.fill(lambda row: seen.append(row) or compute(row), lambda count: None)
    assert seen == [0, 1, 2]
    (tmp_path / "q" / "0000000.npy").write_bytes(b"half a file")
    blocks.fill(lambda row: seen.append(row) or compute(row), lambda count: None)
    assert seen == [0, 1, 2, 0, 1]
    assert np.array_equal(blocks.of(settings[3]), np.stack([compute(row)[3] for row in range(3)]))
