"""Level `rank`: do the bundle and a live reference find the same things in the same order?

Scores are never equal to the last bit, so two candidates with similar scores may swap places, which means nothing. If
every score is within δ of the reference's, two candidates can only swap if the reference's scores of them differ by
less than 2δ: that is called a tie. δ is the limit of the precision, which is judged too (a gate on the largest
difference; below float16, where differences are noise, on the share beyond δ). It is not the observed difference, with
which no disagreement could ever be outside a tie.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from qpert.runtime.evaluation.pair_scores import PairScores
from qpert.runtime.retrieval.scores import ranking
from qpert.runtime.verification.result import Gate
from qpert.runtime.verification.tolerances import RankLimits

OVERLAPS = (10, 64)
COMPARED = 64
"""Candidates per query whose order is compared if there is no shortlist."""
Indices = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class DirectionScores:
    """One direction of one side: for each query all candidates in order, the shortlist, and the scores of both stages.

    itc: float32 [queries, candidates]. shortlist: int64 [queries, K], best ITC first. final: of a query's shortlist.
    """

    itc: Floats
    shortlist: Indices
    order: Callable[[int], Indices]
    final: Callable[[int], Floats]


@dataclass(frozen=True)
class QueryComparison:
    """One query. Ties are by the reference's scores; see the module.

    first: the first candidate, by the reference and here. gap: the difference of the reference's scores of these two.
    tied: whether the gap is a tie. shared: share of the K best in both, by K. tau: Kendall's τ of the reference's
    shortlist. pairs: compared pairs of candidates; moved: those in another order, or off the shortlist, outside ties.
    """

    first: tuple[int, int]
    gap: float
    tied: bool
    shared: dict[int, float]
    tau: float
    pairs: int
    moved: int

    @property
    def changed(self) -> bool:
        return self.first[0] != self.first[1]


@dataclass(frozen=True)
class RankComparison:
    """Both directions query by query, and the pairs that both sides matched.

    keys: int64 [P], image · T + text of those pairs; reference_itm and deployed_itm float32 [P]. itc_difference: the
    largest of all pairs; itc_far: percent of pairs that differ by more than the limit.
    """

    limits: RankLimits
    t2i: tuple[QueryComparison, ...]
    i2t: tuple[QueryComparison, ...]
    itc_difference: float
    itc_far: float
    keys: Indices = field(repr=False)
    reference_itm: Floats = field(repr=False)
    deployed_itm: Floats = field(repr=False)

    @property
    def itm_difference(self) -> float:
        return float(np.abs(self.reference_itm - self.deployed_itm).max(initial=0))

    @property
    def itm_far(self) -> float:
        """Percent of the pairs whose scores differ by more than the limit."""
        return share_beyond(self.reference_itm - self.deployed_itm, self.limits.itm)

    @property
    def flipped(self) -> int:
        """ITM decisions (match: the logit is above 0) that differ."""
        return int(np.count_nonzero((self.reference_itm > 0) != (self.deployed_itm > 0)))

    @property
    def flipped_outside(self) -> int:
        """Flipped decisions where the reference's logit is farther from 0 than a score may differ."""
        other = (self.reference_itm > 0) != (self.deployed_itm > 0)
        return int(np.count_nonzero(other & (np.abs(self.reference_itm) > self.limits.itm)))

    def gates(self) -> Iterator[Gate]:
        yield self._scores_gate("itc", self.itc_difference, self.itc_far, self.limits.itc)
        if len(self.keys):
            yield self._scores_gate("itm", self.itm_difference, self.itm_far, self.limits.itm)
        for name, queries in (("t2i", self.t2i), ("i2t", self.i2t)):
            changed = sum(query.changed and not query.tied for query in queries)
            moved, pairs = sum(query.moved for query in queries), sum(query.pairs for query in queries)
            yield Gate(f"{name}: other first result outside ties, %", percent(changed, len(queries)), self.limits.first)
            yield Gate(f"{name}: pairs in another order outside ties, %", percent(moved, pairs), self.limits.order)
        if not len(self.keys):
            return
        decisions = percent(self.flipped_outside, len(self.keys))
        yield Gate("itm: other decision outside ties, %", decisions, self.limits.decision)

    def _scores_gate(self, stage: str, largest: float, far: float, limit: float) -> Gate:
        """On the largest difference if none may exceed the limit, else on the share that does."""
        if not self.limits.far:
            return Gate(f"{stage}: largest difference of a score", largest, limit)
        return Gate(f"{stage}: scores farther off than {limit:g}, %", far, self.limits.far)

    def to_dict(self) -> dict[str, Any]:
        """For JSON; percentages 0 to 100."""
        ways = {name: summary(queries) for name, queries in (("t2i", self.t2i), ("i2t", self.i2t))}
        itm = {
            "pairs": len(self.keys),
            "flipped": self.flipped,
            "flipped_outside_ties": self.flipped_outside,
            "largest_difference": self.itm_difference,
            "far": self.itm_far,
        }
        ties = {"itc": self.limits.itc_tie, "final": self.limits.tie, "decision": self.limits.itm}
        itc = {"largest_difference": self.itc_difference, "far": self.itc_far}
        return ways | {"itm": itm, "itc": itc, "tie_widths": ties}


