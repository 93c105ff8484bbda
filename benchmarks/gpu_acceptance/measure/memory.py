"""GPU memory of a process that does the work of retrieval at its largest sizes: encode images with boxes, encode texts,
match pairs.

    python -m gpu_acceptance.measure.memory BUNDLE --provider cuda --boxes 8            # this bundle
    python -m gpu_acceptance.measure.memory BUNDLE --provider cuda --boxes 8 --checkpoint FILE   # PyTorch, SDPA

The driver is asked for this process's share at the end of the work: the allocators of ONNX Runtime, TensorRT and
PyTorch keep what they once took. On the CPU it is the peak of resident memory.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from gpu_acceptance.environment import process_megabytes
from gpu_acceptance.measure.device import Accelerator
from gpu_acceptance.measure.output import run as printed
from gpu_acceptance.measure.speed import SDPA, features_of, without_gpu
from qpert.exporter.references.baselines import open_baselines
from qpert.runtime.benchmark.cold import peak_memory_mb
from qpert.runtime.benchmark.workloads import AXES, Workload, make_workload
from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.bundle.manifest import Manifest
from qpert.runtime.retrieval.encoder import Encoder
from qpert.runtime.sessions.providers import find_provider

TURNS = 3


Run = Callable[[Workload], Mapping[str, np.ndarray]]


def main(given: argparse.Namespace) -> dict[str, Any]:
    opened = Bundle.open(given.bundle)
    if given.checkpoint is None:
        with closing(Encoder(opened, given.provider)) as encoder:
            return used(given, opened.manifest, lambda one: encoder.sessions[one.stage].run(one.inputs))
    Accelerator(given.provider)  # says what is missing
    with open_baselines([SDPA], opened.manifest, str(given.checkpoint), provider=given.provider) as (baseline,):
        return used(given, opened.manifest, lambda one: baseline.run(one.stage, one.inputs))


def used(given: argparse.Namespace, manifest: Manifest, run: Run) -> dict[str, Any]:
    """Every graph with as many images or texts as the bundle takes, a few times; then the memory."""
    features = features_of(manifest, run)
    for _ in range(TURNS):
        for name, graph in manifest.graphs.items():
            if graph.role in AXES:
                boxes = min(given.boxes, graph.ranges["O"].max) if graph.takes_boxes else 0
                run(make_workload(manifest, features, (name, graph.ranges[AXES[graph.role]].max, boxes)))
    if find_provider(given.provider).on_cpu:
        return {"megabytes": peak_memory_mb(), "of": "resident memory of the process"}
    return process_megabytes(os.getpid())


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--provider", required=True)
    parser.add_argument("--boxes", type=int, required=True)
    parser.add_argument("--checkpoint", type=Path)
    arguments = parser.parse_args()
    raise SystemExit(printed(lambda: without_gpu(main, arguments)))
