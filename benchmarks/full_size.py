"""Export a full-size BLIP-2 checkpoint of random numbers, and measure what that costs.

    python benchmarks/full_size.py --work /tmp/full --precision fp32 --out benchmarks/results/full_size_fp32.json

Makes a LAVIS `.pth` with exactly the names, shapes and dtypes of `blip2_finetune_coco.pth` (ViT-g/14 at 364 px, from
the fixture that stock LAVIS gave), exports it with the command that a user types, and reports wall time, peak memory
of the exporting process, disk against the weights, and how far ONNX Runtime is from PyTorch on a recorded image and
pair.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[1]
KEYS = REPOSITORY / "tests" / "fixtures" / "keys" / "lavis_coco.json"
ITEM_SIZE = {"fp32": 4, "fp16": 2, "bf16": 2}


def make_checkpoint(path: Path) -> None:
    """A LAVIS `.pth` of random numbers, scaled so that activations stay of order one through forty layers."""
    import torch

    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, entry in json.loads(KEYS.read_text())["files"]["checkpoint"].items():
        shape, dtype = entry_of(entry)
        if dtype.startswith("I"):
            tensors[name] = torch.arange(math.prod(shape)).reshape(shape)
            continue
        noise = torch.randn(shape, generator=generator)
        is_norm = "norm" in name.lower() or name.startswith("ln_")
        if is_norm:
            tensors[name] = 1 + 0.1 * noise if name.endswith("weight") else 0.1 * noise
        elif noise.ndim < 2:
            tensors[name] = 0.05 * noise
        else:
            tensors[name] = noise / math.sqrt(math.prod(shape[1:]))
    torch.save({"model": tensors}, path)


def entry_of(entry: str) -> tuple[list[int], str]:
    """Shape and dtype of a fixture's entry: `F32 1x32x768`, or `F32` alone for a scalar."""
    dtype, _, shape = entry.partition(" ")
    return [int(length) for length in shape.split("x")] if shape else [], dtype


def make_vocabulary(path: Path, size: int) -> None:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    path.write_text("\n".join([*special, *(f"word{i}" for i in range(size - len(special)))]) + "\n")


def measured(command: list[str]) -> dict[str, Any]:
    """Run a command to its end: wall seconds, and the kernel's figure of its peak resident memory."""
    started = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command} exited with {process.returncode}")
    return {"seconds": round(time.perf_counter() - started, 1), "peak_gb": round(usage.ru_maxrss / 2**20, 2)}


def compare_one(bundle: Path) -> dict[str, Any]:
    """One recorded image and one pair in ONNX Runtime against what PyTorch recorded: largest difference by graph."""
    from qpert.runtime.bundle.folder import Bundle
    from qpert.runtime.sessions.open import open_session
    from qpert.runtime.verification import run_selected, select

    opened = Bundle.open(bundle)
    samples = opened.samples()
    result: dict[str, Any] = {}
    for name, spec in opened.manifest.graphs.items():
        started = time.perf_counter()
        session = open_session(opened.graph_path(spec), spec)
        loaded = time.perf_counter()
        for case in (case for case in samples.cases if case.graph == name):
            first = {axis: np.array([0]) for axis in ("B", "I", "T")}
            started_run = time.perf_counter()
            outputs = run_selected(session, case, first)
            seconds = time.perf_counter() - started_run
            for tensor in spec.outputs:
                expected = select(case.expected[tensor.name], tensor, first)
                distance = float(np.abs(outputs[tensor.name].astype(np.float64) - expected).max())
                result[f"{name}/{case.name}"] = {"max_abs": distance, "seconds": round(seconds, 2)}
        result[f"{name}/open"] = {"seconds": round(loaded - started, 2)}
        session.close()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="a folder with 12 GB free")
    parser.add_argument("--precision", default="fp32", choices=list(ITEM_SIZE))
    parser.add_argument("--out", type=Path, help="where the figures go, as JSON")
    parser.add_argument("--make-checkpoint", type=Path, help="only make the checkpoint, in a process of its own")
    parser.add_argument("--keep", action="store_true", help="keep the bundle")
    options = parser.parse_args()
    if options.make_checkpoint:
        return make_checkpoint(options.make_checkpoint)
    options.work.mkdir(parents=True, exist_ok=True)
    bundle = options.work / f"bundle-{options.precision}"
    text = json.dumps(measure(options.work, options.precision, bundle), indent=1)
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")
    if not options.keep:
        shutil.rmtree(bundle)
    return None


def measure(work: Path, precision: str, bundle: Path) -> dict[str, Any]:
    """Export, inspect and compare; every figure of the result file."""
    checkpoint, vocabulary = work / "random_coco.pth", work / "vocab.txt"
    if not checkpoint.exists():
        subprocess.run([sys.executable, __file__, "--make-checkpoint", str(checkpoint), "--work", "."], check=True)
    make_vocabulary(vocabulary, 30522)
    qpert = [sys.executable, "-m", "qpert.runtime.cli"]
    command = ["export", "blip2", "--checkpoint", str(checkpoint), "--tokenizer", str(vocabulary), "--force"]
    figures = {"export": measured([*qpert, *command, "--precision", precision, "--out", str(bundle)])}
    figures["inspect"] = measured([*qpert, "inspect", str(bundle), "--json"])
    weights = sum(parameter_counts().values()) * ITEM_SIZE[precision]
    disk = sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file())
    figures["disk"] = {"bundle_bytes": disk, "weight_bytes": weights, "ratio": round(disk / weights, 4)}
    figures["against_pytorch"] = compare_one(bundle)
    tools = json.loads((bundle / "manifest.json").read_text())["tools"]
    return figures | {"precision": precision, "machine": machine(), "tools": tools}


def parameter_counts() -> dict[str, int]:
    """Numbers in each parameter that retrieval uses."""
    import torch

    from qpert.graphs.families.blip2.config import CONFIGS
    from qpert.graphs.families.blip2.model import Blip2Retrieval

    with torch.device("meta"):
        return {name: tensor.numel() for name, tensor in Blip2Retrieval(CONFIGS["coco"]).state_dict().items()}


def machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), "")
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "onnxruntime": importlib.metadata.version("onnxruntime"),
        "when": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


if __name__ == "__main__":
    main()
