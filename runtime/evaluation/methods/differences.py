"""How much two methods differ, and how much of that is chance: a paired bootstrap over the pictures of a split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qpert.runtime.evaluation import bootstrap
from qpert.runtime.evaluation.bootstrap import Floats, Hits, Score
from qpert.runtime.evaluation.methods.choices import Method
from qpert.runtime.evaluation.metrics import BINS, CUTS
from qpert.runtime.evaluation.result import Evaluation

STAGES = ("final", "itc")
"""Of a difference: re-ranked (ITC where nothing is), and ITC alone."""
SCORES: dict[str, Score] = {"r": "r1", "mr": "mr1", "mean_filled_": "mean_filled", "small_r": "small"}
"""Prefix of a metric's name, before the cut → its score. mR@K is undefined where a size bin is empty or has a recall of
0; mean_filled_K, the arithmetic mean over the bins that have pictures, is always defined."""


@dataclass(frozen=True)
class Difference:
    """A metric of one method less that of another, in points, with its interval; None if undefined, with a `reason`."""

    gain: float | None
    low: float | None
    high: float | None
    reason: str | None = None

    @property
    def verdict(self) -> int:
        """1 if the interval lies above 0, −1 if below, else 0."""
        if self.low is None or self.high is None:
            return 0
        return int(self.low > 0) - int(self.high < 0)

    def to_dict(self) -> dict[str, Any]:
        interval = None if self.low is None else [self.low, self.high]
        return {"gain": self.gain, "interval": interval} | ({} if self.reason is None else {"reason": self.reason})


@dataclass(frozen=True)
class Contrast:
    """`method` less `against` at one stage: by direction and metric, and by direction and size bin (R@1)."""

    method: Method
    against: Method
    stage: str
    metrics: Mapping[str, Mapping[str, Difference]]
    bins: Mapping[str, tuple[Difference, ...]]

    def reversed(self) -> Contrast:
        """`against` less `method`."""
        return Contrast(
            self.against,
            self.method,
            self.stage,
            {way: {name: flipped(one) for name, one in found.items()} for way, found in self.metrics.items()},
            {way: tuple(map(flipped, found)) for way, found in self.bins.items()},
        )

    def to_dict(self) -> dict[str, Any]:
        ways = {way: {name: one.to_dict() for name, one in found.items()} for way, found in self.metrics.items()}
        bins = {way: [one.to_dict() for one in found] for way, found in self.bins.items()}
        return {"method": self.method, "against": self.against, "stage": self.stage, **ways, "bins_r1": bins}


def flipped(one: Difference) -> Difference:
    def minus(value: float | None) -> float | None:
        return None if value is None else -value

    return Difference(minus(one.gain), minus(one.high), minus(one.low), one.reason)


def contrasts(evaluations: Sequence[Evaluation], pairs: Sequence[tuple[Method, Method]]) -> tuple[Contrast, ...]:
    """Each pair (method, against) at both stages; all of them on the same draws of pictures.

    Where nothing was re-ranked both stages are the same, and only "itc" is given.
    """
    stages = STAGES if evaluations[0].rerank else ("itc",)
    return tuple(one for stage in stages for one in _of_stage(evaluations, pairs, stage))


def _of_stage(evaluations: Sequence[Evaluation], pairs: Sequence[tuple[Method, Method]], stage: str) -> list[Contrast]:
    methods = [one.method for one in evaluations]
    columns = [(methods.index(method), methods.index(against)) for method, against in pairs]
    ways = {way: _differences(found, columns) for way, found in _hits(evaluations, stage).items()}
    return [
        Contrast(
            method,
            against,
            stage,
            {way: found[0][number] for way, found in ways.items()},
            {way: found[1][number] for way, found in ways.items()},
        )
        for number, (method, against) in enumerate(pairs)
    ]


def _hits(evaluations: Sequence[Evaluation], stage: str) -> dict[str, dict[int, Hits]]:
    """By direction and cut, the hits of all methods."""
    data = evaluations[0].data
    owners, areas = data.dataset.image_of_caption, data.largest_areas
    scores = [one.scores if stage == "final" else one.scores.itc_alone() for one in evaluations]
    texts = [one.t2i_ranks(owners) for one in scores]
    images = [one.i2t_ranks(owners) for one in scores]
    return {
        "t2i": {cut: Hits.of_texts(texts, owners, areas, cut=cut) for cut in CUTS},
        "i2t": {cut: Hits.of_images(images, areas, cut=cut) for cut in CUTS},
    }


def _differences(
    hits: Mapping[int, Hits], columns: Sequence[tuple[int, int]]
) -> tuple[list[dict[str, Difference]], list[tuple[Difference, ...]]]:
    """Of one direction: for each pair of columns its metrics, and its R@1 in the ten size bins."""
    images = len(hits[1].bins)
    names = [f"{prefix}{cut}" for prefix in SCORES for cut in CUTS]

    def measured(draws: Floats) -> Floats:
        """[metrics, R, S]."""
        whole = [bootstrap.scores(hits[cut], draws, score, every_bin=True) for score in SCORES.values() for cut in CUTS]
        return np.stack([*whole, *(bootstrap.bin_recall(hits[1], draws, number) for number in range(BINS))])

    value = measured(bootstrap.once(images))[:, 0]  # [metrics, S]
    drawn = np.concatenate([measured(part) for part in bootstrap.draws(images)], axis=1)
    metrics, bins = [], []
    for one, other in columns:
        gains = value[:, one] - value[:, other]
        spread = drawn[:, :, one] - drawn[:, :, other]
        found = [difference(float(gain), values) for gain, values in zip(gains, spread, strict=True)]
        metrics.append(dict(zip(names, found[: len(names)], strict=True)))
        bins.append(tuple(found[len(names) :]))
    return metrics, bins


def difference(gain: float, drawn: Floats) -> Difference:
    """From the gain on the split itself, NaN if undefined, and those on its draws."""
    if np.isnan(gain):
        return Difference(None, None, None, "a size bin that it needs has no query, or a recall of 0")
    found = bootstrap.paired_interval(drawn)
    if found is None:
        return Difference(gain, None, None, "undefined in most resamples: a size bin is nearly empty")
    return Difference(gain, *found)
