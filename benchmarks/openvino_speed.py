"""OpenVINO beside ONNX Runtime on the CPU: time of each graph, and how far the outputs are apart.

    python benchmarks/openvino_speed.py BUNDLE… --out benchmarks/results/openvino.json

Both providers get the same inputs in turns, so that other load on the machine meets both. `ratio` is ONNX Runtime's
median over OpenVINO's: above 1 where OpenVINO is faster. `difference` is the largest of outputs, OpenVINO against ONNX
Runtime and each against what PyTorch gave when the bundle was exported.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from qpert.runtime.benchmark.machine import describe_machine
from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.bundle.graph_spec import GraphSpec
from qpert.runtime.sessions.open import open_sessions
from qpert.runtime.sessions.protocol import Session

PROVIDERS = ("cpu", "openvino")
LENGTHS: dict[str, tuple[dict[str, int], ...]] = {
    "vision": ({"B": 1}, {"B": 8}),
    "image_query": ({"B": 1, "O": 0}, {"B": 1, "O": 8}, {"B": 8, "O": 8}),
    "text": ({"T": 1, "L": 12}, {"T": 64, "L": 12}),
    "itm": ({"I": 1, "T": 64, "L": 12}, {"I": 8, "T": 1, "L": 12}),
}


def inputs_of(spec: GraphSpec, lengths: Mapping[str, int]) -> dict[str, np.ndarray]:
    rng, made = np.random.default_rng(0), {}
    for tensor in spec.inputs:
        shape = [lengths[axis] if isinstance(axis, str) else axis for axis in tensor.shape]
        if tensor.dtype == "int64":
            made[tensor.name] = np.ones(shape, np.int64) if "mask" in tensor.name else rng.integers(1, 1000, shape)
        elif tensor.name == "object_masks":
            made[tensor.name] = rng.integers(0, 2, shape).astype(np.float32)
        else:
            made[tensor.name] = rng.standard_normal(shape).astype(tensor.dtype)
    return made


def in_turns(sessions: Mapping[str, Session], inputs: dict[str, np.ndarray], repeats: int) -> dict[str, float]:
    """Medians in milliseconds; the first two turns, in which kernels are made, do not count."""
    seconds: dict[str, list[float]] = {provider: [] for provider in sessions}
    for turn in range(repeats + 2):
        for provider, session in sessions.items():
            began = time.perf_counter()
            session.run(inputs)
            if turn >= 2:
                seconds[provider].append(time.perf_counter() - began)
    return {provider: round(1e3 * statistics.median(found), 3) for provider, found in seconds.items()}


def largest(got: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> float:
    return max(float(np.abs(got[name] - expected[name]).max()) for name in expected)


def differences(folder: Path, opened: Mapping[str, Mapping[str, Session]]) -> dict[str, dict[str, float]]:
    """By graph: the largest difference over all recorded samples."""
    samples, found = load_file(folder / "samples.safetensors"), {}
    for graph, session in opened["cpu"].items():
        spec, pairs = session.spec, {"openvino_cpu": 0.0, "openvino_pytorch": 0.0, "cpu_pytorch": 0.0}
        cases = {key.split("/")[1] for key in samples if key.startswith(f"{graph}/") and "/out/" in key}
        for case in cases:
            inputs = {name: samples[f"{graph}/{case}/in/{name}"] for name in spec.input_names}
            pytorch = {name: samples[f"{graph}/{case}/out/{name}"] for name in spec.output_names}
            outputs = {provider: sessions[graph].run(inputs) for provider, sessions in opened.items()}
            now = {
                "openvino_cpu": largest(outputs["openvino"], outputs["cpu"]),
                "openvino_pytorch": largest(outputs["openvino"], pytorch),
                "cpu_pytorch": largest(outputs["cpu"], pytorch),
            }
            pairs = {name: max(value, now[name]) for name, value in pairs.items()}
        found[graph] = {name: float(f"{value:.2g}") for name, value in pairs.items()}
    return found


def measure(folder: Path, threads: int, repeats: int) -> dict[str, Any]:
    bundle = Bundle.open(folder)
    opened, seconds = {}, {}
    for provider in PROVIDERS:
        began = time.perf_counter()
        opened[provider] = open_sessions(bundle, provider, threads=threads)
        seconds[provider] = round(time.perf_counter() - began, 2)
    rows = []
    for graph, cases in LENGTHS.items():
        for lengths in cases:
            inputs = inputs_of(opened["cpu"][graph].spec, lengths)
            medians = in_turns({provider: opened[provider][graph] for provider in PROVIDERS}, inputs, repeats)
            ratio = round(medians["cpu"] / medians["openvino"], 2)
            rows.append({"graph": graph, "lengths": lengths, "median_ms": medians, "ratio": ratio})
            print(folder.name, rows[-1], flush=True)
    quantization = bundle.manifest.quantization or {}
    return {
        "checkpoint": bundle.manifest.checkpoint.name,
        "precision": bundle.manifest.precision,
        "quantization": {key: quantization[key] for key in ("form", "activations", "weights") if key in quantization},
        "open_seconds": seconds,
        "rows": rows,
        "difference": differences(folder, opened),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    report = {
        "what": "each graph in ONNX Runtime's CPU provider and in OpenVINO (float32 forced), in turns",
        "caution": "a shared machine under load (see machine.load for the start): ratios say more than milliseconds",
        "machine": describe_machine(),
        "threads": options.threads,
        "repeats": options.repeats,
        "bundles": [measure(folder, options.threads, options.repeats) for folder in options.bundles],
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
