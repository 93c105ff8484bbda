"""Build TensorRT-RTX engines of a full-size BLIP-2 checkpoint of random numbers, and measure what that costs.

    python benchmarks/full_size_engines.py --work /tmp/full --out benchmarks/results/full_size_engines.json

The checkpoint and the export are those of `full_size.py` (ViT-g/14 at 364 px, 1.17 billion parameters), in fp16. Each
graph is built by the command that a user types, in a process of its own, so that its peak memory is its own; no GPU is
needed. A target such as `sm80+sm89` is one engine for both. The figures are of building: nothing is run.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from full_size import ITEM_SIZE, machine, make_vocabulary, measured

from qpert.runtime.bundle.manifest import read_manifest
from qpert.runtime.sessions.tensorrt.engines import RECORD_NAME, engine_folders

TARGETS = "sm80+sm86+sm89+sm120,sm80,sm86,sm89,sm120"
QPERT = (sys.executable, "-m", "qpert.runtime.cli")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="a folder with 16 GB free")
    parser.add_argument("--precision", default="fp16", choices=list(ITEM_SIZE))
    parser.add_argument("--target", default=TARGETS, help=f"as of `qpert build` [default: {TARGETS}]")
    parser.add_argument("--out", type=Path, help="where the figures go, as JSON; written after each target")
    parser.add_argument("--note", default="", help="what else the machine was doing")
    parser.add_argument("--keep", action="store_true", help="keep bundle and engines")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    bundle = options.work / f"bundle-{options.precision}"
    figures: dict[str, Any] = {
        "precision": options.precision,
        "export": export(options.work, options.precision, bundle),
    }
    figures |= {
        "note": options.note,
        "machine": machine(),
        "tensorrt-rtx": importlib.metadata.version("tensorrt-rtx"),
        "targets": {},
    }
    graphs = read_manifest(bundle).graphs
    for target in options.target.split(","):
        figures["targets"][target] = {graph: build(bundle, target, graph) for graph in graphs}
        if options.out:
            options.out.write_text(json.dumps(figures, indent=1) + "\n")
        if not options.keep:
            shutil.rmtree(bundle / "engines")
    print(json.dumps(figures, indent=1))
    if not options.keep:
        shutil.rmtree(bundle)


def export(work: Path, precision: str, bundle: Path) -> dict[str, Any]:
    """Export the random checkpoint, made first where it is not there yet; seconds and peak memory of the export."""
    checkpoint, vocabulary = work / "random_coco.pth", work / "vocab.txt"
    if not checkpoint.exists():
        maker = Path(__file__).with_name("full_size.py")
        subprocess.run([sys.executable, maker, "--make-checkpoint", checkpoint, "--work", "."], check=True)
    make_vocabulary(vocabulary, 30522)
    command = ["export", "blip2", "--checkpoint", str(checkpoint), "--tokenizer", str(vocabulary), "--force"]
    return measured([*QPERT, *command, "--precision", precision, "--out", str(bundle)])


def build(bundle: Path, target: str, graph: str) -> dict[str, Any]:
    """Build one engine with `qpert build`; its seconds, the peak memory of the process, bytes of engine and weights."""
    command = ["build", str(bundle), "--flavor", "rtx", "--target", target, "--graph", graph, "--force"]
    figures = measured([*QPERT, *command])
    records = [json.loads((folder / RECORD_NAME).read_text()) for folder in engine_folders(bundle)]
    (record,) = [record for record in records if record["target"] == target]
    engine = record["graphs"][graph]
    return figures | {"build_seconds": engine["seconds"], "engine_bytes": engine["bytes"]}


if __name__ == "__main__":
    main()
