"""Traces the graphs of one export, in a second process as well where there is a second core.

Tracing is Python that keeps one core busy, and its graphs are independent of each other. So this process and a helper
take graphs from the two ends of one list. Whatever the helper does not deliver is traced here, so a fault in a graph is
also raised here, with its traceback.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any

import torch

from qpert.exporter.families import find_family
from qpert.exporter.families.base import Family
from qpert.exporter.tracing.trace import TracedStage, network_without_weights, trace_stage
from qpert.graphs.perturbation.choices import GraphPerturbation
from qpert.runtime.benchmark.machine import usable_cores
from qpert.runtime.bundle.graph_spec import GraphSpec

HELPER = "from qpert.exporter.tracing.processes import help_with_tracing; help_with_tracing()"


@dataclass(frozen=True)
class TraceJob:
    """What is traced: a family's network, and its graphs by name. Can be pickled."""

    family: str
    config: Any
    perturbation: GraphPerturbation | None
    precision: str
    graphs: dict[str, GraphSpec]

    def tracer(self, family: Family) -> Callable[[str], TracedStage]:
        """A function that traces the graph of a name."""
        network = network_without_weights(family, self.config, self.perturbation, self.precision)
        stages = family.stages(network)
        return lambda name: trace_stage(stages[name].eval(), self.graphs[name])


def traced_stages(job: TraceJob, family: Family, advance: Callable[[int], None]) -> dict[str, TracedStage]:
    """Every graph of `job`, traced. `advance` hears of each that is done."""
    waiting, found = deque(job.graphs), dict[str, TracedStage]()

    def trace_all(take: Callable[[], str], trace: Callable[[str], TracedStage]) -> None:
        while True:
            try:
                name = take()
            except IndexError:
                return
            try:
                found[name] = trace(name)
            except BaseException:
                waiting.append(name)
                raise
            advance(1)

    with helper(job) if helps(job) else contextlib.nullcontext() as ask:
        beside = None
        if ask is not None:
            # The last graphs take longest: this process, which has begun by then, takes them first.
            beside = threading.Thread(target=quietly, args=(trace_all, waiting.popleft, ask), daemon=True)
            beside.start()
        tracer = job.tracer(family)
        trace_all(waiting.pop, tracer)
        if beside is not None:
            beside.join()
            trace_all(waiting.pop, tracer)  # what the helper left
    return found


def helps(job: TraceJob) -> bool:
    """Whether a second process is worth its start: not where PyTorch was given one thread (`OMP_NUM_THREADS=1`)."""
    can_start = bool(sys.executable) and not getattr(sys, "frozen", False)
    return can_start and len(job.graphs) > 1 and min(usable_cores(), torch.get_num_threads()) > 1


def quietly(call: Callable[..., None], *arguments: Any) -> None:
    """In the thread that talks to the helper: whatever ends it is no error, since this process traces what is left."""
    with contextlib.suppress(Exception):
        call(*arguments)


@contextlib.contextmanager
def helper(job: TraceJob) -> Iterator[Callable[[str], TracedStage]]:
    """A process that traces graphs by name, with this process's import path. It ends with the context."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.curdir for path in sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", HELPER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    given, answers = process.stdin, process.stdout
    is_told = False

    def ask(name: str) -> TracedStage:
        nonlocal is_told
        if not is_told:
            send(job, given)
            is_told = True
        send(name, given)
        answer: TracedStage = pickle.load(answers)
        return answer

    try:
        yield ask
    finally:
        process.kill()  # by now it waits for a name, or what it does is not wanted any more
        process.wait()
        answers.close()
        with contextlib.suppress(OSError):
            given.close()


def send(value: object, stream: IO[bytes]) -> None:
    pickle.dump(value, stream)
    stream.flush()


def help_with_tracing() -> None:
    """The helper: a job and then names on stdin, a traced stage for each on stdout; until stdin ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # libraries that print do not print between the answers
    names = sys.stdin.buffer
    job: TraceJob = pickle.load(names)
    trace = job.tracer(find_family(job.family))
    with contextlib.suppress(EOFError):
        while True:
            send(trace(pickle.load(names)), answers)
