"""The result of a verification: gates, the figures behind them, and the verdict."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt


def json_number(value: Any) -> Any:
    """`value`, or None if it is NaN or infinite, which JSON does not have."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class Gate:
    """One judged number: passes if `value` is at most `limit`."""

    name: str
    value: float
    limit: float

    @property
    def passed(self) -> bool:
        return bool(self.value <= self.limit)  # False for NaN

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "value": json_number(self.value), "limit": self.limit, "pass": self.passed}


@dataclass(frozen=True)
class Comparison:
    """One output of one case in one shape against the reference."""

    graph: str
    case: str
    shape: str
    output: str
    max_abs: float
    cosine_distance: float
    not_finite: int
    perturbed: bool


@dataclass(frozen=True)
class Candidate:
    """One candidate of a disagreement. file: of a picture, None for a caption. Scores by the reference and here."""

    name: str
    file: Path | None
    reference: float
    deployed: float


@dataclass(frozen=True)
class Disagreement:
    """A query whose first result differs from the reference's.

    direction: `t2i` or `i2t`. query: the caption, or the picture's name with its `file`. expected and got: the first
    results of the reference and of the bundle. tie: the reference's scores of the two differ by less than a tie.
    """

    direction: str
    query: str
    file: Path | None
    expected: Candidate
    got: Candidate
    tie: bool


@dataclass(frozen=True, eq=False)
class Evidence:
    """Data of a report's rank sections: final scores of the same pairs, float32 [P] each; the worst disagreements."""

    reference: npt.NDArray[np.float32]
    deployed: npt.NDArray[np.float32]
    disagreements: tuple[Disagreement, ...]


@dataclass(frozen=True)
class Verification:
    """The verdict and everything behind it.

    comparisons: of level `tensor`, one for each output, case and shape. details: further figures of the levels `rank`
    and `recall`. evidence: what the report shows for those levels, not part of the JSON.
    """

    level: str
    reference: str
    provider: str
    precision: str
    gates: tuple[Gate, ...]
    comparisons: tuple[Comparison, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    command: str = ""
    details: dict[str, Any] = field(default_factory=dict)
    evidence: Evidence | None = field(default=None, repr=False)

    @property
    def passed(self) -> bool:
        return all(gate.passed for gate in self.gates)

    @property
    def verdict(self) -> str:
        return "pass" if self.passed else "fail"

    def with_run(self, environment: dict[str, str], command: str) -> Verification:
        """The same, with where and how it was run."""
        return replace(self, environment=environment, command=command)

    def to_dict(self) -> dict[str, Any]:
        return {
            "verdict": self.verdict,
            "level": self.level,
            "reference": self.reference,
            "provider": self.provider,
            "precision": self.precision,
            "gates": [gate.to_dict() for gate in self.gates],
            **self.details,
            "comparisons": [
                {key: json_number(value) for key, value in asdict(comparison).items()}
                for comparison in self.comparisons
            ],
            "environment": self.environment,
            "command": self.command,
        }
