"""Speed beside accuracy: the demonstration in fp32, fp16 and INT8, each against PyTorch on the same machine.

    python benchmarks/speed_and_accuracy.py --work /tmp/precisions --out benchmarks/results/speed_and_accuracy.json

Each precision is exported (or quantised), compared with PyTorch by `qpert verify --level recall` and timed by
`qpert bench`. What `--work` already holds is not made again, so an interrupted run goes on; the timings, which want an
idle machine, come last and are always made anew. Exits 1 if a gate failed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BASELINES = {"fp32": "torch,torch-sdpa,torch-compile,hf", "fp16": "torch", "int8": "torch"}
"""On the CPU PyTorch computes in float32, whatever the bundle's precision."""
MADE_BY = {
    "fp32": ["export", "blip2", "--out", "fp32"],
    "fp16": ["export", "blip2", "--out", "fp16", "--precision", "fp16"],
    "int8": ["quantize", "fp32", "--out", "int8", "--precision", "int8"],
}


def qpert(arguments: Sequence[str], work: Path) -> str:
    """One command in `work`; a failed gate (exit 1) has an answer all the same. Progress goes to stderr."""
    command = [sys.executable, "-m", "qpert.runtime.cli", *arguments]
    done = subprocess.run(command, cwd=work, stdout=subprocess.PIPE, text=True)
    if done.returncode not in (0, 1):
        raise SystemExit(f"{' '.join(arguments)} exited with {done.returncode}")
    return done.stdout


def verified(precision: str, work: Path) -> dict[str, Any]:
    kept = work / f"verify_{precision}.json"
    if not kept.exists():
        report = qpert(["verify", precision, "--level", "recall", "--json"], work)
        kept.write_text(report)
    report = json.loads(kept.read_text())
    del report["comparisons"]
    return dict(report)


def timed(precision: str, work: Path, repeats: str) -> dict[str, Any]:
    options = [
        f"--baseline={BASELINES[precision]}",
        "--batch=1,8",
        "--boxes=0,1,8,32",
        f"--repeats={repeats}",
        "--json",
    ]
    return dict(json.loads(qpert(["bench", precision, *options], work)))


def size_of(folder: Path) -> int:
    """Bytes of the graphs and their weights."""
    return sum(path.stat().st_size for path in (folder / "onnx").iterdir())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="a folder for the bundles and what is finished")
    parser.add_argument("--out", type=Path, required=True, help="where the figures go, as JSON")
    parser.add_argument("--repeats", default="11")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    for precision, command in MADE_BY.items():
        if not (options.work / precision).exists():
            qpert(command, options.work)
    found: dict[str, Any] = {}
    for precision in MADE_BY:
        accuracy = verified(precision, options.work)
        found[precision] = {"graph_bytes": size_of(options.work / precision), "verify": accuracy}
    for precision in MADE_BY:
        found[precision]["bench"] = timed(precision, options.work, options.repeats)
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    failed = [name for name, each in found.items() if each["verify"]["verdict"] != "pass"]
    if failed:
        print(f"a gate failed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
