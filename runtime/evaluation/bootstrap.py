"""How much of a difference in recall is chance: a paired bootstrap over the images of a split.

Images are drawn with replacement, each with all its captions (which are not independent of one another); both sides, or
all settings, are scored on the same draws. Intervals are percentile intervals (Efron and Tibshirani, An Introduction to
the Bootstrap, 1993, chapter 13). White's reality check (H. White, "A reality check for data snooping", Econometrica 68,
1097, 2000) corrects for picking the best of many settings: how often would the best of that many settings gain as much
if none of them helped?
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from qpert.runtime.evaluation.metrics import BINS, SMALL_BIN, size_bins

RESAMPLES = 2000
SEED = 0
LEVEL = 95
"""Percent of the draws inside an interval."""
DRAWS_AT_ONCE = 250

Score = Literal["mr1", "r1", "small", "mean_filled"]
Direction = Literal["t2i", "i2t"]
Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Hits:
    """Queries that find their target among the first. hits float64 [B, S]: of each image's queries on S sides or under
    S settings; queries [B]; bins [B], −1 for an image without boxes."""

    hits: Floats = field(repr=False)
    queries: Floats = field(repr=False)
    bins: Indices = field(repr=False)

    @classmethod
    def of_texts(cls, ranks: Sequence[Indices], image_of_text: Indices, largest_areas: Floats, *, cut: int = 1) -> Hits:
        """Text to image: every caption is a query of its image. ranks: int64 [T] of each side, counted from 0."""
        bins = size_bins(largest_areas)
        counts = np.bincount(image_of_text, minlength=len(bins))
        found = [np.bincount(image_of_text, weights=one < cut, minlength=len(bins)) for one in ranks]
        return cls(np.stack(found, axis=1), counts.astype(np.float64), bins)

    @classmethod
    def of_images(cls, ranks: Sequence[Indices], largest_areas: Floats, *, cut: int = 1) -> Hits:
        """Image to text: every image is one query. ranks: int64 [B] of each side, counted from 0."""
        found = np.stack([one < cut for one in ranks], axis=1).astype(np.float64)
        return cls(found, np.ones(len(found)), size_bins(largest_areas))


def scores(hits: Hits, draws: Floats, score: Score, *, every_bin: bool = False) -> Floats:
    """float64 [R, S], in percent: `draws` [R, B] counts how often each image was drawn.

    r1 is recall at the cut of `hits`; small is that of the images whose largest box covers less than a tenth; mr1 is
    the harmonic mean of the ten bins' recalls. A draw without any image that counts is NaN. A bin without
    images in a draw is left out of that draw's mean, and the mean is 0 if any bin's recall is 0; with `every_bin` the
    mean is NaN in both cases, where the metric itself is undefined. mean_filled is the arithmetic mean over the bins
    that have images in a draw.
    """
    if score == "r1":
        return _recall(hits, draws, np.ones(len(hits.bins), np.bool_))
    if score == "small":
        return _recall(hits, draws, hits.bins == SMALL_BIN)
    binned = np.stack([bin_recall(hits, draws, number) for number in range(BINS)])  # [bins, R, S]
    drawn = ~np.isnan(binned)
    count = drawn.sum(axis=0)
    if score == "mean_filled":
        return np.where(count > 0, np.where(drawn, binned, 0).sum(axis=0) / np.maximum(count, 1), np.nan)
    with np.errstate(divide="ignore"):
        total = np.where(drawn, 1 / np.where(drawn, binned, 1), 0).sum(axis=0)
    defined = (drawn & (binned > 0)).all(axis=0) if every_bin else count > 0
    return np.where(defined, count / np.maximum(total, 1e-300), np.nan)


def bin_recall(hits: Hits, draws: Floats, number: int) -> Floats:
    """float64 [R, S], in percent: recall of the images of one size bin; NaN in a draw without any."""
    return _recall(hits, draws, hits.bins == number)


def _recall(hits: Hits, draws: Floats, chosen: npt.NDArray[np.bool_]) -> Floats:
    part = draws[:, chosen]
    queries = (part @ hits.queries[chosen])[:, None]
    return 100 * (part @ hits.hits[chosen]) / np.where(queries > 0, queries, np.nan)


def once(images: int) -> Floats:
    """[1, B]: the split itself, every image drawn once."""
    return np.ones((1, images))


def draws(images: int, resamples: int = RESAMPLES, seed: int = SEED) -> Iterator[Floats]:
    """[R, B] in parts: how often each image was drawn, `images` times with replacement."""
    rng = np.random.default_rng(seed)
    for start in range(0, resamples, DRAWS_AT_ONCE):
        count = min(DRAWS_AT_ONCE, resamples - start)
        yield rng.multinomial(images, np.full(images, 1 / images), size=count).astype(np.float64)


def interval(values: Floats) -> tuple[float, float]:
    """The percentiles between which `LEVEL` % of the values are."""
    low, high = np.percentile(values, [(100 - LEVEL) / 2, (100 + LEVEL) / 2]).tolist()
    return low, high


def paired_interval(differences: Floats) -> tuple[float, float] | None:
    """The interval of resampled differences, without the draws in which they are undefined; None if most are: an
    interval over the rest would describe other data."""
    defined = differences[~np.isnan(differences)]
    return None if len(defined) < len(differences) / 2 else interval(defined)


@dataclass(frozen=True)
class Uncertainty:
    """What the draws show about the best setting, in points of the score.

    standard_error: of the best setting's score. gain_interval: of its gain over no perturbation, not corrected for
    its selection. p_value: how often the best of all settings would gain this much if none helped (the reality
    check, between 0 and 1). within_noise: for each setting, whether its difference to the best is within its interval.
    """

    standard_error: float
    gain_interval: tuple[float, float]
    p_value: float
    within_noise: tuple[bool, ...]


def mean_scores(directions: Sequence[Hits], draws: Floats, score: Score) -> Floats:
    """`scores` of one direction, or the mean of those of several on the same draws: float64 [R, S]."""
    return np.asarray(np.mean([scores(hits, draws, score) for hits in directions], axis=0))


def uncertainty(
    directions: Sequence[Hits], score: Score, best: int, *, none: int, resamples: int = RESAMPLES, seed: int = SEED
) -> Uncertainty:
    """The uncertainty of a search judged by the mean score of `directions`; `best` and `none` are columns of their
    hits. The same seed gives the same numbers."""
    images = len(directions[0].bins)
    whole = mean_scores(directions, once(images), score)  # [1, S]
    drawn = np.concatenate([mean_scores(directions, part, score) for part in draws(images, resamples, seed)])
    drawn = drawn[~np.isnan(drawn[:, best])]  # a draw without any image that counts has no score
    to_best = (drawn - drawn[:, [best]]).T
    gain, observed = drawn - drawn[:, [none]], whole - whole[:, [none]]
    by_chance = np.max(gain - observed, axis=1)  # what the best gains when the gains are moved to zero
    return Uncertainty(
        float(np.std(drawn[:, best])),
        interval(gain[:, best]),
        float(np.mean(by_chance >= observed[0, best])),
        tuple(low <= 0 <= high for low, high in map(interval, to_best)),
    )
