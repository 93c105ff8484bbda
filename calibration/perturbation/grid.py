"""The settings that a search tries: the paper's grid by default.

Source: Sogi, Shibata, Terao, ECCV 2024, section 5.1: α in 2, 4 … 10 for BLIP-2 and in 0.2, 0.4 … 1 for CoCa, five
weight functions of a box's share S of the image, contribution-ratio thresholds 0.85, 0.9, 0.95 and 0.99. Whether boxes
are summed (the paper) or averaged (the authors' release), or each given queries of its own (ours), is a separate choice
here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from qpert.runtime.errors import InputError
from qpert.runtime.inputs.perturbation import WEIGHT_FUNCTIONS, Perturbation, Reduction

ALPHAS = (2.0, 4.0, 6.0, 8.0, 10.0)
SMALL_ALPHAS = (0.2, 0.4, 0.6, 0.8, 1.0)
"""The paper's for models whose image is pooled by one cross-attention."""
THRESHOLDS = (0.85, 0.9, 0.95, 0.99)
GridReduction = Literal["sum", "mean", "each", "each+stock"]
"""How boxes act together; `each+stock` is reduction `each` with `keep_stock`."""
REDUCTIONS: tuple[GridReduction, ...] = get_args(GridReduction)


def alphas_around(exported: float) -> tuple[float, ...]:
    """The grid to which a bundle's own α belongs: α at most 1 is exported for models with one cross-attention."""
    return SMALL_ALPHAS if exported <= max(SMALL_ALPHAS) else ALPHAS


@dataclass(frozen=True, order=True)
class Setting:
    """One point of the grid."""

    threshold: float
    reduction: GridReduction
    weight: str
    alpha: float

    def perturbation(self, exported: Perturbation) -> Perturbation:
        """The exported settings with this point's values; the rest (coverage, stages, norm, centring) stays."""
        beta, gamma = WEIGHT_FUNCTIONS[self.weight]
        reduction: Reduction = "each" if self.reduction == "each+stock" else self.reduction
        return replace(
            exported,
            alpha=self.alpha,
            beta=beta,
            gamma=gamma,
            threshold=self.threshold,
            reduction=reduction,
            keep_stock=self.reduction == "each+stock",
        )

    @property
    def short(self) -> str:
        return f"α {self.alpha:g}, {self.weight}, τ {self.threshold:g}, {self.reduction}"

    def __str__(self) -> str:
        return f"α {self.alpha:g}, weight {self.weight}, τ {self.threshold:g}, {self.reduction}"


@dataclass(frozen=True)
class Grid:
    """Every combination of the values. Raises InputError for an empty or repeated list and for unusable values."""

    alphas: tuple[float, ...] = ALPHAS
    weights: tuple[str, ...] = tuple(WEIGHT_FUNCTIONS)
    thresholds: tuple[float, ...] = THRESHOLDS
    reductions: tuple[GridReduction, ...] = REDUCTIONS

    def __post_init__(self) -> None:
        for name, values in asdict(self).items():
            if not values:
                raise InputError(f"{name} is empty; give at least one value", code="grid-empty")
            if len(set(values)) < len(values):
                raise InputError(
                    f"{name} is {_listed(values)}, which repeats a value; give each once", code="grid-repeated"
                )
        for alpha in self.alphas:
            if not (math.isfinite(alpha) and alpha > 0):
                raise InputError(
                    f"got α {alpha}, expected numbers above 0 such as 2,4,6,8,10 (no perturbation is always tried)",
                    code="grid-alpha",
                )
        for threshold in self.thresholds:
            if not 0 < threshold < 1:
                raise InputError(
                    f"got threshold {threshold}, expected contribution ratios between 0 and 1, such as 0.95",
                    code="grid-threshold",
                )
        _check_choices("weights", self.weights, tuple(WEIGHT_FUNCTIONS))
        _check_choices("reductions", self.reductions, REDUCTIONS)

    def __len__(self) -> int:
        return len(self.alphas) * len(self.weights) * len(self.thresholds) * len(self.reductions)

    def settings(self) -> tuple[Setting, ...]:
        return tuple(setting for threshold in self.thresholds for setting in self.at(threshold))

    def at(self, threshold: float) -> Iterator[Setting]:
        """The settings of one threshold."""
        for reduction in self.reductions:
            for weight in self.weights:
                for alpha in self.alphas:
                    yield Setting(threshold, reduction, weight, alpha)

    def to_dict(self) -> dict[str, Any]:
        return {name: list(values) for name, values in asdict(self).items()}


def _check_choices(name: str, values: tuple[str, ...], choices: tuple[str, ...]) -> None:
    for value in values:
        if value not in choices:
            raise InputError(f"{name} has {value!r}; expected values from {', '.join(choices)}", code="grid-choice")


def _listed(values: tuple[object, ...]) -> str:
    return ", ".join(map(str, values))
