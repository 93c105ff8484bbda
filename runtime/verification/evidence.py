"""Ranks in the report: scores of the same pairs on both sides, and the worst disagreements."""

from __future__ import annotations

import numpy as np

from qpert.runtime.evaluation.inputs import EvaluationData
from qpert.runtime.evaluation.pair_scores import PairScores
from qpert.runtime.retrieval.scores import final_scores
from qpert.runtime.verification.ranks import QueryComparison, RankComparison
from qpert.runtime.verification.result import Candidate, Disagreement, Evidence

POINTS = 1500
"""Pairs in the scatter plot: more would hide each other."""
SHOWN = 6
"""Disagreements per direction."""


def evidence_of(expected: PairScores, deployed: PairScores, ranks: RankComparison, data: EvaluationData) -> Evidence:
    """Final scores of a random sample of pairs that both sides matched, and queries whose first result differs: ties
    last, the widest gap first."""
    keys = ranks.keys
    drawn = np.sort(np.random.default_rng(0).permutation(len(keys))[:POINTS])
    images, texts = np.divmod(keys[drawn], expected.schedule.texts)
    found = [*disagreements("t2i", ranks.t2i, expected, deployed, data)]
    found += disagreements("i2t", ranks.i2t, expected, deployed, data)
    return Evidence(
        final_scores(ranks.reference_itm[drawn], expected.itc[images, texts]),
        final_scores(ranks.deployed_itm[drawn], deployed.itc[images, texts]),
        tuple(found),
    )


def disagreements(
    way: str,
    queries: tuple[QueryComparison, ...],
    expected: PairScores,
    deployed: PairScores,
    data: EvaluationData,
) -> list[Disagreement]:
    changed = [number for number, query in enumerate(queries) if query.changed]
    worst = sorted(changed, key=lambda number: (queries[number].tied, -queries[number].gap))[:SHOWN]
    names, files, captions = data.dataset.names, data.dataset.images, data.dataset.captions

    def candidate(query: int, place: int) -> Candidate:
        image, text = (place, query) if way == "t2i" else (query, place)
        scores = (score_of(expected, image, text), score_of(deployed, image, text))
        return (
            Candidate(names[place], files[place], *scores)
            if way == "t2i"
            else Candidate(captions[place], None, *scores)
        )

    return [
        Disagreement(
            way,
            captions[number] if way == "t2i" else names[number],
            None if way == "t2i" else files[number],
            candidate(number, queries[number].first[0]),
            candidate(number, queries[number].first[1]),
            queries[number].tied,
        )
        for number in worst
    ]


def score_of(scores: PairScores, image: int, text: int) -> float:
    """ITM + ITC of a pair; NaN if ITM did not score it."""
    key = image * scores.schedule.texts + text
    place = int(np.searchsorted(scores.schedule.keys, key))
    if place == len(scores.schedule) or scores.schedule.keys[place] != key:
        return float("nan")
    return float(final_scores(scores.itm[place : place + 1], scores.itc[image, text : text + 1])[0])
