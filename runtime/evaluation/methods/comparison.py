"""What a comparison found, and its JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from importlib.resources import files
from itertools import combinations
from typing import Any

from qpert.runtime.evaluation import bootstrap
from qpert.runtime.evaluation.methods.choices import Method
from qpert.runtime.evaluation.methods.differences import Contrast, contrasts
from qpert.runtime.evaluation.result import Evaluation

REFERENCES: tuple[Method, ...] = ("none", "q-pert")
"""What others are compared against, the first of these that is among them."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """The evaluations of several methods on one split, in the order in which they were asked for."""

    evaluations: tuple[Evaluation, ...] = field(repr=False)

    @property
    def methods(self) -> tuple[Method, ...]:
        return tuple(one.method for one in self.evaluations)

    def evaluation(self, method: Method) -> Evaluation:
        return self.evaluations[self.methods.index(method)]

    def described(self, environment: Mapping[str, str], notice: str | None) -> Comparison:
        """With machine and versions, and for q-pert a notice."""
        return Comparison(
            tuple(
                replace(one, environment=dict(environment), notice=notice if one.method == "q-pert" else None)
                for one in self.evaluations
            )
        )

    @cached_property
    def contrasts(self) -> tuple[Contrast, ...]:
        """Every pair of methods once, at both stages."""
        return contrasts(self.evaluations, [oriented(*pair) for pair in combinations(self.methods, 2)])

    def contrast(self, method: Method, against: Method, stage: str) -> Contrast:
        """`method` less `against`, whichever way they were compared."""
        for one in self.contrasts:
            if one.stage == stage and (one.method, one.against) == (method, against):
                return one
            if one.stage == stage and (one.method, one.against) == (against, method):
                return one.reversed()
        raise KeyError((method, against, stage))

    @property
    def stage(self) -> str:
        """The stage of the headline numbers."""
        return "final" if self.evaluations[0].rerank else "itc"

    def to_dict(self) -> dict[str, Any]:
        """The form of `eval --json`: of one method its own; of several that of the first, and `methods` with all of
        them, `differences` between any two, the `bootstrap` that gave their intervals, and the paper's `table_a`."""
        documents = [one.to_dict() for one in self.evaluations]
        if len(documents) == 1:
            return documents[0] | {"table_a": table_a()}
        return documents[0] | {
            "methods": documents,
            "differences": [one.to_dict() for one in self.contrasts],
            "bootstrap": {
                "resamples": bootstrap.RESAMPLES,
                "seed": bootstrap.SEED,
                "interval_percent": bootstrap.LEVEL,
                "drawn": "pictures, each with its captions; all methods on the same draws",
            },
            "table_a": table_a(),
        }


def oriented(one: Method, other: Method) -> tuple[Method, Method]:
    """(method, against): the later of `REFERENCES` comes last, else the second against the first."""
    for reference in REFERENCES:
        if reference in (one, other):
            return (other, reference) if one == reference else (one, reference)
    return other, one


@cache
def table_a() -> dict[str, Any]:
    """The paper's Table A: recalls in percent by method and metric, with what they were measured on."""
    text = files("qpert.runtime.evaluation.methods").joinpath("table_a.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found
