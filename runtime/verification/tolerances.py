"""How far a bundle may differ from its reference, by precision: one table for tensors, one for ranks and recall."""

from __future__ import annotations

from dataclasses import dataclass

from qpert.runtime.bundle.roles import IMAGE_TOWER, PAIR_SCORER


@dataclass(frozen=True)
class Tolerance:
    """Limits of level `tensor` for one precision. None: reported but not judged.

    features_abs: of `image_embeds`, numbers of order 1 to 10. embeds_abs: of query and text embeddings, rows of unit
    length. itm_abs: of match logits. effect: of boxes, relative to their effect in the reference.
    """

    features_abs: float | None
    embeds_abs: float | None
    cosine_distance: float
    itm_abs: float
    neighbour_abs: float
    zero_weight_abs: float
    effect: float

    def max_abs(self, role: str) -> float | None:
        """The limit on the output of a graph of that role."""
        return {IMAGE_TOWER: self.features_abs, PAIR_SCORER: self.itm_abs}.get(role, self.embeds_abs)


TOLERANCES: dict[str, Tolerance] = {
    # float32 graphs sum in another order than PyTorch, about 1e-7 of the largest addend a product. Measured: features
    # 6e-6, embeddings 5e-7, match logits 2e-6 (demonstration; full size 5e-6, 2e-7); the limits are at least ten times
    # that. A single weight that is off by a hundredth usually causes a difference of 1e-5 or more.
    "fp32": Tolerance(1e-4, 2e-5, 1e-6, 2e-5, 1e-5, 1e-5, 1e-2),
    # 11 bits: steps of 5e-4. Retrieval uses the angle; scores are logits of order 1.
    "fp16": Tolerance(None, None, 1e-4, 2e-2, 5e-3, 5e-3, 0.2),
    # 8 bits: steps of 4e-3.
    "bf16": Tolerance(None, None, 1e-3, 2e-1, 5e-2, 5e-2, 0.5),
    # 256 steps over a range of some 12 standard deviations: rounding noise of 1.4 % of one, so 1 - cosine of 1e-4 a
    # product and 2.5e-3 after 25, more where outliers stretch the range (measured: 6e-4 on the demonstration, 5e-3 on a
    # random model of width 32). A float that changes by 1e-7 in another batch can round to the next step.
    "int8": Tolerance(None, None, 2e-2, 5e-1, 2e-2, 2e-2, 0.7),
    # E4M3 has 4 bits: steps of 6 to 12 %, noise of 2.6 %, 1 - cosine of 3.5e-4 a product and 1e-2 after 25.
    "fp8": Tolerance(None, None, 5e-2, 1.0, 5e-2, 5e-2, 0.8),
}
PERTURBED_COSINE_DISTANCE = {"fp32": 1e-6, "fp16": 1e-3, "bf16": 1e-2, "int8": 5e-2, "fp8": 1e-1}
"""With boxes, below float32: keys rounded to 11, 8 or fewer bits move contribution ratios across the threshold, and a
rank that flips changes one direction of one head. This cannot be avoided, so its effect on the angle is bounded here.
"""


@dataclass(frozen=True)
class RankLimits:
    """Limits of the levels `rank` and `recall` for one precision.

    itc, itm: how far a score may differ. far: percent of scores that may differ by more. first, order, decision:
    percent of first results, of pairs of candidates, and of ITM decisions that differ although the reference's scores
    are not a tie. r1: points of R@1.
    """

    itc: float
    itm: float
    first: float
    order: float
    decision: float
    r1: float
    far: float = 0

    @property
    def itc_tie(self) -> float:
        """Two candidates whose ITC scores differ by less than this may swap."""
        return 2 * self.itc

    @property
    def tie(self) -> float:
        """The same for final scores, ITM + ITC."""
        return 2 * (self.itc + self.itm)


RANK_LIMITS: dict[str, RankLimits] = {
    # The largest of 18,000 pairs of the demonstration: ITC 2e-6, ITM 1.2e-5. Ranks are the same wherever the scores
    # decide them.
    "fp32": RankLimits(itc=2e-5, itm=1e-4, first=0, order=0, decision=0, r1=0),
    # The largest of tens of thousands of pairs; measured on 2,000 pairs of the demonstration: ITC 7e-4, ITM 1.2e-2.
    "fp16": RankLimits(itc=5e-3, itm=5e-2, first=0, order=0, decision=0, r1=0.2),
    # Eight times the steps of fp16.
    "bf16": RankLimits(itc=4e-2, itm=4e-1, first=0, order=0, decision=0, r1=0.2),
    # Eight bits move scores by more than what separates neighbours: what is promised is recall. The differences are
    # noise with a long tail: of 31,000 pairs of the demonstration ITM has a root mean square of 0.29 (scores spread by
    # 3.8), 0.4 % are above 1 and the largest is 2.2. The largest of more pairs would be larger, the share would not.
    "int8": RankLimits(itc=2e-1, itm=1.0, first=1, order=1, decision=1, r1=0.5, far=1),
    "fp8": RankLimits(itc=3e-1, itm=1.5, first=2, order=2, decision=2, r1=0.5, far=2),
}
