"""Ranks of a setting from its shortlists alone, against the evaluation that has all scores."""

import numpy as np
import pytest

from qpert.calibration.perturbation.ranks import SettingRanks
from qpert.runtime.evaluation.pair_scores import PairScores
from qpert.runtime.evaluation.schedule import Schedule

OWNERS = np.repeat(np.arange(30), 3)


def scores(seed, shape):
    """Rounded, so that there are many ties."""
    return np.round(np.random.default_rng(seed).normal(size=shape), 1).astype(np.float32)


@pytest.mark.parametrize("rerank", [0, 1, 4, 64, 1000])
def test_final_ranks_are_those_of_the_evaluation_ties_included(rerank):
    itc = scores(0, (30, 90))
    whole = PairScores(itc, schedule := Schedule.plan(itc, rerank), scores(1, len(schedule)))
    kept = SettingRanks.unpack(SettingRanks.of(itc, OWNERS, rerank).pack(), 30, 90, rerank)
    assert np.array_equal(kept.keys(), schedule.keys)
    t2i, i2t = kept.final(OWNERS, schedule, whole.itm)
    assert np.array_equal(t2i, whole.t2i_ranks(OWNERS))
    assert np.array_equal(i2t, whole.i2t_ranks(OWNERS))


def test_pairs_that_other_settings_matched_change_nothing():
    itc, other = scores(2, (30, 90)), scores(3, (30, 90))
    mine, theirs = (SettingRanks.of(one, OWNERS, 5) for one in (itc, other))
    nobody = np.zeros((0, 0), np.int64)
    union = Schedule(30, 90, nobody, nobody, np.unique(np.concatenate([mine.keys(), theirs.keys()])))
    assert len(union) > len(mine.keys())
    itm = scores(4, (30, 90))
    alone = Schedule.plan(itc, 5)
    expected = PairScores(itc, alone, itm.ravel()[alone.keys])
    t2i, i2t = mine.final(OWNERS, union, itm.ravel()[union.keys])
    assert np.array_equal(t2i, expected.t2i_ranks(OWNERS))
    assert np.array_equal(i2t, expected.i2t_ranks(OWNERS))


def test_a_record_of_another_size_is_not_unpacked():
    packed = SettingRanks.of(scores(0, (30, 90)), OWNERS, 4).pack()
    assert SettingRanks.unpack(packed, 30, 90, 5) is None
    assert SettingRanks.unpack(packed[:-1], 30, 90, 4) is None
