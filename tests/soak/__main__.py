"""`make soak`: ten thousand hostile inputs, memory watched, then eight threads on one retriever."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from tiny_model import OPTIONS, THRESHOLD, VOCABULARY, tiny_checkpoint

from soak.running import concurrent_differences, memory_growth, resident_bytes, soak
from soak.targets import Bench

MEMORY_LIMIT = 32 << 20
"""Bytes. An allocator that returns pages late moves by a few megabytes; a leak of a few kilobytes an input by more."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, help="default: the smallest model there is, exported here")
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=50, help="of every thread")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["QPERT_CACHE"] = str(folder / "cache")
        bench = Bench(arguments.bundle or tiny_bundle(folder), folder)
        ok = soak_all(bench, arguments.inputs, arguments.seed)
        different = concurrent_differences(bench.retriever, threads=arguments.threads, rounds=arguments.rounds)
        print(f"{arguments.threads} threads x {arguments.rounds} rounds on one retriever: {different} results differ")
        bench.close()
    return 0 if ok and not different else 1


def tiny_bundle(folder: Path) -> Path:
    from qpert.exporter.export import ExportRequest, export_bundle
    from qpert.exporter.families.declare import Limits
    from qpert.runtime.inputs.perturbation import Perturbation

    checkpoint = tiny_checkpoint(folder / "tiny.pth")
    request = ExportRequest(
        "blip2",
        str(checkpoint),
        folder / "tiny",
        limits=Limits(3, 4, 6, 12),
        tokenizer=str(VOCABULARY),
        options=OPTIONS,
        perturbation=Perturbation(stages="both", threshold=THRESHOLD),
    )
    return export_bundle(request).folder


def soak_all(bench: Bench, inputs: int, first_seed: int) -> bool:
    """Every kind of input in turn, several times over, so that each is also tried in a process that has been used."""
    targets, turns = bench.targets(), 5
    share = -(-inputs // (len(targets) * turns))
    memory: list[int] = []
    totals = {target.name: {"inputs": 0, "accepted": 0, "seconds": 0.0} for target in targets}
    for turn in range(turns):
        for target in targets:
            outcome = soak(target, share, first_seed + 1000 * turn)
            total = totals[target.name]
            total["inputs"] += outcome.inputs
            total["accepted"] += outcome.accepted
            total["seconds"] += outcome.seconds
        memory.append(resident_bytes())
        print(f"turn {turn + 1} of {turns}: {memory[-1] / 1e6:.0f} MB in use", file=sys.stderr, flush=True)
    growth = memory_growth(memory)
    for name, total in totals.items():
        print(json.dumps({"kind": name, **{key: round(value, 1) for key, value in total.items()}}))
    count = sum(int(total["inputs"]) for total in totals.values())
    print(f"{count} inputs, no crash, no hang; memory grew by {growth / 1e6:.1f} MB (limit {MEMORY_LIMIT / 1e6:.0f})")
    return growth <= MEMORY_LIMIT


if __name__ == "__main__":
    sys.exit(main())
