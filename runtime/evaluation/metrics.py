"""Recall of image-text retrieval, over all queries and by object size. One definition for every command.

Source of mR@K and the small bin: Sogi, Shibata, Terao, ECCV 2024, section 5. Ties are ranked by index (the lower first)
and NaN is an error, as in `qpert.runtime.retrieval.scores.ranking`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import harmonic_mean
from typing import Any

import numpy as np
import numpy.typing as npt

from qpert.runtime.inputs.boxes import Boxes

CUTS = (1, 5, 10)
BINS = 10
SMALL_BIN = 0
"""The bin of images whose largest box covers less than a tenth of them: "small", the paper's "~10%"."""
DIRECTIONS = {"t2i": "text → image", "i2t": "image → text"}
"""Key of each direction in JSON → its name in reports."""

Scores = npt.NDArray[np.floating]
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class BinRecall:
    """R@K, in percent, of the queries of one size bin. Without queries the recalls are None."""

    images: int
    queries: int
    recall: dict[int, float | None]


@dataclass(frozen=True)
class DirectionMetrics:
    """One direction, text to image or image to text; all in percent.

    recall: R@K over all queries. mean_recall: mR@K, the harmonic mean of R@K over the ten bins; None where a bin is
    empty or has a recall of 0, with `reasons[K]`. mean_of_filled_bins: the arithmetic mean over the bins that have
    queries, which is always defined but is not the paper's metric.
    """

    queries: int
    recall: dict[int, float | None]
    bins: tuple[BinRecall, ...]
    mean_recall: dict[int, float | None]
    reasons: dict[int, str]
    mean_of_filled_bins: dict[int, float | None]

    def to_dict(self) -> dict[str, Any]:
        """r1, r5, r10, mr1, mr5, mr10; for each None a `…_reason`, and for mR@K mean_filled_… as an alternative."""
        values: dict[str, Any] = {"queries": self.queries}
        for cut, value in self.recall.items():
            values[f"r{cut}"] = value
            if value is None:
                values[f"r{cut}_reason"] = "no queries"
        for cut, value in self.mean_recall.items():
            values[f"mr{cut}"] = value
            if cut in self.reasons:
                values[f"mr{cut}_reason"] = self.reasons[cut]
                values[f"mean_filled_{cut}"] = self.mean_of_filled_bins[cut]
        return values


@dataclass(frozen=True)
class RetrievalMetrics:
    """Both directions. `unbinned`: images without boxes, which count in R@K but in no bin."""

    t2i: DirectionMetrics
    i2t: DirectionMetrics
    images: int
    texts: int
    unbinned: int

    def to_dict(self) -> dict[str, Any]:
        """The form of `eval --json`: t2i, i2t, small, bins and counts."""
        small = {name: _bin_dict(way.bins[SMALL_BIN]) for name, way in (("t2i", self.t2i), ("i2t", self.i2t))}
        own = self.t2i.bins[SMALL_BIN]
        return {
            "t2i": self.t2i.to_dict(),
            "i2t": self.i2t.to_dict(),
            "small": {**small, "images": own.images, "queries": own.queries},
            "bins": [
                {"images": t2i.images, "t2i": _bin_dict(t2i), "i2t": _bin_dict(i2t)}
                for t2i, i2t in zip(self.t2i.bins, self.i2t.bins, strict=True)
            ],
            "images": self.images,
            "texts": self.texts,
            "unbinned": self.unbinned,
        }


def retrieval_metrics(
    t2i_scores: Scores, i2t_scores: Scores, *, image_of_text: Indices, largest_areas: npt.NDArray[np.float64]
) -> RetrievalMetrics:
    """All metrics of a split.

    Args:
        t2i_scores, i2t_scores: [B, T], images × texts; the same array where both directions share their scores.
        image_of_text: int64 [T].
        largest_areas: [B], see `largest_area`; NaN for images without boxes.

    Raises:
        ValueError: NaN among the scores, an image without text, or areas outside [0, 1].
    """
    t2i = text_to_image_ranks(t2i_scores, image_of_text)
    i2t = image_to_text_ranks(i2t_scores, image_of_text)
    return metrics_of_ranks(t2i, i2t, image_of_text=image_of_text, largest_areas=largest_areas)


def metrics_of_ranks(
    t2i_ranks: Indices, i2t_ranks: Indices, *, image_of_text: Indices, largest_areas: npt.NDArray[np.float64]
) -> RetrievalMetrics:
    """All metrics of a split from its ranks, counted from 0: int64 [T] of each text's image, int64 [B] of each image's
    first own text. Other arguments as in `retrieval_metrics`."""
    bins = size_bins(largest_areas)
    return RetrievalMetrics(
        t2i=direction_metrics(t2i_ranks, bins[image_of_text], bins),
        i2t=direction_metrics(i2t_ranks, bins, bins),
        images=len(bins),
        texts=len(image_of_text),
        unbinned=int((bins < 0).sum()),
    )


