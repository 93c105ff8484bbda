"""INT8 on blocks of the full-size vision tower (ViT-g/14 at 364 px) with random weights, against fp32 in the same run.

    python benchmarks/full_size_int8.py --work /tmp/int8 --blocks 8 --out benchmarks/results/full_size_int8.json

Traces the tower with the given number of blocks (39 is all of it), quantises it with `qpert.calibration.quantization`,
and runs fp32, static INT8 (what `qpert quantize` makes) and, for comparison, dynamic INT8 in turn. Random weights show
speed and memory, not accuracy; the angle between outputs is given because it must not be absurd.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shutil
import statistics
import sys
import time
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from full_size import machine, measured

GRAPHS = ("fp32", "int8", "int8_dynamic")
STEPS = ("make-fp32", "make-int8", "make-int8_dynamic")


def make_graph(work: Path, blocks: int) -> Path:
    """The tower's fp32 graph, exported as every graph is."""
    import torch

    from qpert.exporter.families.blip2.family import FAMILY
    from qpert.exporter.families.declare import Limits
    from qpert.exporter.tracing.onnx_files import write_graphs
    from qpert.exporter.tracing.trace import network_without_weights, trace_stage
    from qpert.exporter.tracing.weights import WeightedGraph, fold_weights
    from qpert.graphs.families.blip2.config import CONFIGS
    from qpert.graphs.passes import run_passes
    from qpert.runtime.progress import Silent

    config = CONFIGS["coco"]
    config = replace(config, vision=replace(config.vision, layers=blocks))
    network = network_without_weights(FAMILY, config, None, "fp32")
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}

    class RandomWeights:
        """Scaled so that activations stay of order one."""

        def get(self, name: str) -> torch.Tensor:
            shape = shapes[name]
            noise = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
            if len(shape) < 2:
                return 0.1 * noise + float("norm" in name and name.endswith("weight"))
            return noise / math.sqrt(math.prod(shape[1:]))

    spec = FAMILY.graphs(config, precision="fp32", stages="none", limits=Limits())["vision"]
    folded = fold_weights(trace_stage(FAMILY.stages(network)["vision"].eval(), spec).weighted())
    graph = WeightedGraph(run_passes(folded.graph), folded.recipes)
    weight_files = {"vision": FAMILY.card.weight_file(spec)}
    write_graphs(work / "fp32", {"vision": graph}, weight_files, RandomWeights(), Silent())
    return work / "fp32" / "vision.onnx"


def quantize(work: Path, images: int) -> None:
    """Static INT8, by the functions that `qpert quantize` calls, on smooth random pictures."""
    from qpert.calibration.graph_files import load_graph
    from qpert.calibration.quantization.candidates import find_candidates
    from qpert.calibration.quantization.static import quantize_all, tensor_ranges
    from qpert.calibration.quantization.storage import write_models

    path, scratch = work / "fp32" / "vision.onnx", work / "scratch"
    scratch.mkdir(exist_ok=True)
    candidates = find_candidates(load_structure(path))
    feeds = [{"pixel_values": pictures(1, seed)} for seed in range(images)]
    ranges = tensor_ranges(path, feeds, candidates, method="minmax", symmetric=False, folder=scratch)
    made = quantize_all(load_graph(path), ranges, candidates, target="cpu", reduce_range=False)
    write_models(work / "int8", {"vision": made}, {"vision": "vision.data"})
    shutil.rmtree(scratch)


def quantize_dynamic(work: Path) -> None:
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization import quantize_dynamic as dynamic

    from qpert.calibration.quantization.candidates import find_candidates

    path = work / "fp32" / "vision.onnx"
    (work / "int8_dynamic").mkdir()
    dynamic(
        path,
        work / "int8_dynamic" / "vision.onnx",
        per_channel=True,
        weight_type=QuantType.QInt8,
        nodes_to_quantize=[candidate.node for candidate in find_candidates(load_structure(path))],
        use_external_data_format=True,
    )


def load_structure(path: Path) -> Any:
    import onnx

    return onnx.load_model(path, load_external_data=False)


def pictures(count: int, seed: int) -> np.ndarray:
    """float32 [count, 3, 364, 364]: coarse noise blown up, as smooth as pictures are."""
    coarse = np.random.default_rng(seed).normal(size=(count, 3, 26, 26)).astype(np.float32)
    return np.repeat(np.repeat(coarse, 14, axis=2), 14, axis=3)


