"""Level `recall`: what the bundle's recall differs by from the reference's, and whether that is more than chance.

The interval is a paired bootstrap: images are drawn with replacement, each with all its captions (captions of one
image are no independent queries), and both sides are measured on the same draw. Source: Efron and Tibshirani, An
Introduction to the Bootstrap, percentile intervals.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qpert.runtime.evaluation.metrics import BINS, CUTS, SMALL_BIN, size_bins
from qpert.runtime.verification.ranks import QueryComparison
from qpert.runtime.verification.result import Gate
from qpert.runtime.verification.tolerances import RANK_LIMITS, RankLimits

RESAMPLES = 2000
DRAWS_AT_ONCE = 100
SEED = 0
COVERAGE = 95
"""Percent of the resampled differences that lie inside an interval."""

Indices = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Change:
    """One metric in percent, by the reference and here; difference and interval in points. What is None is undefined,
    and `reason` says why."""

    reference: float | None
    deployed: float | None
    difference: float | None
    low: float | None
    high: float | None
    reason: str | None = None


@dataclass(frozen=True)
class RecallComparison:
    """Both directions: `r1` … `mr10`, `small_r1` … by name. decided_r1: the change of R@1 in points, leaving out
    queries whose two first results float32 itself does not tell apart."""

    t2i: dict[str, Change]
    i2t: dict[str, Change]
    decided_r1: dict[str, float]
    images: int
    resamples: int

    def gates(self, limits: RankLimits) -> Iterator[Gate]:
        for way, change in self.decided_r1.items():
            yield Gate(f"{way}: change of R@1, points", change, limits.r1)

    def to_dict(self) -> dict[str, Any]:
        ways = {"t2i": self.t2i, "i2t": self.i2t}
        changes = {way: {name: asdict(change) for name, change in found.items()} for way, found in ways.items()}
        return changes | {"images": self.images, "resamples": self.resamples, "interval_percent": COVERAGE}


@dataclass(frozen=True)
class Queries:
    """One direction: ranks from 0 of both sides, the image and the size bin (−1: none) that each query belongs to."""

    reference: Indices
    deployed: Indices
    image: Indices
    bins: Indices


def compare_recall(
    reference: tuple[Indices, Indices],
    deployed: tuple[Indices, Indices],
    ties: tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]],
    *,
    image_of_text: Indices,
    largest_areas: Floats,
    resamples: int = RESAMPLES,
) -> RecallComparison:
    """Both sides' ranks: int64 [T] of each text's image, int64 [B] of each image's first own text.

    ties: bool [T] and [B], queries whose change counts for nothing; see `rounding_ties`.
    """
    bins = size_bins(largest_areas)
    t2i = Queries(reference[0], deployed[0], image_of_text, bins[image_of_text])
    i2t = Queries(reference[1], deployed[1], np.arange(len(bins)), bins)
    return RecallComparison(
        changes(t2i, len(bins), resamples),
        changes(i2t, len(bins), resamples),
        {"t2i": decided_change(t2i, ties[0]), "i2t": decided_change(i2t, ties[1])},
        len(bins),
        resamples,
    )


def rounding_ties(queries: tuple[QueryComparison, ...]) -> npt.NDArray[np.bool_]:
    """Queries whose first result is another one although the reference's scores of the two are a tie of float32: no
    precision can be blamed for these (two captions of the same words, say)."""
    width = RANK_LIMITS["fp32"].tie
    return np.array([query.changed and query.gap <= width for query in queries], dtype=np.bool_)


def decided_change(queries: Queries, tied: npt.NDArray[np.bool_]) -> float:
    """|ΔR@1| in points, changes of `tied` queries left out."""
    change = (queries.deployed < 1).astype(np.float64) - (queries.reference < 1)
    return float(abs(100 * np.where(tied, 0, change).mean()))


def changes(queries: Queries, images: int, resamples: int) -> dict[str, Change]:
    """Every metric of one direction with its interval."""
    whole = [metrics(ranks, queries.bins, np.ones((1, len(ranks)))) for ranks in (queries.reference, queries.deployed)]
    drawn: dict[str, list[Floats]] = {name: [] for name in whole[0]}
    rng = np.random.default_rng(SEED)
    for start in range(0, resamples, DRAWS_AT_ONCE):
        count = min(DRAWS_AT_ONCE, resamples - start)
        draws = rng.multinomial(images, np.full(images, 1 / images), size=count)  # [count, images]
        weights = draws[:, queries.image].astype(np.float64)
        before, now = (metrics(ranks, queries.bins, weights) for ranks in (queries.reference, queries.deployed))
        for name in drawn:
            drawn[name].append(now[name] - before[name])
    return {
        name: change(name, float(whole[0][name][0]), float(whole[1][name][0]), np.concatenate(found))
        for name, found in drawn.items()
    }


def metrics(ranks: Indices, bins: Indices, weights: Floats) -> dict[str, Floats]:
    """R@K, mR@K and R@K of the small bin, in percent, with each query counted as often as a row of `weights` [S, Q]
    says: [S] each, NaN where a metric is undefined."""
    found: dict[str, Floats] = {}
    inside = np.stack([bins == number for number in range(BINS)], axis=1).astype(np.float64)  # [Q, bins]
    sizes = weights @ inside  # [S, bins]
    for cut in CUTS:
        hits = (ranks < cut).astype(np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            binned = 100 * (weights @ (inside * hits[:, None])) / sizes  # NaN for an empty bin
            found[f"r{cut}"] = 100 * (weights @ hits) / weights.sum(axis=1)
            harmonic = BINS / (1 / binned).sum(axis=1)
        found[f"mr{cut}"] = np.where((binned > 0).all(axis=1), harmonic, np.nan)
        found[f"small_r{cut}"] = binned[:, SMALL_BIN]
    return found


def change(name: str, reference: float, deployed: float, differences: Floats) -> Change:
    """A metric's two values and the interval of its resampled differences; None where it is undefined."""
    before, now = (None if np.isnan(value) else value for value in (reference, deployed))
    if before is None or now is None:
        why = "no query in the small bin" if name.startswith("small") else "a size bin has no query, or a recall of 0"
        return Change(before, now, None, None, None, why)
    defined = differences[~np.isnan(differences)]
    if len(defined) < len(differences) / 2:  # an interval over the rest would be one of other data
        return Change(before, now, now - before, None, None, "undefined in most resamples: a size bin is nearly empty")
    low, high = np.percentile(defined, [(100 - COVERAGE) / 2, (100 + COVERAGE) / 2]).tolist()
    return Change(before, now, now - before, low, high)
