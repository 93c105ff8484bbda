"""Export a full-size CoCa ViT-L/14 of random numbers, and compare every stage with stock open_clip.

    python benchmarks/coca_full_size.py --work /tmp/coca --out benchmarks/results/coca_full_size.json

Makes an open_clip checkpoint with the constructor of stock open_clip (`make open-clip-env`) and random numbers, caption
decoder included, exports it with the command that a user types, and holds the bundle against the stock model, which
reads the same picture files and captions with its own preprocessing and tokenizer: embeddings, rankings, and pictures
with boxes against the float64 eigendecomposition. Also reports time and peak memory.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
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
sys.path.insert(0, str(REPOSITORY / "tests"))
NAME = "coca_ViT-L-14"
CAPTIONS = [
    "a cat",
    "two dogs on a table",
    "wow!§ cat",
    "a red car in front of a house",
    "nothing",
    "a long text " * 40,
]


def measured(command: list[str | Path]) -> dict[str, Any]:
    """Run a command to its end: wall seconds, and the kernel's figure of its peak resident memory."""
    started = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command} exited with {process.returncode}")
    return {"seconds": round(time.perf_counter() - started, 1), "peak_gb": round(usage.ru_maxrss / 2**20, 2)}


def make_checkpoint(path: Path) -> None:
    """In the open_clip environment: stock's model at random."""
    code = (
        f"import sys; sys.path[:0] = [{str(REPOSITORY / 'tests')!r}, {str(path_of_worker().parent)!r}]\n"
        "import json, open_clip_worker as worker; worker.prepare_imports()\n"
        "import coca_models, torch, open_clip\n"
        f"model = coca_models.randomise(worker.build_model(open_clip.get_model_config({NAME!r})), 0)\n"
        f"torch.save(model.state_dict(), {str(path)!r})\n"
        "print(sum(p.numel() for p in model.parameters()), len(model.state_dict()))"
    )
    subprocess.run([python(), "-I", "-W", "ignore", "-c", code], check=True)


def python() -> Path:
    from qpert.exporter.families.coca.reference_open_clip import ENVIRONMENT

    return ENVIRONMENT.python()


def path_of_worker() -> Path:
    from qpert.exporter.families.coca.reference_open_clip import WORKER

    return WORKER


def stock(checkpoint: Path, pictures: list[Path], masks: Any, weights: Any) -> dict[str, np.ndarray]:
    """What open_clip makes of the picture files and captions."""
    from qpert.exporter.families.coca.model_config import published
    from qpert.exporter.families.coca.reference_open_clip import OpenClipReference

    with OpenClipReference.open(checkpoint, published(NAME).model, {}, image_size=224) as reference:
        pixels = np.stack([reference.pixels(file) for file in pictures])
        tokens = reference.run("vision", {"pixel_values": pixels})
        ids = reference.token_ids(CAPTIONS, 76)
        padded = np.zeros((len(ids), max(map(len, ids))), np.int64)
        for row, one in zip(padded, ids, strict=True):
            row[: len(one)] = one
        boxes = {"object_masks": masks, "box_weights": weights}
        return {
            "pixels": pixels,
            "tokens": tokens["image_embeds"],
            "images": reference.run("image_query", tokens)["query_embeds"],
            "with boxes": reference.run("image_query", tokens | boxes)["query_embeds"],
            "texts": reference.run("text", {"input_ids": padded})["text_embeds"],
        }


def compare(bundle: Path, checkpoint: Path) -> dict[str, Any]:
    from PIL import Image

    from qpert.runtime import Boxes, Retriever
    from qpert.runtime.inputs.perturbation import box_inputs

    pictures = sorted((REPOSITORY / "examples" / "photos").glob("*.jpg"))
    sizes = [Image.open(file).size for file in pictures]
    boxes = [Boxes(np.array([[w * 0.3, h * 0.3, w * 0.55, h * 0.6], [w * 0.5, 1, w - 1, h]]), (w, h)) for w, h in sizes]
    with Retriever.open(bundle) as retriever:
        started = time.perf_counter()
        plain = retriever.encode_images(pictures)
        seconds = time.perf_counter() - started
        perturbed = retriever.encode_images(pictures, boxes=boxes).query_embeds
        texts = retriever.encode_texts(CAPTIONS)
        manifest = retriever.encoder.manifest
        masks, weights = box_inputs(boxes, manifest.perturbation, manifest.token_grid)
    expected = stock(checkpoint, pictures, masks, weights)
    found = {"images": plain.query_embeds, "with boxes": perturbed, "texts": texts}
    distances = {name: float(np.abs(value - expected[name]).max()) for name, value in found.items()}
    ours, theirs = plain.query_embeds[:, 0] @ texts.T, expected["images"][:, 0] @ expected["texts"].T
    same = all((np.argsort(-ours, axis=a) == np.argsort(-theirs, axis=a)).all() for a in (0, 1))
    effect = float(np.abs(expected["with boxes"] - expected["images"]).max())
    ranks = {"rankings_identical": bool(same), "nearest_scores": nearest(theirs), "effect_of_boxes": effect}
    return {"max_abs": distances, **ranks, "pictures": len(pictures), "seconds_encode_images": round(seconds, 2)}


def nearest(scores: np.ndarray) -> float:
    """The least distance of two scores that a ranking compares."""
    return float(min(np.diff(np.sort(scores, axis=axis), axis=axis).min() for axis in (0, 1)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="a folder with 6 GB free")
    parser.add_argument("--out", type=Path, help="where the figures go, as JSON")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    checkpoint, bundle = options.work / "open_clip_pytorch_model.bin", options.work / "bundle"
    if not checkpoint.is_file():
        make_checkpoint(checkpoint)
    shutil.rmtree(bundle, ignore_errors=True)
    command = [sys.executable, "-m", "qpert.runtime.cli", "export", "coca", "--checkpoint", checkpoint, "--out", bundle]
    cost = measured([*command, "--max-batch", "2", "--max-boxes", "4", "--max-text", "6", "--alpha", "1"])
    weights = {file.name: file.stat().st_size for file in sorted((bundle / "onnx").glob("*.data"))}
    report = {
        "model": f"{NAME}, random weights",
        "checkpoint_bytes": checkpoint.stat().st_size,
        "export": cost,
        "weight_bytes": weights,
        "against_open_clip": compare(bundle, checkpoint),
        "machine": {"cpu_count": os.cpu_count(), "platform": platform.platform(), "load_average": os.getloadavg()},
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "onnx", "onnxruntime", "numpy")}
        | {"open_clip_torch": "3.3.0", "python": platform.python_version()},
        "when": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    text = json.dumps(report, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