def start(path: Path, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def compare(work: Path, rounds: int, threads: int) -> dict[str, Any]:
    """Seconds an image, all forms in turn (the first round is not counted), and how far their outputs are apart."""
    sessions = {name: start(work / name / "vision.onnx", threads) for name in GRAPHS}
    seconds: dict[str, list[float]] = {name: [] for name in GRAPHS}
    outputs: dict[str, np.ndarray] = {}
    for number in range(rounds + 1):
        feed = {"pixel_values": pictures(1, 1000 + number)}
        for name, session in sessions.items():
            started = time.perf_counter()
            outputs[name] = session.run(None, feed)[0]
            seconds[name].append(time.perf_counter() - started)
    ratio = {name: [a / b for a, b in zip(seconds["fp32"][1:], seconds[name][1:], strict=True)] for name in GRAPHS}
    return {
        name: {
            "median_seconds": round(statistics.median(seconds[name][1:]), 3),
            "images_per_second": round(1 / statistics.median(seconds[name][1:]), 3),
            "median_ratio_to_fp32": round(statistics.median(ratio[name]), 2),
            "one_minus_cosine_worst": cosine_distance(outputs[name], outputs["fp32"]),
            "neighbour_max_abs": neighbour_effect(sessions[name]),
        }
        for name in GRAPHS
    }


def neighbour_effect(session: Any) -> float:
    """How far a row moves when a picture of three times the contrast is beside it."""
    one, other = pictures(1, 7), 3 * pictures(1, 8)
    alone = session.run(None, {"pixel_values": one})[0]
    beside = session.run(None, {"pixel_values": np.concatenate([one, other])})[0][:1]
    return float(np.abs(alone - beside).max())


def cosine_distance(got: np.ndarray, expected: np.ndarray) -> float:
    a, b = got.astype(np.float64), expected.astype(np.float64)
    return float((1 - (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)).max())


def run_once(path: Path, threads: int) -> None:
    """One image in a process of its own, for its peak memory."""
    session = start(path, threads)
    session.run(None, {"pixel_values": pictures(1, 0)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--blocks", type=int, default=8, help="of the tower's 39")
    parser.add_argument("--images", type=int, default=4, help="pictures that ranges are taken from")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--step", choices=[*STEPS, *(f"run-{name}" for name in GRAPHS)], help="one step, in its own process"
    )
    options = parser.parse_args()
    if options.step:
        return step(options)
    options.work.mkdir(parents=True)
    text = json.dumps(measure(options), indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")
    shutil.rmtree(options.work)
    return None


def step(options: argparse.Namespace) -> None:
    """What a child process does."""
    if options.step == "make-fp32":
        make_graph(options.work, options.blocks)
    elif options.step == "make-int8":
        quantize(options.work, options.images)
    elif options.step == "make-int8_dynamic":
        quantize_dynamic(options.work)
    else:
        run_once(options.work / options.step.removeprefix("run-") / "vision.onnx", options.threads)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    work = options.work
    base = [sys.executable, __file__, "--work", str(work), "--blocks", str(options.blocks)]
    base += ["--images", str(options.images), "--threads", str(options.threads)]
    made = {name: measured([*base, "--step", name]) for name in STEPS}
    alone = {name: measured([*base, "--step", f"run-{name}"]) for name in GRAPHS}
    sizes = {name: sum(path.stat().st_size for path in (work / name).iterdir()) for name in GRAPHS}
    forms = compare(work, options.rounds, options.threads)
    for name in GRAPHS:
        forms[name] |= {"bytes": sizes[name], "ratio_of_bytes": round(sizes[name] / sizes["fp32"], 3)}
        forms[name]["peak_gb_of_one_run"] = alone[name]["peak_gb"]
    return {
        "tower": f"ViT-g/14 at 364 px, {options.blocks} of 39 blocks, random weights",
        "made": made,
        "forms": forms,
        "rounds": options.rounds,
        "threads": options.threads,
        "load_average": round(os.getloadavg()[1], 1),
        "peak_gb_all_three_open": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "machine": machine(),
    }


if __name__ == "__main__":
    main()
