"""Running a benchmark: each workload's session and its baselines in turns, then both directions end to end.

Before timing, a baseline's outputs are compared with the session's: a benchmark against a different computation is
worthless.
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qpert.runtime.benchmark.cold import measure_cold_start
from qpert.runtime.benchmark.end_to_end import EndToEnd
from qpert.runtime.benchmark.machine import describe_machine, measure_peaks
from qpert.runtime.benchmark.result import Benchmark, Row
from qpert.runtime.benchmark.timing import Clock, Schedule, Timing, interleaved
from qpert.runtime.benchmark.workloads import END_TO_END, Sizes, Workload, make_workload, sizes_of
from qpert.runtime.bundle.graph_spec import GraphSpec
from qpert.runtime.errors import InputError, UnavailableError
from qpert.runtime.progress import Progress
from qpert.runtime.retrieval.encoder import Encoder
from qpert.runtime.sessions.protocol import Arrays
from qpert.runtime.sessions.providers import find_provider
from qpert.runtime.verification.reference import Baseline

LARGEST_DIFFERENCE = {"fp32": 1e-3, "fp16": 3e-2, "bf16": 2e-1, "int8": 5e-1, "fp8": 5e-1}
"""Between a session's output and a baseline's, as a share of the baseline's largest number: about ten times what
`qpert verify` finds. It only detects a different computation; `verify` judges rounding."""
PERTURBED_DIFFERENCE = 5e-2
"""With boxes: for random ones a rank may depend on rounding, so that a projector has one dimension more or less."""


@dataclass(frozen=True)
class BenchRequest:
    """What to measure, how often, and on what."""

    sizes: Sizes
    provider: str = "cpu"
    schedule: Schedule = field(default_factory=Schedule)
    threads: int = 0


@dataclass
class BaselineSession:
    """A baseline in the place of a session, so that the encoder can run on it."""

    spec: GraphSpec
    baseline: Baseline

    def run(self, inputs: Arrays) -> dict[str, np.ndarray]:
        return self.baseline.run(self.spec.name, {name: np.asarray(array) for name, array in inputs.items()})

    def close(self) -> None:
        return


def benchmark(
    encoder: Encoder,
    request: BenchRequest,
    baselines: Sequence[Baseline],
    progress: Progress,
    *,
    clock: Clock = time.perf_counter,
) -> Benchmark:
    """Measure one bundle.

    Args:
        encoder: the opened bundle; stays open.
        request: sizes, repeats and provider.
        baselines: what to compare with, ready to run.
        progress: reports what is measured and what is left out.
        clock: in seconds; replaced in tests.

    Raises:
        InputError: nothing requested can be measured, or a baseline computes something else.
    """
    return _Bench(encoder, request, tuple(baselines), progress, clock).measure()


@dataclass
class _Bench:
    encoder: Encoder
    request: BenchRequest
    baselines: tuple[Baseline, ...]
    progress: Progress
    clock: Clock
    peaks: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def measure(self) -> Benchmark:
        manifest, request = self.encoder.manifest, self.request
        machine: dict[str, Any] = describe_machine()  # first: the load must be that of other processes
        sizes = list(sizes_of(manifest, request.sizes, self._note))
        if not sizes:
            raise InputError(
                f"nothing is left to measure: {'; '.join(self.notes)}; ask for smaller sizes", code="bench-nothing-left"
            )
        with self.progress.stage("measuring this machine's peak"):
            self.peaks = measure_peaks()
        with self.progress.stage("cold start in a fresh process"):
            cold = measure_cold_start(self.encoder.bundle.folder, request.provider, threads=request.threads)
        rows: list[Row] = []
        with EndToEnd.open(self.encoder) as direct, self.progress.stage("measuring", total=len(sizes)) as advance:
            features = direct.features()
            for size in sizes:
                rows += self._end_to_end(direct, size) if size[0] in END_TO_END else self._graph(features, size)
                advance(1)
        settings = {
            "repeats": request.schedule.repeats,
            "warmup": request.schedule.warmup,
            "settle_seconds": request.schedule.settle,
            "threads": request.threads or "chosen by the runtime",
        }
        return Benchmark(tuple(rows), machine | {"peak": self.peaks}, cold, settings, tuple(self.notes))

    def _graph(self, features: np.ndarray, size: tuple[str, int, int]) -> list[Row]:
        workload = make_workload(self.encoder.manifest, features, size)
        session = self.encoder.sessions[workload.stage]
        expected = session.run(workload.inputs)
        differences = self._differences(workload, expected)
        calls: dict[str, Callable[[], object]] = {"": lambda: session.run(workload.inputs)}
        for baseline in (each for each in self.baselines if each.name in differences):
            calls[baseline.name] = functools.partial(baseline.run, workload.stage, workload.inputs)
        return self._rows(size, calls, workload.batch, flops=workload.flops, differences=differences)

    def _differences(self, workload: Workload, expected: dict[str, np.ndarray]) -> dict[str, float]:
        """Largest difference from each baseline that can run the workload; those that cannot are noted."""
        found = {}
        for baseline in self._usable(workload.boxes):
            try:
                outputs = baseline.run(workload.stage, workload.inputs)
            except UnavailableError as error:
                self._leave_out(baseline, error)
                continue
            found[baseline.name] = compare(outputs, expected, baseline.name, workload, self.encoder.manifest.precision)
        return found

    def _end_to_end(self, direct: EndToEnd, size: tuple[str, int, int]) -> list[Row]:
        """One direction; a baseline replaces the sessions, so preprocessing and ranking are the same for all."""
        stage, batch, boxes = size
        calls: dict[str, Callable[[], object]] = {"": direct.call(self.encoder, stage, batch, boxes)}
        for baseline in self._usable(boxes):
            encoder = copy.copy(self.encoder)
            encoder.sessions = {
                name: BaselineSession(session.spec, baseline) for name, session in self.encoder.sessions.items()
            }
            call = direct.call(encoder, stage, batch, boxes)
            try:
                call()
            except UnavailableError as error:
                self._leave_out(baseline, error)
                continue
            calls[baseline.name] = call
        return self._rows(size, calls, batch)

    def _rows(
        self,
        size: tuple[str, int, int],
        calls: Mapping[str, Callable[[], object]],
        count: int,
        *,
        flops: int = 0,
        differences: Mapping[str, float] | None = None,
    ) -> list[Row]:
        timings = interleaved(calls, self.request.schedule, self.clock)
        row = self._row(size, timings.pop(""), count, flops)
        compared = [row.compared_with(name, timing, (differences or {}).get(name)) for name, timing in timings.items()]
        return compared or [row]

    def _row(self, size: tuple[str, int, int], own: Timing, count: int, flops: int) -> Row:
        stage, batch, boxes = size
        seconds = own.median_ms / 1e3
        share = flops / seconds / (self.peaks["product_gflops"] * 1e9) if self._knows_peak(flops) else None
        return Row(
            stage=stage,
            batch=batch,
            boxes=boxes,
            provider=self.request.provider,
            precision=self.encoder.manifest.precision,
            repeats=len(own.seconds),
            median_ms=own.median_ms,
            p95_ms=own.p95_ms,
            cpu_ms=own.cpu_ms,
            per_second=count / seconds,
            share_of_peak=share,
        )

    def _knows_peak(self, flops: int) -> bool:
        """The measured peak is the CPU's, in float32."""
        on_cpu = find_provider(self.request.provider).on_cpu
        return bool(flops) and on_cpu and self.encoder.manifest.precision == "fp32"

    def _usable(self, boxes: int) -> list[Baseline]:
        for baseline in self.baselines:
            if boxes and not baseline.perturbs:
                self._note(f"{baseline.name} with boxes: it has no query perturbation")
        return [baseline for baseline in self.baselines if baseline.perturbs or not boxes]

    def _leave_out(self, baseline: Baseline, error: UnavailableError) -> None:
        self.baselines = tuple(each for each in self.baselines if each is not baseline)
        self._note(f"{baseline.name} is left out: {error}")

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)
            self.progress.say(f"not measured: {text}")


def compare(
    outputs: Mapping[str, np.ndarray],
    expected: Mapping[str, np.ndarray],
    baseline: str,
    workload: Workload,
    precision: str,
) -> float:
    """Largest difference of a baseline's outputs from the session's.

    Raises:
        InputError: it computes something else.
    """
    ((name, own),) = expected.items()
    other = outputs[name].astype(np.float64)
    difference = float(np.abs(own - other).max()) if own.shape == other.shape else float("inf")
    limit = max(LARGEST_DIFFERENCE[precision], PERTURBED_DIFFERENCE if workload.boxes else 0) * np.abs(other).max()
    if not difference <= limit:
        raise InputError(
            f"baseline {baseline!r} and the bundle differ in {name} for {workload}: largest difference "
            f"{difference:.3g}, expected at most {limit:.3g}; run `qpert verify` to see which of them is wrong",
            code="baseline-differs",
        )
    return difference
