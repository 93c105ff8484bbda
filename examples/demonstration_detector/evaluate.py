"""Measure the shipped detector on the demonstration's test scenes: the numbers of its card.

    python examples/demonstration_detector/evaluate.py

Stock transformers on the shipped folder, float32, on a CPU; average precision by pycocotools. Nothing is chosen on the
test split.
"""

from __future__ import annotations

import argparse
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from average_precision import FOLDER, SEED, SMALL_SHARE, as_written, detect, kept, precision
from safetensors import safe_open
from transformers import AutoImageProcessor, AutoModelForObjectDetection

from qpert.runtime.files import sha256_of, write_atomically
from qpert.runtime.progress import Progress, Terminal
from qpert.runtime.scenes import SPLIT_SIZES, Scene, generate

REPORT = Path(__file__).with_name("evaluation.json")
THRESHOLD, OVERLAP, MOST = 0.3, 0.7, 32
"""How boxes are taken for retrieval: least score, greatest overlap of two boxes, most boxes."""


def evaluate(folder: Path, count: int, progress: Progress) -> dict[str, Any]:
    model = AutoModelForObjectDetection.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    scenes = [scene for scene, _ in generate("test", count, SEED)]
    found = []
    with progress.stage(f"detecting on {count} test scenes", count) as advance:
        for start in range(0, count, 20):
            pictures = [as_written(scene) for scene in scenes[start : start + 20]]
            found += detect(model, processor, pictures, 0.0)
            advance(len(pictures))
    apart = [kept(one, threshold=0.0, overlap=OVERLAP, most=MOST) for one in found]
    used = [kept(one, threshold=THRESHOLD, overlap=OVERLAP, most=MOST) for one in found]
    weights = folder / "model.safetensors"
    with safe_open(weights, "pt") as file:
        parameters = sum(file.get_tensor(name).numel() for name in list(file.keys()) if _is_weight(name))
    return {
        "sha256": sha256_of(weights),
        "bytes": weights.stat().st_size,
        "parameters": parameters,
        "pictures": count,
        "seed": SEED,
        "objects": sum(len(scene.objects) for scene in scenes),
        "objects_small": _count(scenes, 32**2),
        "objects_below_share": _count(scenes, SMALL_SHARE * (scenes[0].size[0] * scenes[0].size[1])),
        "by_class": {**precision(scenes, found), "ap_below_share": _below_share(scenes, found, one_class=False)},
        "one_class": {
            **precision(scenes, apart, one_class=True),
            "ap_below_share": _below_share(scenes, apart, one_class=True),
        },
        "as_used": as_used(scenes, used),
        "versions": {name: version(name) for name in ("torch", "transformers", "pycocotools", "pillow")},
    }


def as_used(scenes: list[Scene], used: list[Any]) -> dict[str, Any]:
    """The boxes that retrieval would get: how many objects they find, and how many of them are on an object, in
    percent, at an IoU of 0.5."""
    whole = precision(scenes, used, one_class=True)
    below = precision(scenes, used, one_class=True, small=SMALL_SHARE)
    boxes = sum(len(one.scores) for one in used)
    right = (whole["recall50"] or 0.0) / 100 * sum(len(scene.objects) for scene in scenes)
    return {
        "threshold": THRESHOLD,
        "overlap": OVERLAP,
        "most": MOST,
        "boxes_per_picture": boxes / len(scenes),
        "pictures_without_boxes": sum(not len(one.scores) for one in used),
        "recall50": whole["recall50"],
        "recall50_small": whole["recall50_small"],
        "recall50_below_share": below["recall50_small"],
        "precision50": 100 * right / boxes if boxes else None,
        "recall50_with_class": precision(scenes, used)["recall50"],
    }


def _below_share(scenes: list[Scene], found: list[Any], *, one_class: bool) -> float | None:
    return precision(scenes, found, small=SMALL_SHARE, one_class=one_class)["ap_small"]


def _count(scenes: list[Scene], limit: float) -> int:
    """Objects whose box has at most `limit` pixels, as pycocotools counts them."""
    pixels = (scene.area(item) * scene.size[0] * scene.size[1] for scene in scenes for item in scene.objects)
    return sum(round(area) <= limit for area in pixels)


def _is_weight(name: str) -> bool:
    """Not the statistics that batch norms keep."""
    return not name.endswith(("running_mean", "running_var", "num_batches_tracked"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--test", type=int, default=SPLIT_SIZES["test"], help="scenes of the test split")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=REPORT)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    report = evaluate(options.folder, options.test, Terminal())
    write_atomically(options.out, json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
