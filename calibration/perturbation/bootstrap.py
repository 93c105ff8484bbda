"""How much of a difference between settings is chance: a paired bootstrap over the images of the split.

Images are drawn with replacement, each with its captions (which are not independent of one another); every setting is
scored on the same draws. That the best of many settings was picked because it came out best is accounted for by White's
reality check (H. White, "A reality check for data snooping", Econometrica 68, 1097, 2000): how often would the best of
so many settings gain as much if none of them helped?
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
"""Percent of the draws that an interval holds."""
DRAWS_AT_ONCE = 250

Score = Literal["mr1", "r1", "small"]
Direction = Literal["t2i", "i2t"]
Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Hits:
    """Who finds at rank one. hits float64 [B, S]: hits of each image's queries under S settings; queries [B]; bins [B],
    −1 for an image without boxes."""

    hits: Floats = field(repr=False)
    queries: Floats = field(repr=False)
    bins: Indices = field(repr=False)

    @classmethod
    def of_texts(cls, ranks: Sequence[Indices], image_of_text: Indices, largest_areas: Floats) -> Hits:
        """Text to image: every caption is a query of its image. ranks: int64 [T] of each setting."""
        bins = size_bins(largest_areas)
        counts = np.bincount(image_of_text, minlength=len(bins))
        found = [np.bincount(image_of_text, weights=one == 0, minlength=len(bins)) for one in ranks]
        return cls(np.stack(found, axis=1), counts.astype(np.float64), bins)

    @classmethod
    def of_images(cls, ranks: Sequence[Indices], largest_areas: Floats) -> Hits:
        """Image to text: every image is one query. ranks: int64 [B] of each setting."""
        found = np.stack([one == 0 for one in ranks], axis=1).astype(np.float64)
        return cls(found, np.ones(len(found)), size_bins(largest_areas))


def scores(hits: Hits, draws: Floats, score: Score) -> Floats:
    """float64 [R, S], in percent: `draws` [R, B] says how often each image was drawn.

    r1 is R@1; small is R@1 of the images whose largest box covers less than a tenth; mr1 is the harmonic mean of the
    ten bins' R@1, 0 where one of them is 0. A bin of which a draw has no image is left out of that draw's mean; a draw
    without any image that counts is NaN.
    """
    if score == "r1":
        return _recall(hits, draws, np.ones(len(hits.bins), np.bool_))
    if score == "small":
        return _recall(hits, draws, hits.bins == SMALL_BIN)
    with np.errstate(divide="ignore"):
        inverse = np.stack([1 / _recall(hits, draws, hits.bins == number) for number in range(BINS)])
    drawn = ~np.isnan(inverse)
    count = drawn.sum(axis=0)
    return np.where(count > 0, count / np.maximum(np.where(drawn, inverse, 0).sum(axis=0), 1e-300), np.nan)


def _recall(hits: Hits, draws: Floats, chosen: npt.NDArray[np.bool_]) -> Floats:
    part = draws[:, chosen]
    queries = (part @ hits.queries[chosen])[:, None]
    return 100 * (part @ hits.hits[chosen]) / np.where(queries > 0, queries, np.nan)


@dataclass(frozen=True)
class Spread:
    """What the draws say of the best setting, in points of the score.

    standard_error: of the best one's score. gain_interval: of its gain over no perturbation, without regard to its
    having been picked. chance: how often the best of all settings would gain this much if none helped (the reality
    check, between 0 and 1). within_noise: for each setting, whether its difference to the best is within its interval.
    """

    standard_error: float
    gain_interval: tuple[float, float]
    chance: float
    within_noise: tuple[bool, ...]


def spread(hits: Hits, score: Score, best: int, *, none: int, resamples: int = RESAMPLES, seed: int = SEED) -> Spread:
    """The spread of a search; `best` and `none` are columns of `hits`. The same seed gives the same numbers."""
    once = scores(hits, np.ones((1, len(hits.bins))), score)  # [1, S]
    drawn = np.concatenate([scores(hits, draws, score) for draws in _draws(len(hits.bins), resamples, seed)])
    drawn = drawn[~np.isnan(drawn[:, best])]  # a draw without any image that counts says nothing
    tail = (100 - LEVEL) / 2
    to_best = drawn - drawn[:, [best]]
    low, high = np.percentile(to_best, [tail, 100 - tail], axis=0)
    gain = drawn - drawn[:, [none]]
    observed = once - once[:, [none]]
    by_chance = np.max(gain - observed, axis=1)  # what the best gains when the gains are moved to zero
    interval = np.percentile(gain[:, best], [tail, 100 - tail])
    return Spread(
        float(np.std(drawn[:, best])),
        (float(interval[0]), float(interval[1])),
        float(np.mean(by_chance >= observed[0, best])),
        tuple(bool(inside) for inside in (low <= 0) & (high >= 0)),
    )


def _draws(images: int, resamples: int, seed: int) -> Iterator[Floats]:
    """[R, B] in parts: how often each image was drawn, `images` times with replacement."""
    rng = np.random.default_rng(seed)
    for start in range(0, resamples, DRAWS_AT_ONCE):
        count = min(DRAWS_AT_ONCE, resamples - start)
        yield rng.multinomial(images, np.full(images, 1 / images), size=count).astype(np.float64)
