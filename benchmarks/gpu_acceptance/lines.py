"""The vocabulary: a line is one process; its checks hold its figures against goals; its result is what is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from gpu_acceptance.goals import Goal

Status = Literal["passed", "failed", "skipped", "not judged", "not run"]
Document = Mapping[str, Any]


@dataclass(frozen=True)
class Check:
    """One figure beside its goal. `not judged`: measured in a dry run, where a goal of speed would say nothing."""

    what: str
    goal: str
    why: str
    value: float | None
    unit: str
    status: Status
    reason: str = ""


@dataclass(frozen=True)
class Result:
    """What became of a line. reason: why it failed or was skipped. fingerprint: what it depends on."""

    name: str
    status: Status
    checks: tuple[Check, ...] = ()
    figures: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    seconds: float = 0.0
    command: str = ""
    when: str = ""
    fingerprint: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Result:
        """Raises KeyError or TypeError where `values` is no result."""
        return cls(**{**values, "checks": tuple(Check(**check) for check in values["checks"])})


@dataclass(frozen=True)
class Judged:
    """Checks and figures from a document."""

    checks: tuple[Check, ...]
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def status(self) -> Status:
        """Failed where a check failed; a line of which nothing could be shown is skipped."""
        found = {check.status for check in self.checks}
        if "failed" in found:
            return "failed"
        return "passed" if found & {"passed", "not judged"} else "skipped"


Judge = Callable[[Document, Mapping[str, Result]], Judged]
"""From what the process printed, and the results of the lines before it."""


@dataclass(frozen=True)
class Line:
    """One line of the acceptance.

    command: what its process runs; it prints one JSON document. goal: the one that it misses where it fails as a whole,
    or is skipped; the judge holds figures against it and others. needs: lines that have to have passed. makes: what it
    leaves for others; where that is gone, the line is done again. exit_codes: with which it prints its document.
    """

    name: str
    section: str
    title: str
    command: tuple[str, ...]
    judge: Judge
    goal: Goal
    needs: tuple[str, ...] = ()
    makes: Path | None = None
    minutes: float = 90
    exit_codes: tuple[int, ...] = (0,)


def check(goal: Goal, value: float | None, *, what: str = "", limit: float | None = None, judged: bool = True) -> Check:
    """A figure against a goal; a figure that is missing (None) fails."""
    text, name = goal.text(limit), what or goal.what
    if value is None:
        return Check(name, text, goal.why, None, goal.unit, "failed", "no figure")
    if not judged:
        return Check(name, text, goal.why, value, goal.unit, "not judged")
    return Check(name, text, goal.why, value, goal.unit, "passed" if goal.holds(value, limit) else "failed")


def skipped(goal: Goal, reason: str, *, what: str = "") -> Check:
    """A goal whose figure cannot be had here."""
    return Check(what or goal.what, goal.text(), goal.why, None, goal.unit, "skipped", reason)


def broken(goal: Goal, reason: str, *, what: str = "") -> Check:
    """A goal that was missed because the measurement failed."""
    return Check(what or goal.what, goal.text(), goal.why, None, goal.unit, "failed", reason)
