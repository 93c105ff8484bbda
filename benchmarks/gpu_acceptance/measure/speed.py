"""The speed of one graph at several sizes, beside PyTorch in the same precision, measured in turns.

    python -m gpu_acceptance.measure.speed BUNDLE --provider cuda --graph vision --checkpoint FILE \
        --batches 1,8 --boxes 0,1,8,32 --compile

Inputs are in GPU memory on both sides before the clock starts. The vision tower's output stays there, as it does in
`Encoder`; what the other graphs give is small and goes to the host on both sides. torch.compile compiles each size for
itself, and its time is told apart. A baseline that fails or does not fit is left out with its reason; a graph of qpert
that does is a row with an error, and the other sizes go on.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gpu_acceptance.measure.device import Accelerator
from gpu_acceptance.measure.output import counts, run
from qpert.exporter.references.baselines import TorchBaseline, open_baselines
from qpert.runtime.benchmark.machine import load
from qpert.runtime.benchmark.run import compare
from qpert.runtime.benchmark.timing import Schedule, interleaved
from qpert.runtime.benchmark.workloads import Workload, make_workload
from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.bundle.manifest import Manifest
from qpert.runtime.bundle.roles import IMAGE_TOKENS, IMAGE_TOWER
from qpert.runtime.errors import QpertError, UnavailableError
from qpert.runtime.retrieval.encoder import Encoder
from qpert.runtime.sessions.device import DeviceArray, on_host
from qpert.runtime.sessions.protocol import run_on_device

SDPA, COMPILED = "torch-sdpa", "torch-compile"


@dataclass
class GraphSpeed:
    """One graph of an opened bundle, with its baselines."""

    encoder: Encoder
    graph: str
    accelerator: Accelerator
    baselines: Sequence[TorchBaseline]
    schedule: Schedule
    features: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        tower = self.encoder.sessions[self.encoder.manifest.image_tower.name]
        self.features = features_of(self.encoder.manifest, lambda one: tower.run(one.inputs))

    def measure(self, batch: int, boxes: int, peak: float) -> dict[str, Any]:
        """One row: milliseconds, rate, share of the peak, and each baseline's figures."""
        workload = make_workload(self.encoder.manifest, self.features, (self.graph, batch, boxes))
        session = self.encoder.sessions[self.graph]
        expected = session.run(workload.inputs)
        calls: dict[str, Callable[[], Any]] = {"": self.own_call(workload)}
        self.check_own(workload, calls[""](), expected)
        compared, left_out = self.compared(workload, expected, calls)
        timings = interleaved(calls, self.schedule)
        own = timings.pop("")
        seconds = own.median_ms / 1e3
        for name, timing in timings.items():
            compared[name] |= {"median_ms": timing.median_ms, "ratio": timing.median_ms / own.median_ms}
        return {
            "batch": batch,
            "boxes": boxes,
            "median_ms": own.median_ms,
            "p95_ms": own.p95_ms,
            "per_second": batch / seconds,
            "share_of_peak": workload.flops / seconds / peak,
            "repeats": len(own.seconds),
            "baselines": compared,
            "left_out": left_out,
        }

    def own_call(self, workload: Workload) -> Callable[[], Any]:
        session = self.encoder.sessions[self.graph]
        inputs = self.resident(workload.inputs)
        if session.spec.role == IMAGE_TOWER:
            return self.accelerator.waited(lambda: run_on_device(session, inputs))
        return self.accelerator.waited(lambda: session.run(inputs))

    def resident(self, inputs: Mapping[str, np.ndarray]) -> Mapping[str, Any]:
        """The inputs in GPU memory; on the host where the work runs there, and where they are empty."""
        if not self.accelerator.on_gpu:
            return inputs
        found = {name: on_device(self.accelerator, array) if array.size else array for name, array in inputs.items()}
        self.accelerator.wait()  # other libraries' streams do not wait for PyTorch's copies
        return found

    def check_own(self, workload: Workload, outputs: Any, expected: dict[str, np.ndarray]) -> None:
        """With its inputs in GPU memory the graph gives what it gives from the host. Raises InputError where not."""
        found = {name: on_host(array) for name, array in outputs.items()}
        compare(found, expected, "the same with inputs in GPU memory", workload, self.encoder.manifest.precision)

    def compared(
        self, workload: Workload, expected: dict[str, np.ndarray], calls: dict[str, Callable[[], Any]]
    ) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
        """Adds a call for each baseline that works here. Returns how far each is from the graph, and why others do not.

        Raises:
            InputError: a baseline computes something else.
        """
        found: dict[str, dict[str, Any]] = {}
        left_out: dict[str, str] = {}
        for baseline in self.baselines:
            forget_compiled(baseline)
            try:
                began = time.perf_counter()
                call = self.baseline_call(baseline, workload)
                output = call()
                first = time.perf_counter() - began
                outputs = {name: to_host(output) for name in expected}
            except (UnavailableError, RuntimeError) as error:  # no compiler, or no room for it
                left_out[baseline.name] = str(error).strip().splitlines()[0]
                print(f"left out: {baseline.name} for {workload}: {error}", file=sys.stderr)
                continue
            precision = self.encoder.manifest.precision
            found[baseline.name] = {"max_abs": compare(outputs, expected, baseline.name, workload, precision)}
            if baseline.variant.compiled:
                found[baseline.name]["compile_seconds"] = first
            calls[baseline.name] = call
        return found, left_out

    def baseline_call(self, baseline: TorchBaseline, workload: Workload) -> Callable[[], Any]:
        prepared = baseline.prepare(self.graph, workload.inputs)
        if self.encoder.manifest.graphs[self.graph].role != IMAGE_TOWER:
            return lambda: prepared().cpu()  # waits for the output
        return self.accelerator.waited(prepared)


