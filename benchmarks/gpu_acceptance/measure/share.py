"""What boxes cost, as a share of image encoding: the time that they add to the query head, over the vision tower's.

    python -m gpu_acceptance.measure.share BUNDLE --provider cuda --batches 1,8 --boxes 0,1,8,32

All calls of a batch size are measured in turns, so that a clock that drifts meets all of them.
"""

from __future__ import annotations

import argparse
from contextlib import closing
from pathlib import Path
from typing import Any

from gpu_acceptance.measure.device import Accelerator
from gpu_acceptance.measure.output import counts, run
from gpu_acceptance.measure.speed import GraphSpeed, without_gpu
from qpert.runtime.benchmark.timing import Schedule, interleaved
from qpert.runtime.benchmark.workloads import make_workload
from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.errors import QpertError
from qpert.runtime.retrieval.encoder import Encoder


def main(given: argparse.Namespace) -> dict[str, Any]:
    accelerator = Accelerator(given.provider)
    schedule = Schedule(repeats=given.repeats, seconds=given.seconds)
    rows: list[dict[str, Any]] = []
    with closing(Encoder(Bundle.open(given.bundle), given.provider)) as encoder:
        manifest = encoder.manifest
        sides = {
            name: GraphSpeed(encoder, name, accelerator, (), schedule)
            for name in (manifest.image_tower.name, manifest.query_head.name)
        }
        for batch in given.batches:
            sizes = [(manifest.image_tower.name, batch, 0)]
            sizes += [(manifest.query_head.name, batch, boxes) for boxes in given.boxes]
            try:
                calls = {
                    f"{name}/{boxes}": sides[name].own_call(make_workload(manifest, sides[name].features, size))
                    for size in sizes
                    for name, _, boxes in [size]
                }
                timings = interleaved(calls, schedule)
            except QpertError as error:
                rows += [{"batch": batch, "boxes": boxes, "error": str(error)} for boxes in given.boxes if boxes]
                continue
            vision, *heads = (timings[f"{name}/{boxes}"].median_ms for name, _, boxes in sizes)
            stock = heads[given.boxes.index(0)]
            for boxes, milliseconds in zip(given.boxes, heads, strict=True):
                if boxes:
                    share = 100 * (milliseconds - stock) / vision
                    rows.append({"batch": batch, "boxes": boxes, "percent": share, "ms": milliseconds - stock})
                else:
                    rows.append({"batch": batch, "boxes": 0, "vision_ms": vision, "image_query_ms": milliseconds})
    return {"rows": rows}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--provider", required=True)
    parser.add_argument("--batches", type=counts, required=True)
    parser.add_argument("--boxes", type=counts, required=True)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=60.0)
    arguments = parser.parse_args()
    raise SystemExit(run(lambda: without_gpu(main, arguments)))
