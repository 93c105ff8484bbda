"""The result of a search: which setting is best, by how much, and whether that is more than chance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from qpert.calibration.perturbation.grid import Grid, Setting
from qpert.calibration.perturbation.search import SearchResult, Trial
from qpert.runtime.errors import InputError
from qpert.runtime.evaluation.bootstrap import Direction, Hits, Score, Uncertainty, uncertainty
from qpert.runtime.evaluation.inputs import EvaluationData
from qpert.runtime.evaluation.metrics import BINS, SMALL_BIN, DirectionMetrics, RetrievalMetrics, size_bins
from qpert.runtime.inputs.perturbation import WEIGHT_FUNCTIONS, Perturbation

SCORE_NAMES: dict[Score, str] = {"mr1": "mR@1", "r1": "R@1", "small": "small R@1"}


JudgedBy = Direction | Literal["both"]
"""The direction whose score is maximised, or the mean of both."""


def score_of(metrics: RetrievalMetrics, score: Score, direction: JudgedBy) -> float:
    """One number of a direction, in percent, or the mean of both; mR@1 is 0, its limit, if a bin's R@1 is 0."""
    if direction == "both":
        return (score_of(metrics, score, "t2i") + score_of(metrics, score, "i2t")) / 2
    way: DirectionMetrics = getattr(metrics, direction)
    found = {"mr1": way.mean_recall[1], "r1": way.recall[1], "small": way.bins[SMALL_BIN].recall[1]}[score]
    return 0.0 if found is None else found


def check_score(data: EvaluationData, score: Score) -> None:
    """Raise InputError if the score is undefined on this split for every setting."""
    bins = size_bins(data.largest_areas)
    if score == "small" and not (bins == SMALL_BIN).any():
        raise InputError(
            "no image's largest box is below a tenth of it, so there is no small bin; use --score r1",
            code="no-small-bin",
        )
    empty = [number for number in range(BINS) if not (bins == number).any()]
    if score == "mr1" and empty:
        counts = ", ".join(str(int((bins == number).sum())) for number in range(BINS))
        raise InputError(
            f"mR@1 is the mean over ten size bins, and {len(empty)} of them have no image (images per bin: {counts}); "
            "use --score r1, or a larger split",
            code="empty-size-bin",
        )