def text_to_image_ranks(scores: Scores, image_of_text: Indices) -> Indices:
    """int64 [T]: the rank, from 0, of each text's image. scores [B, T]."""
    _check_scores(scores)
    texts = np.arange(scores.shape[1])
    return _ranks(scores.T, image_of_text, scores[image_of_text, texts])


def image_to_text_ranks(scores: Scores, image_of_text: Indices) -> Indices:
    """int64 [B]: the rank, from 0, of each image's first own text. scores [B, T]."""
    _check_scores(scores)
    own = image_of_text[None, :] == np.arange(len(scores))[:, None]  # [B, T]
    if not own.any(axis=1).all():
        raise ValueError(f"image {int(np.argmin(own.any(axis=1)))} has no text; expected at least one for each image")
    first = np.where(own, scores, -np.inf).argmax(axis=1)  # of equal own texts the lowest index
    first = np.where(own[np.arange(len(own)), first], first, own.argmax(axis=1))  # where all own texts score -inf
    return _ranks(scores, first, scores[np.arange(len(scores)), first])


def recall(ranks: Indices) -> dict[int, float | None]:
    """R@K in percent for K of `CUTS`: the share of ranks below K. None without queries."""
    return {cut: float(100 * np.mean(ranks < cut)) if len(ranks) else None for cut in CUTS}


def largest_area(boxes: Boxes | None) -> float:
    """The largest box area over the image's area; NaN for an image without boxes (the release counts it as small)."""
    return float(boxes.areas.max()) if boxes is not None and len(boxes) else float("nan")


def size_bins(largest_areas: npt.NDArray[np.float64]) -> Indices:
    """int64 [B]: [0, 0.1) is bin 0 … [0.9, 1] is bin 9 (the release drops an area of exactly 1); NaN is in none, −1."""
    areas = np.asarray(largest_areas, np.float64)
    known = ~np.isnan(areas)
    if not ((areas[known] >= 0) & (areas[known] <= 1)).all():
        raise ValueError("largest areas must be shares of the image, between 0 and 1")
    edges = np.arange(1, BINS) / BINS
    return np.where(known, np.searchsorted(edges, areas, side="right"), -1).astype(np.int64)


def direction_metrics(ranks: Indices, bin_of_query: Indices, bin_of_image: Indices) -> DirectionMetrics:
    """The metrics of one direction from its queries' ranks; `bin_of_image` is only counted."""
    bins = []
    for number in range(BINS):
        chosen = ranks[bin_of_query == number]
        bins.append(BinRecall(int((bin_of_image == number).sum()), len(chosen), recall(chosen)))
    means, reasons, filled = {}, {}, {}
    for cut in CUTS:
        means[cut], reason = _harmonic_mean(bins, cut)
        if reason:
            reasons[cut] = reason
        values = [value for one in bins if (value := one.recall[cut]) is not None]
        filled[cut] = sum(values) / len(values) if values else None
    return DirectionMetrics(len(ranks), recall(ranks), tuple(bins), means, reasons, filled)


def _harmonic_mean(bins: Sequence[BinRecall], cut: int) -> tuple[float | None, str | None]:
    """The value, or None and the reason."""
    counts = ", ".join(str(one.queries) for one in bins)
    empty = [number for number, one in enumerate(bins) if not one.queries]
    if empty:
        return None, f"no queries in size bin {_listed(empty)} (queries per bin: {counts})"
    values = [one.recall[cut] or 0.0 for one in bins]
    zero = [number for number, value in enumerate(values) if value == 0]
    if zero:
        return None, f"R@{cut} is 0 in size bin {_listed(zero)} (queries per bin: {counts})"
    return harmonic_mean(values), None  # exact sums, so that a hundred ten times is a hundred


def _listed(numbers: list[int]) -> str:
    return ", ".join(f"{number / BINS:g}–{(number + 1) / BINS:g}" for number in numbers)


def _bin_dict(one: BinRecall) -> dict[str, Any]:
    return {**{f"r{cut}": value for cut, value in one.recall.items()}, "queries": one.queries}


def _ranks(scores: Scores, targets: Indices, own: Scores) -> Indices:
    """For each row of [R, C], how many columns precede its target: higher ones, and equal ones with a lower index."""
    columns = np.arange(scores.shape[1])
    ranks = np.empty(len(scores), np.int64)
    for row, (values, target, value) in enumerate(zip(scores, targets, own, strict=True)):
        ranks[row] = np.count_nonzero(values > value) + np.count_nonzero((values == value) & (columns < target))
    return ranks


def _check_scores(scores: Scores) -> None:
    if scores.ndim != 2:
        raise ValueError(f"scores have shape {list(scores.shape)}; expected [images, texts]")
    if np.isnan(scores).any():
        raise ValueError(f"{int(np.isnan(scores).sum())} of {scores.size} scores are NaN, which cannot be ranked")
