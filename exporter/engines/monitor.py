"""Progress of a build, from the phases that TensorRT reports."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

from qpert.runtime.progress import Advance

STEPS = 100
"""Units of progress per build."""


@dataclass
class Phase:
    """One phase of a build, top-level or nested in another."""

    parent: str | None
    steps: int
    done: int = 0


class PhaseTree:
    """Progress from the phases that have started and ended. TensorRT nests phases, and gives no duration for any."""

    def __init__(self) -> None:
        self.phases: dict[str, Phase] = {}
        self.finished = 0.0

    def start(self, name: str, parent: str | None, steps: int) -> None:
        self.phases[name] = Phase(parent, max(1, steps))

    def step(self, name: str, number: int) -> None:
        if name in self.phases:
            self.phases[name].done = number + 1

    def finish(self, name: str) -> None:
        phase = self.phases.pop(name, None)
        if phase is not None and phase.parent is None:
            self.finished = 1.0

    def fraction(self) -> float:
        """Progress from 0 to 1; never decreases."""
        roots = [name for name, phase in self.phases.items() if phase.parent is None]
        self.finished = max([self.finished, *(self._fraction(name) for name in roots)])
        return self.finished

    def _fraction(self, name: str) -> float:
        phase = self.phases[name]
        inside = max(
            (self._fraction(child) for child, other in self.phases.items() if other.parent == name), default=0.0
        )
        return min(1.0, (phase.done + inside) / phase.steps)


def make_monitor(library: Any, advance: Advance, cancelled: threading.Event) -> Any:
    """An `IProgressMonitor` that converts phases to `STEPS` units, and stops the build once `cancelled` is set."""
    tree, lock, reported = PhaseTree(), threading.Lock(), 0

    def report() -> None:
        nonlocal reported
        now = int(tree.fraction() * STEPS)
        if now > reported:
            advance(now - reported)
            reported = now

    class Monitor(library.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            library.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with lock:
                tree.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            with lock:
                tree.step(phase_name, step)
                report()
            return not cancelled.is_set()

        def phase_finish(self, phase_name: str) -> None:
            with lock:
                tree.finish(phase_name)
                report()

    return Monitor()