def features_of(manifest: Manifest, run: Callable[[Workload], Mapping[str, np.ndarray]]) -> np.ndarray:
    """Image tokens [1, N, C] of random pixels, by whatever runs the vision tower: what later graphs are given."""
    tower = manifest.image_tower
    tokens = run(make_workload(manifest, np.empty(0), (tower.name, 1, 0)))[tower.output_names[0]]
    return tokens.astype(manifest.query_head.input(IMAGE_TOKENS).dtype)


def on_device(accelerator: Accelerator, array: np.ndarray) -> DeviceArray:
    tensor = accelerator.put(array)
    return DeviceArray(tuple(array.shape), array.dtype, tensor.data_ptr(), lambda: array, tensor)


def to_host(tensor: Any) -> np.ndarray:
    return np.asarray(tensor.float().cpu().numpy())


def forget_compiled(baseline: TorchBaseline) -> None:
    """So that torch.compile compiles for the next size alone, and not for any size."""
    if baseline.variant.compiled:
        import torch

        torch._dynamo.reset()
        baseline.compiled.clear()


def main(given: argparse.Namespace) -> dict[str, Any]:
    accelerator = Accelerator(given.provider)
    peak = accelerator.peak_flops()
    opened = Bundle.open(given.bundle)
    names = [SDPA, COMPILED] if given.compile else [SDPA]
    schedule = Schedule(repeats=given.repeats, seconds=given.seconds)
    rows: list[dict[str, Any]] = []
    with (
        closing(Encoder(opened, given.provider)) as encoder,
        open_baselines(names, opened.manifest, str(given.checkpoint), provider=given.provider) as baselines,
    ):
        speed = GraphSpeed(encoder, given.graph, accelerator, baselines, schedule)  # type: ignore[arg-type]
        takes_boxes = opened.manifest.graphs[given.graph].takes_boxes
        for batch in given.batches:
            for boxes in given.boxes if takes_boxes else (0,):
                print(f"{given.graph}, batch {batch}, {boxes} boxes", file=sys.stderr, flush=True)
                try:
                    rows.append(speed.measure(batch, boxes, peak))
                except QpertError as error:
                    rows.append({"batch": batch, "boxes": boxes, "error": str(error)})
    return {"graph": given.graph, "peak_tflops": peak / 1e12, "load": load(), "rows": rows}


def without_gpu(measure: Callable[[argparse.Namespace], dict[str, Any]], given: argparse.Namespace) -> dict[str, Any]:
    """Skips what needs a PyTorch that sees the GPU, where it does not."""
    try:
        return measure(given)
    except UnavailableError as error:
        if error.code == "torch-without-cuda":
            return {"skipped": str(error)}
        raise


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--provider", required=True)
    parser.add_argument("--graph", required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--batches", type=counts, required=True)
    parser.add_argument("--boxes", type=counts, default=(0,))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=60.0)
    arguments = parser.parse_args()
    raise SystemExit(run(lambda: without_gpu(main, arguments)))