def compare_ranks(reference: PairScores, deployed: PairScores, limits: RankLimits) -> RankComparison:
    """Two sides that scored the same images and texts with shortlists of the same length."""
    keys, mine, theirs = np.intersect1d(
        reference.schedule.keys, deployed.schedule.keys, assume_unique=True, return_indices=True
    )
    if not len(reference.schedule):
        limits = replace(limits, itm=0)  # final scores are ITC's alone
    return RankComparison(
        limits,
        compare_way(text_to_image(reference), text_to_image(deployed), limits),
        compare_way(image_to_text(reference), image_to_text(deployed), limits),
        float(np.abs(reference.itc - deployed.itc).max()),
        share_beyond(reference.itc - deployed.itc, limits.itc),
        keys,
        reference.itm[mine],
        deployed.itm[theirs],
    )


def text_to_image(scores: PairScores) -> DirectionScores:
    if not len(scores.schedule):
        return first_stage(scores.itc.T)
    return DirectionScores(scores.itc.T, scores.schedule.by_text, scores.images_for, scores.t2i_scores_of)


def image_to_text(scores: PairScores) -> DirectionScores:
    if not len(scores.schedule):
        return first_stage(scores.itc)
    return DirectionScores(scores.itc, scores.schedule.by_image, scores.texts_for, scores.i2t_scores_of)


def first_stage(itc: Floats) -> DirectionScores:
    """One direction without re-ranking: the best `COMPARED` by ITC [queries, candidates], in that order."""
    orders = [ranking(row) for row in itc]
    shortlist = np.stack(orders)[:, :COMPARED]
    return DirectionScores(itc, shortlist, orders.__getitem__, lambda query: itc[query, shortlist[query]])


def compare_way(
    reference: DirectionScores, deployed: DirectionScores, limits: RankLimits
) -> tuple[QueryComparison, ...]:
    return tuple(compare_query(reference, deployed, query, limits) for query in range(len(reference.itc)))


def compare_query(
    reference: DirectionScores, deployed: DirectionScores, query: int, limits: RankLimits
) -> QueryComparison:
    """The orders of one query; see `QueryComparison`."""
    before, now = reference.order(query), deployed.order(query)
    shortlist = reference.shortlist[query]
    final = dict(zip(shortlist.tolist(), reference.final(query).tolist(), strict=True))
    place = np.empty(len(now), np.int64)
    place[now] = np.arange(len(now))
    best = before[: len(shortlist)]  # the shortlist by its final scores
    scores = np.array([final[candidate] for candidate in best.tolist()])
    left = set(shortlist.tolist()) - set(deployed.shortlist[query].tolist())
    edge = reference.itc[query, shortlist].min()
    gone = sum(reference.itc[query, candidate] - edge > limits.itc_tie for candidate in left)
    kept = np.array([candidate not in left for candidate in best.tolist()])
    outside = inversions(place[best[kept]], scores[kept], limits.tie)
    first = int(before[0]), int(now[0])
    if first[1] in final:
        gap, width = final[first[0]] - final[first[1]], limits.tie
    else:  # the reference did not match it: did a tie keep it off the shortlist?
        gap, width = float(edge - reference.itc[query, first[1]]), limits.itc_tie
    return QueryComparison(
        first,
        gap,
        gap <= width,
        {cut: shared(before, now, cut) for cut in OVERLAPS},
        kendall_tau(place[best]),
        len(best) * (len(best) - 1) // 2 + len(left),
        int(outside + gone),
    )


def inversions(places: Indices, scores: npt.NDArray[np.float64], width: float) -> int:
    """Pairs whose `scores` fall by more than `width` while their `places` do not rise."""
    swapped = places[:, None] > places[None, :]
    decided = scores[:, None] - scores[None, :] > width
    return int(np.count_nonzero(np.triu(swapped & decided, 1)))


def kendall_tau(places: Indices) -> float:
    """Kendall's τ between 0, 1, 2 … and `places`, which has no equal entries; 1 for fewer than two."""
    pairs = len(places) * (len(places) - 1) // 2
    discordant = np.count_nonzero(np.triu(places[:, None] > places[None, :], 1))
    return 1 - 2 * discordant / pairs if pairs else 1.0


def shared(before: Indices, now: Indices, cut: int) -> float:
    """Share of the `cut` best that are in both; of all candidates if there are fewer."""
    length = min(cut, len(before))
    return len(np.intersect1d(before[:length], now[:length])) / length


def share_beyond(differences: Floats, limit: float) -> float:
    """Percent of the differences that exceed the limit, or are NaN."""
    return percent(int(np.count_nonzero(~(np.abs(differences) <= limit))), differences.size)


def percent(part: float, whole: int) -> float:
    return 100 * part / whole if whole else 0.0


def summary(queries: tuple[QueryComparison, ...]) -> dict[str, Any]:
    """One direction, over its queries."""
    count = len(queries)
    changed = sum(query.changed for query in queries)
    values: dict[str, Any] = {
        "queries": count,
        "top1_agreement": percent(count - changed, count),
        "first_changed": changed,
        "first_changed_outside_ties": sum(query.changed and not query.tied for query in queries),
    }
    for cut in OVERLAPS:
        values[f"overlap_{cut}"] = percent(sum(query.shared[cut] for query in queries), count)
    values["kendall_tau"] = sum(query.tau for query in queries) / count
    values["kendall_tau_least"] = min(query.tau for query in queries)
    values["pairs"] = sum(query.pairs for query in queries)
    values["pairs_moved_outside_ties"] = sum(query.moved for query in queries)
    return values
