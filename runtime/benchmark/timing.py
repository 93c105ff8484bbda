"""Timing calls side by side. A machine's speed drifts, by half or more if it is shared: only calls measured in turns
(A B A B …) can be compared, and only by medians. CPU time is the second measure: it excludes the time in which other
processes ran.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

Clock = Callable[[], float]
"""A monotonic clock, in seconds."""


@dataclass(frozen=True)
class Schedule:
    """How often each call is measured: `repeats` times after `warmup` rounds that are not measured.

    After `seconds` no further round begins, but at least `least` rounds are run.

    `settle`: seconds for which a call is repeated, not measured, at the start of each turn. Threads of the library that
    ran before still spin on the cores that this one needs (ONNX Runtime's for about 50 ms), while its own are asleep;
    the measurement is of a program that uses nothing else.
    """

    repeats: int = 20
    warmup: int = 2
    seconds: float = 30.0
    least: int = 3
    settle: float = 0.1


@dataclass(frozen=True)
class Timing:
    """Seconds of each measured call by the clock, and CPU seconds of all threads of this process."""

    seconds: tuple[float, ...]
    cpu_seconds: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        return float(np.median(self.seconds)) * 1e3

    @property
    def p95_ms(self) -> float:
        """The 95th percentile, interpolated between neighbours; of twenty calls, about the second slowest."""
        return float(np.quantile(self.seconds, 0.95)) * 1e3

    @property
    def cpu_ms(self) -> float:
        """The median. Includes threads that spin while waiting, as ONNX Runtime's do."""
        return float(np.median(self.cpu_seconds)) * 1e3


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    schedule: Schedule,
    clock: Clock = time.perf_counter,
    cpu_clock: Clock = time.process_time,
) -> dict[str, Timing]:
    """Call each in turn, round after round; each round starts with another call, so that none is always first."""
    for _ in range(schedule.warmup):
        for call in calls.values():
            call()
    names = list(calls)
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    began = clock()
    for turn in range(schedule.repeats):
        if turn >= schedule.least and clock() - began >= schedule.seconds:
            break
        for place in range(len(names)):
            name = names[(turn + place) % len(names)]
            arrived = clock()
            while clock() - arrived < schedule.settle:
                calls[name]()
            before, cpu_before = clock(), cpu_clock()
            calls[name]()
            measured[name].append((clock() - before, cpu_clock() - cpu_before))
    return {name: Timing(*zip(*each, strict=True)) for name, each in measured.items()}
