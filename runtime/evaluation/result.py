"""What an evaluation found, and its JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from qpert.runtime.evaluation.inputs import EvaluationData
from qpert.runtime.evaluation.methods.choices import DEFAULT, Choices, Method, described
from qpert.runtime.evaluation.metrics import RetrievalMetrics
from qpert.runtime.evaluation.pair_scores import PairScores
from qpert.runtime.evaluation.published import Published, published_for
from qpert.runtime.inputs.perturbation import Perturbation


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Recall of one bundle on one split, in both directions, with and without re-ranking.

    metrics: of ITC + ITM (of ITC if nothing was re-ranked). itc: of ITC alone. scores: what both are computed from.
    seconds: of this process, by stage. resumed: images, texts and pairs computed by an earlier process. family: of the
    model. notice: what to know before the figures are believed, such as that the boxes' strength is not calibrated.
    method: what boxes are used for, with the choices that it depends on.
    """

    metrics: RetrievalMetrics
    itc: RetrievalMetrics
    scores: PairScores = field(repr=False)
    data: EvaluationData = field(repr=False)
    perturbation: Perturbation
    rerank: int
    seconds: dict[str, float]
    resumed: dict[str, int]
    family: str
    environment: dict[str, str] = field(default_factory=dict)
    notice: str | None = None
    method: Method = DEFAULT
    choices: Choices = field(default_factory=Choices)

    @property
    def itm_pairs(self) -> int:
        """Number of matched pairs: each pair on a shortlist of either direction, counted once."""
        return len(self.scores.schedule)

    @property
    def published(self) -> Published | None:
        return published_for(self.data.dataset, self.family)

    def to_dict(self) -> dict[str, Any]:
        """The form of `eval --json`: recalls in percent; undefined ones are None, with a `…_reason`."""
        whole = self.metrics.to_dict()
        alone = self.itc.to_dict()
        dataset, published = self.data.dataset, self.published
        return whole | {
            "itm_pairs": self.itm_pairs,
            "itc": {key: alone[key] for key in ("t2i", "i2t", "small")},
            "rerank": self.rerank,
            "dataset": {"root": str(dataset.root), "split": dataset.split},
            "boxes": self.data.boxes_from,
            "bin_boxes": self.data.bins_from,
            "perturbation": self.perturbation.to_dict(),
            "published": None if published is None else asdict(published),
            "seconds": {stage: round(value, 3) for stage, value in self.seconds.items()},
            "resumed": self.resumed,
            "environment": self.environment,
            "notice": self.notice,
            "method": described(self.method, self.choices),
        }
