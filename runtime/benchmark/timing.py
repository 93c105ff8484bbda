"""Timing calls side by side. A machine's speed drifts, by half and more where others use it too: only what was measured
in turns (A B A B …) can be compared, and only by medians. CPU time is the second measure: it leaves out the time in
which other processes ran.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

Clock = Callable[[], float]
"""Seconds from anywhere, never going back."""


@dataclass(frozen=True)
class Schedule:
    """How often each call is measured: `repeats` times after `warmup` rounds that do not count.

    Once `seconds` have passed no further round begins, but `least` are always done.

    `settle`: seconds for which a call is made without being measured at the start of each of its turns. Threads of the
    library before it wait by spinning, on the cores that this one needs (ONNX Runtime's for some 50 ms), while its own
    have gone to sleep; what is measured is how it runs in a program that uses nothing else.
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
        """The 95th percentile, interpolated between neighbours; of twenty calls, about the slowest but one."""
        return float(np.quantile(self.seconds, 0.95)) * 1e3

    @property
    def cpu_ms(self) -> float:
        """The median. It counts threads that wait by spinning, as ONNX Runtime's do."""
        return float(np.median(self.cpu_seconds)) * 1e3


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    schedule: Schedule,
    clock: Clock = time.perf_counter,
    cpu_clock: Clock = time.process_time,
) -> dict[str, Timing]:
    """Call each in turn, round after round; every round begins with another one, so that none always goes first."""
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