@dataclass(frozen=True, eq=False)
class Calibration:
    """A search judged by one score. `best` is the highest of the grid, even if no perturbation scores higher."""

    result: SearchResult = field(repr=False)
    data: EvaluationData = field(repr=False)
    grid: Grid
    exported: Perturbation
    score: Score
    direction: JudgedBy
    rerank: int
    best: Setting
    uncertainty: Uncertainty
    environment: dict[str, str] = field(default_factory=dict)

    @classmethod
    def judge(
        cls,
        result: SearchResult,
        data: EvaluationData,
        grid: Grid,
        exported: Perturbation,
        *,
        score: Score = "mr1",
        direction: JudgedBy = "t2i",
        rerank: int = 0,
    ) -> Calibration:
        """Choose the best setting; see `ordered` for ties."""
        check_score(data, score)
        best = ordered(result.trials, score, direction)[0]
        every = [*result.trials.values(), result.none]
        owners, areas = data.dataset.image_of_caption, data.largest_areas
        hits = []
        if direction != "i2t":
            hits.append(Hits.of_texts([trial.t2i_ranks for trial in every], owners, areas))
        if direction != "t2i":
            hits.append(Hits.of_images([trial.i2t_ranks for trial in every], areas))
        found = uncertainty(hits, score, list(result.trials).index(best), none=len(every) - 1)
        return cls(result, data, grid, exported, score, direction, rerank, best, found)

    @property
    def best_perturbation(self) -> Perturbation:
        return self.best.perturbation(self.exported)

    @property
    def gain(self) -> float:
        """Points by which the best setting beats no perturbation."""
        return self.value(self.result.trials[self.best]) - self.value(self.result.none)

    @property
    def improves(self) -> bool:
        """Whether the best setting scores higher than no perturbation."""
        return self.gain > 0

    @property
    def within_noise(self) -> int:
        """Settings other than the best whose difference to it is within the interval of chance."""
        return sum(inside for setting, inside in self._noise().items() if setting != self.best)

    @property
    def none_within_noise(self) -> bool:
        return self.uncertainty.within_noise[-1]

    def value(self, trial: Trial) -> float:
        return score_of(trial.metrics, self.score, self.direction)

    def ranked(self) -> list[Setting]:
        """Best first."""
        return ordered(self.result.trials, self.score, self.direction)

    def to_dict(self) -> dict[str, Any]:
        """The form of `calibrate --json`; recalls in percent, settings best first."""
        return {
            "score": self.score,
            "direction": self.direction,
            "rerank": self.rerank,
            "best": self._row(self.best),
            "none": self._recalls(self.result.none),
            "beaten": self.improves,
            "gain": self.gain,
            "spread": self._uncertainty(),
            "settings": [self._row(setting) for setting in self.ranked()],
            "grid": self.grid.to_dict(),
            "dataset": self.dataset(),
            "exported": self.exported.to_dict(),
            "itm_pairs": self.result.itm_pairs,
            "seconds": {stage: round(value, 3) for stage, value in self.result.seconds.items()},
            "resumed": self.result.resumed,
            "environment": self.environment,
        }

    def provenance(self) -> dict[str, Any]:
        """The manifest's `calibration` block of a calibrated bundle."""
        keys = ("score", "direction", "rerank", "best", "none", "beaten", "gain", "spread", "grid", "dataset")
        whole = self.to_dict()
        return {key: whole[key] for key in keys} | {"settings": len(self.result.trials)}

    def dataset(self) -> dict[str, Any]:
        dataset = self.data.dataset
        return {
            "root": str(dataset.root),
            "split": dataset.split,
            "sha256": self.data.dataset_digest(),
            "images": len(dataset),
            "texts": len(dataset.captions),
            "boxes": self.data.boxes_from,
            "boxes_sha256": self.data.boxes_digest(),
            "bin_boxes": self.data.bins_from,
        }

    def _uncertainty(self) -> dict[str, Any]:
        low, high = self.uncertainty.gain_interval
        return {
            "standard_error": self.uncertainty.standard_error,
            "gain_interval": [low, high],
            "chance": self.uncertainty.p_value,
            "within_noise": self.within_noise,
            "none_within_noise": self.none_within_noise,
        }

    def is_within_noise(self, setting: Setting) -> bool:
        return self._noise()[setting]

    def _noise(self) -> dict[Setting, bool]:
        return dict(zip(self.result.trials, self.uncertainty.within_noise, strict=False))  # the last is no perturbation

    def _row(self, setting: Setting) -> dict[str, Any]:
        beta, gamma = WEIGHT_FUNCTIONS[setting.weight]
        found = {**asdict(setting), "beta": beta, "gamma": gamma, "within_noise": self.is_within_noise(setting)}
        return found | self._recalls(self.result.trials[setting])

    def _recalls(self, trial: Trial) -> dict[str, Any]:
        whole = trial.metrics.to_dict()
        return {"value": self.value(trial)} | {key: whole[key] for key in ("t2i", "i2t", "small")}


def ordered(trials: Mapping[Setting, Trial], score: Score, direction: JudgedBy) -> list[Setting]:
    """Best first: by the score, then by the other direction's (of both, text to image), then the weaker perturbation,
    then the grid's order."""
    other: Direction = "i2t" if direction == "t2i" else "t2i"

    def key(setting: Setting) -> tuple[float, float, float]:
        metrics = trials[setting].metrics
        return -score_of(metrics, score, direction), -score_of(metrics, score, other), setting.alpha

    return sorted(trials, key=key)
