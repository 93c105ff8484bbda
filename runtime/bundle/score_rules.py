"""Which scores a bundle has and how they combine: names that the manifest holds, and the formulas behind them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qpert.runtime.errors import InputError

FORMULAS: Mapping[str, Mapping[str | None, str]] = {
    "first": {"max_cosine": "max over an image's vectors of image_vectors · text_vectors"},
    "second": {
        "logit": "match logit, mean over the image's queries, no softmax",
        None: "none; pairs are not re-ranked",
    },
    "final": {"sum": "second + first", "first": "first"},
}


@dataclass(frozen=True)
class ScoreRules:
    """`first` ranks every image, `second` scores the pairs of a shortlist, `final` combines them.

    `second` is None where there is no pair scorer.

    Raises `InputError` for a name that this version does not know.
    """

    first: str = "max_cosine"
    second: str | None = "logit"
    final: str = "sum"

    def __post_init__(self) -> None:
        for name, known in FORMULAS.items():
            value = getattr(self, name)
            if value not in known:
                raise InputError(
                    f"the {name} score is {value!r}; expected one of {', '.join(map(str, known))}: upgrade qpert",
                    code="score-rule",
                )
        if (self.final == "sum") != (self.second is not None):
            raise InputError(
                f"the final score is {self.final!r} with a second score {self.second!r}; expected sum with one, first "
                "without",
                code="score-rule",
            )

    def to_dict(self) -> dict[str, Any]:
        names = {"first": self.first, "second": self.second, "final": self.final}
        return {**names, "formulas": {name: FORMULAS[name][value] for name, value in names.items()}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ScoreRules:
        """The inverse of `to_dict`. Raises InputError."""
        if not isinstance(values, Mapping) or not {"first", "second", "final"} <= set(values):
            raise InputError(f"scores has {values!r}; expected first, second and final", code="score-rule")
        return cls(values["first"], values["second"], values["final"])
