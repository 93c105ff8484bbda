"""The nearest images of a text among many, by the exact ITC score.

Two ways to the same answer. The exact scan multiplies everything in float32. The fast scan multiplies 8-bit codes,
whose score is off by no more than a bound that is known for each image, and then computes the exact score of every
image that the bound leaves possible: what it returns is what the exact scan returns, not an approximation of it (scores
may differ by float32 rounding, about 1e-7, as they do between two matrix products of different shapes).

The bound: with v = v̂ + e and t = t̂ + d (codes and what rounding lost), v·t − v̂·t̂ = e·t + v̂·d, so by Cauchy-Schwarz
|v·t − v̂·t̂| ≤ ‖e‖‖t‖ + ‖v̂‖‖d‖. ‖e‖ and ‖v̂‖ are kept for each query set, as the largest over its queries. An image with
several sets scores the best of them, and the largest of their bounds bounds it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qpert.runtime.errors import InputError
from qpert.runtime.gallery.products import best_products
from qpert.runtime.retrieval.query_sets import QuerySets, best_of_sets
from qpert.runtime.retrieval.scores import itc_scores_of_text, ranking

Floats = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]

IMAGE_LEVELS = 127
TEXT_LEVELS = 64
"""Codes are in ±127 (stored +128) and ±64: `products` says why."""
ROUNDING = 5e-5
"""What float32 sums of some hundred products may be off by, in either scan."""
FAST_FROM = 4096
"""Query sets from which the fast scan is used: below, the exact one takes a few milliseconds."""
SPARSE = 4
"""A filter that leaves fewer than one image in this many has its images copied and scanned alone."""
TEXTS_AT_ONCE = 256


@dataclass(frozen=True, eq=False)
class Codes:
    """R query sets in 8 bits. `codes` uint8 [R, Q, E]; `stats` float32 [R, 3]: scale, largest ‖e‖, largest ‖v̂‖."""

    codes: npt.NDArray[np.uint8]
    stats: Floats


def encode_codes(query_embeds: Floats) -> Codes:
    """float32 [R, Q, E] to 8 bits, with one scale a query set."""
    scale = np.maximum(np.abs(query_embeds).max(axis=(1, 2)) / IMAGE_LEVELS, np.finfo(np.float32).tiny)
    whole = np.rint(query_embeds / scale[:, None, None])  # [n, Q, E] in ±127
    decoded = whole * scale[:, None, None]
    lost = np.linalg.norm(query_embeds - decoded, axis=-1).max(axis=-1)
    kept = np.linalg.norm(decoded, axis=-1).max(axis=-1)
    return Codes((whole + 128).astype(np.uint8), np.stack([scale, lost, kept], axis=1).astype(np.float32))


@dataclass(frozen=True, eq=False)
class Nearest:
    """For each of T texts its best m images: `rows` int64 [T, m] and `scores` float32 [T, m], best first."""

    rows: Rows
    scores: Floats

    @classmethod
    def stack(cls, found: list[tuple[Rows, Floats]]) -> Nearest:
        return cls(np.stack([rows for rows, _ in found]), np.stack([scores for _, scores in found]))


def nearest(
    query_embeds: Floats,
    text_embeds: Floats,
    count: int,
    *,
    counts: Rows | None = None,
    codes: Codes | None = None,
    alive: npt.NDArray[np.bool_] | None = None,
    exact: bool = False,
) -> Nearest:
    """The best `count` images for each text, by score, then by row.

    Args:
        query_embeds: float32 [R, Q, E], the query sets of n images side by side; may be mapped from a file.
        text_embeds: float32 [T, E].
        count: at most this many; fewer where there are fewer images.
        counts: int64 [n], the query sets of each image; None is one each, R = n.
        codes: the same query sets in 8 bits; without them the exact scan is used.
        alive: bool [n], which rows count.
        exact: use the exact scan whatever the number of images.

    Raises:
        InputError: NaN among the embeddings, or shapes that do not fit.
    """
    if not np.isfinite(text_embeds).all():
        raise InputError(
            "the text embeddings hold NaN or infinity, which cannot be ranked; verify the bundle", code="scores-nan"
        )
    sets = QuerySets.single(query_embeds) if counts is None else QuerySets(query_embeds, counts)
    mask = np.ones(len(sets), bool) if alive is None else alive
    left = int(mask.sum())
    count = min(count, left)
    if not count:
        return Nearest(np.empty((len(text_embeds), 0), np.int64), np.empty((len(text_embeds), 0), np.float32))
    if SPARSE * left < len(sets) and left < FAST_FROM:  # after a filter: the others need not be read
        rows = np.flatnonzero(mask)
        found = nearest(sets.of(rows).vectors, text_embeds, count, counts=sets.counts[rows], exact=True)
        return Nearest(rows[found.rows], found.scores)
    fast = codes is not None and not exact and len(query_embeds) >= FAST_FROM and 4 * count < len(sets)
    best: list[tuple[Rows, Floats]] = []
    for start in range(0, len(text_embeds), TEXTS_AT_ONCE):
        texts = text_embeds[start : start + TEXTS_AT_ONCE]
        if fast and codes is not None:
            best += _fast(sets, codes, texts, count, mask)
        else:
            best += _exact(sets, texts, count, mask)
    return Nearest.stack(best)


def _exact(sets: QuerySets, texts: Floats, count: int, alive: npt.NDArray[np.bool_]) -> Iterator[Any]:
    scores = np.ascontiguousarray(sets.itc_scores(texts).T)  # [T, n]
    if np.isnan(scores[:, alive]).any():
        raise InputError(
            "ITC scores are NaN, which cannot be ranked; the image features are not numbers: encode again",
            code="scores-nan",
        )
    scores[:, ~alive] = -np.inf
    for row in scores:
        best = top(row, count)
        yield best, row[best]


def _fast(
    sets: QuerySets, codes: Codes, texts: Floats, count: int, alive: npt.NDArray[np.bool_]
) -> Iterator[tuple[Rows, Floats]]:
    text_codes, scale, lost = _encode_texts(texts)
    products = best_products(codes.codes, text_codes)  # [T, R]
    set_scale, set_lost, set_kept = np.ascontiguousarray(codes.stats.T)
    for index, text in enumerate(texts):
        bound = set_lost * np.linalg.norm(text) + set_kept * lost[index] + ROUNDING
        upper = products[index] * (set_scale * scale[index]) + bound
        if not sets.is_single:
            upper = best_of_sets(upper, sets.starts)
        upper[~alive] = -np.inf
        yield _rescored(sets, text, upper, count)


def _rescored(sets: QuerySets, text: Floats, upper: Floats, count: int) -> tuple[Rows, Floats]:
    """The best `count` by exact score, given what no image's score can exceed.

    The exact scores of the most promising give a floor, the `count`-th best of them; whatever cannot reach it is out.
    """
    first = np.argpartition(-upper, min(max(2 * count, 128), len(upper) - 1))[: max(2 * count, 128)]
    first = first[upper[first] > -np.inf]  # where few images are left, deleted ones are among them
    scores = _exact_scores(sets, first, text)
    floor = np.partition(scores, len(scores) - count)[len(scores) - count]
    possible = upper >= floor
    possible[first] = False
    others = np.flatnonzero(possible)
    rows = np.concatenate([first, others])
    scores = np.concatenate([scores, _exact_scores(sets, others, text)])
    in_order = np.argsort(rows)  # ties go to the lower row
    rows, scores = rows[in_order], scores[in_order]
    best = top(scores, count)
    return rows[best], scores[best]


def _exact_scores(sets: QuerySets, rows: Rows, text: Floats) -> Floats:
    if not len(rows):
        return np.empty(0, np.float32)
    part = sets.of(np.sort(rows))
    scores = itc_scores_of_text(part.vectors, text)
    if not part.is_single:
        scores = best_of_sets(scores, part.starts)
    if np.isnan(scores).any():
        raise InputError(
            "ITC scores are NaN, which cannot be ranked; the image features are not numbers: encode again",
            code="scores-nan",
        )
    return scores[np.argsort(np.argsort(rows))]


def top(scores: Floats, count: int) -> Rows:
    """Indices of the best `count`, best first; ties go to the lower index."""
    if count < 1:
        return np.empty(0, np.int64)
    floor = np.partition(scores, len(scores) - count)[len(scores) - count]
    candidates = np.flatnonzero(scores >= floor)
    return np.asarray(candidates[ranking(scores[candidates])][:count])


def _encode_texts(texts: Floats) -> tuple[npt.NDArray[np.int8], Floats, Floats]:
    """int8 [E, T] in ±64, the scale of each text, and the norm of what rounding lost."""
    scale = np.maximum(np.abs(texts).max(axis=1) / TEXT_LEVELS, np.finfo(np.float32).tiny)
    whole = np.rint(texts / scale[:, None])
    lost = np.linalg.norm(texts - whole * scale[:, None], axis=1)
    return np.ascontiguousarray(whole.astype(np.int8).T), scale.astype(np.float32), lost.astype(np.float32)
