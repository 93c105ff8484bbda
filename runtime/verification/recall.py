"""Level `recall`: how much the bundle's recall differs from the reference's, and whether that is more than chance.

Intervals come from `qpert.runtime.evaluation.bootstrap`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qpert.runtime.evaluation import bootstrap
from qpert.runtime.evaluation.bootstrap import Floats, Hits, Indices, Score
from qpert.runtime.evaluation.metrics import CUTS
from qpert.runtime.verification.ranks import QueryComparison
from qpert.runtime.verification.result import Gate
from qpert.runtime.verification.tolerances import RANK_LIMITS, RankLimits

SCORES: dict[str, Score] = {"r": "r1", "mr": "mr1", "small_r": "small"}
"""Prefix of a metric's name, before the cut → its score."""


@dataclass(frozen=True)
class Change:
    """One metric in percent, by the reference and here; difference and interval in points. Undefined ones are None,
    with a `reason`."""

    reference: float | None
    deployed: float | None
    difference: float | None
    low: float | None
    high: float | None
    reason: str | None = None


@dataclass(frozen=True)
class RecallComparison:
    """Both directions: `r1` … `mr10`, `small_r1` … by name. decided_r1: the change of R@1 in points, without
    queries whose two first results are a tie even in float32."""

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
        return changes | {"images": self.images, "resamples": self.resamples, "interval_percent": bootstrap.LEVEL}


def compare_recall(
    reference: tuple[Indices, Indices],
    deployed: tuple[Indices, Indices],
    ties: tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]],
    *,
    image_of_text: Indices,
    largest_areas: Floats,
    resamples: int = bootstrap.RESAMPLES,
) -> RecallComparison:
    """Both sides' ranks from 0: int64 [T] of each text's image, int64 [B] of each image's first own text.

    ties: bool [T] and [B], queries whose change does not count; see `rounding_ties`.
    """
    texts, images = zip(reference, deployed, strict=True)
    t2i = {cut: Hits.of_texts(texts, image_of_text, largest_areas, cut=cut) for cut in CUTS}
    i2t = {cut: Hits.of_images(images, largest_areas, cut=cut) for cut in CUTS}
    return RecallComparison(
        changes(t2i, resamples),
        changes(i2t, resamples),
        {"t2i": decided_change(*texts, ties[0]), "i2t": decided_change(*images, ties[1])},
        len(largest_areas),
        resamples,
    )


def rounding_ties(queries: tuple[QueryComparison, ...]) -> npt.NDArray[np.bool_]:
    """Queries whose first result differs although the reference's scores of both are a tie even in float32, which is
    not the fault of a precision (two captions with the same words, for example)."""
    width = RANK_LIMITS["fp32"].tie
    return np.array([query.changed and query.gap <= width for query in queries], dtype=np.bool_)


def decided_change(reference: Indices, deployed: Indices, tied: npt.NDArray[np.bool_]) -> float:
    """|ΔR@1| in points, without changes of `tied` queries."""
    change = (deployed < 1).astype(np.float64) - (reference < 1)
    return float(abs(100 * np.where(tied, 0, change).mean()))


def changes(hits: Mapping[int, Hits], resamples: int) -> dict[str, Change]:
    """Every metric of one direction with its interval. hits: of both sides, the reference's first, by cut."""
    images = len(hits[CUTS[0]].bins)
    wanted = {f"{name}{cut}": (hits[cut], score) for cut in CUTS for name, score in SCORES.items()}
    drawn: dict[str, list[Floats]] = {name: [] for name in wanted}
    for part in bootstrap.draws(images, resamples):
        for name, (one, score) in wanted.items():
            drawn[name].append(np.diff(bootstrap.scores(one, part, score, every_bin=True))[:, 0])
    whole = {
        name: bootstrap.scores(one, bootstrap.once(images), score, every_bin=True)[0]
        for name, (one, score) in wanted.items()
    }
    return {
        name: change(name, float(whole[name][0]), float(whole[name][1]), np.concatenate(found))
        for name, found in drawn.items()
    }


def change(name: str, reference: float, deployed: float, differences: Floats) -> Change:
    """A metric's two values and the interval of its resampled differences; None if undefined."""
    before, now = (None if np.isnan(value) else value for value in (reference, deployed))
    if before is None or now is None:
        why = "no query in the small bin" if name.startswith("small") else "a size bin has no query, or a recall of 0"
        return Change(before, now, None, None, None, why)
    found = bootstrap.paired_interval(differences)
    if found is None:
        return Change(before, now, now - before, None, None, "undefined in most resamples: a size bin is nearly empty")
    return Change(before, now, now - before, *found)
