"""What a query set for each box costs: time of the query head, and bytes in a gallery, by number of boxes.

    python benchmarks/query_sets.py --work /tmp/sets --out benchmarks/results/query_sets.json

The Q-Former of BLIP-2 at its real size (768 wide, 12 layers, 32 queries, 677 image tokens of 1408 numbers) with random
weights, in ONNX Runtime. `sum` perturbs one set by all boxes; `each` gives every box a set of its own; both in turns on
the same image tokens, so that other load meets both. The vision tower is timed in PyTorch in the same turns, as one
layer 39 times: what the head costs is told as a share of encoding a picture, too.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
from full_size import machine
from pair_stage import VISION, make_stock, seconds_of, vision_tower

from qpert.exporter.export import ExportRequest, export_bundle
from qpert.exporter.families.declare import Limits
from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.gallery.catalogue import vector_columns
from qpert.runtime.gallery.spec import GallerySpec
from qpert.runtime.inputs.boxes import Boxes
from qpert.runtime.inputs.perturbation import Perturbation
from qpert.runtime.retrieval.encoder import Encoder

COUNTS = (1, 2, 4, 8, 16)


def exported(work: Path) -> Bundle:
    """The full-size Q-Former behind one layer of vision tower; made once a work folder."""
    stock, out = work / "stock", work / "bundle"
    if not out.exists():
        make_stock(stock)
        export_bundle(
            ExportRequest("blip2", str(stock), out, tokenizer=str(stock / "vocab.txt"), limits=Limits(17, 32, 64, 35))
        )
    return Bundle.open(out)


def some_boxes(count: int) -> Boxes:
    rng = np.random.default_rng(count)
    corners, sides = rng.uniform(0, 0.7, (count, 2)), rng.uniform(0.05, 0.3, (count, 2))
    return Boxes(np.concatenate([corners, corners + sides], axis=1) * 640, (640, 640))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Medians in milliseconds by number of boxes, and bytes a set takes."""
    bundle = exported(options.work)
    encoders = {
        "sum": Encoder(bundle, "cpu", threads=options.threads),
        "each": Encoder(bundle, "cpu", Perturbation(reduction="each"), threads=options.threads),
        "each+stock": Encoder(bundle, "cpu", Perturbation(reduction="each", keep_stock=True), threads=options.threads),
    }
    tokens = np.random.default_rng(0).standard_normal((1, 677, 1408)).astype(np.float32)
    tower, pixels = vision_tower(), torch.zeros(1, 3, VISION["image_size"], VISION["image_size"])
    found: dict[str, dict[int, list[float]]] = {name: {count: [] for count in (0, *COUNTS)} for name in encoders}
    vision: list[float] = []
    with torch.inference_mode():
        for turn in range(options.repeats + 1):
            seconds = seconds_of(lambda: tower(pixels))
            for count in (0, *COUNTS):
                boxes = [some_boxes(count) if count else None]
                for name, encoder in encoders.items():
                    once = seconds_of(lambda encoder=encoder, boxes=boxes: encoder.encode_features(tokens, boxes))
                    if turn:  # the first turn is not measured
                        found[name][count].append(once)
            if turn:
                vision.append(seconds)
    rows = [row(found, count, statistics.median(vision)) for count in (0, *COUNTS)]
    spec = GallerySpec.of(encoders["each"])
    return {
        "rows": rows,
        "vision_ms": round(1000 * statistics.median(vision), 1),
        "bytes_of_a_set": {column.name: column.row_bytes for column in vector_columns(spec)},
        "repeats": options.repeats,
        "threads": options.threads,
        "load": [round(value, 1) for value in os.getloadavg()],
        "machine": machine(),
    }


def row(found: dict[str, dict[int, list[float]]], count: int, vision: float) -> dict[str, Any]:
    """One number of boxes: medians of each reduction, and `each` against `sum` and against encoding a picture."""
    medians = {name: statistics.median(values[count]) for name, values in found.items()}
    picture = vision + statistics.median(found["sum"][0])
    return {
        "boxes": count,
        "ms": {name: round(1000 * value, 1) for name, value in medians.items()},
        "each_to_sum": round(medians["each"] / medians["sum"], 2),
        "more_than_without_boxes_of_image_encoding_percent": {
            name: round(100 * (value - statistics.median(found["sum"][0])) / picture, 1)
            for name, value in medians.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="a folder with 3 GB free")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--keep", action="store_true", help="keep the bundle")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    text = json.dumps(measure(options), indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")
    if not options.keep:
        shutil.rmtree(options.work)


if __name__ == "__main__":
    main()
