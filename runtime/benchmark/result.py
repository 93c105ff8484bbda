"""The result of a benchmark as data: rows, and the machine."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from qpert.runtime.benchmark.timing import Timing


@dataclass(frozen=True)
class Row:
    """One call at one size, compared with one baseline; without baselines the last six fields are None.

    batch: images (vision, image_query, encode), texts (text), texts of one image (itm), searches
    (search). per_second: how many of those per second, at the median. share_of_peak: FLOP/s as a share of those of one
    large product; the perturbation's are not counted. ratio: the baseline's median over this one, so above 1 this is
    faster. baseline_max_abs: largest difference of their outputs, None end to end.
    """

    stage: str
    batch: int
    boxes: int
    provider: str
    precision: str
    repeats: int
    median_ms: float
    p95_ms: float
    cpu_ms: float
    per_second: float
    share_of_peak: float | None = None
    baseline: str | None = None
    baseline_median_ms: float | None = None
    baseline_p95_ms: float | None = None
    baseline_max_abs: float | None = None
    ratio: float | None = None
    cpu_ratio: float | None = None

    def compared_with(self, baseline: str, timing: Timing, max_abs: float | None) -> Row:
        """This row, compared with a baseline measured in the same rounds."""
        values = asdict(self) | {
            "baseline": baseline,
            "baseline_median_ms": timing.median_ms,
            "baseline_p95_ms": timing.p95_ms,
            "baseline_max_abs": max_abs,
            "ratio": timing.median_ms / self.median_ms,
            "cpu_ratio": timing.cpu_ms / self.cpu_ms if self.cpu_ms else None,
        }
        return Row(**values)


@dataclass(frozen=True)
class Benchmark:
    """Everything that `qpert bench` measured. `notes`: what could not be measured, and why."""

    rows: tuple[Row, ...]
    machine: dict[str, Any]
    cold_start: dict[str, float]
    settings: dict[str, Any]
    notes: tuple[str, ...] = field(default=())

    @property
    def baselines(self) -> tuple[str, ...]:
        """Names of the baselines that were measured, in the order of the rows."""
        return tuple(dict.fromkeys(row.baseline for row in self.rows if row.baseline is not None))

    def to_dict(self) -> dict[str, Any]:
        return {
            "rows": [rounded(asdict(row)) for row in self.rows],
            "machine": self.machine,
            "cold_start": rounded(self.cold_start),
            "settings": self.settings,
            "notes": list(self.notes),
        }


def rounded(values: dict[str, Any]) -> dict[str, Any]:
    """Floats to five significant digits: no measurement is more precise."""
    return {name: float(f"{value:.5g}") if isinstance(value, float) else value for name, value in values.items()}
