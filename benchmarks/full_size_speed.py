"""Speed at full size, beside PyTorch in the same minutes: `qpert bench` on BLIP-2's dimensions with random weights.

    python benchmarks/full_size_speed.py --work /tmp/speed --out benchmarks/results/full_size_speed.json

The Q-Former is whole. Of ViT-g's 39 equal blocks the first few are there, at 364 px, so that it fits a small machine;
`--blocks 39` is the whole. What the perturbation costs is given as a share of image encoding: the time that boxes add
to `image_query`, over `vision` with all 39 blocks, each of which takes what the measured ones take on average.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qpert.graphs.families.blip2.config import Blip2Config

REPOSITORY = Path(__file__).resolve().parents[1]
VOCABULARY = REPOSITORY / "exporter" / "demo" / "vocab.txt"
WHOLE = 39
VOCABULARY_SIZE = 1024
"""Of the demonstration's tokenizer: an embedding is looked up, so its size changes no time."""


def make_checkpoint(path: Path, blocks: int) -> None:
    """A LAVIS `.pth` of BLIP-2's dimensions, with fewer blocks in its vision tower."""
    from qpert.graphs.families.blip2.config import CONFIGS

    coco = CONFIGS["coco"]
    config = replace(
        coco,
        vision=replace(coco.vision, layers=blocks),
        qformer=replace(coco.qformer, vocab_size=VOCABULARY_SIZE),
    )
    write_random(path, config)


def write_random(path: Path, config: Blip2Config) -> None:
    """A LAVIS `.pth` of random numbers, scaled so that activations stay of order one."""
    import torch

    from qpert.graphs.families.blip2.model import Blip2Retrieval

    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Blip2Retrieval(config).state_dict().items()}
    generator = torch.Generator().manual_seed(0)

    def draw(name: str, shape: torch.Size) -> torch.Tensor:
        noise = torch.randn(shape, generator=generator)
        if len(shape) < 2:
            return 0.05 * noise + float("norm" in name.lower() and name.endswith("weight"))
        return noise / math.sqrt(math.prod(shape[1:]))

    torch.save({"model": {name: draw(name, shape) for name, shape in shapes.items()}}, path)


def qpert(arguments: Sequence[str]) -> str:
    """One command; its progress goes to this process's stderr."""
    command = [sys.executable, "-m", "qpert.runtime.cli", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def summary(rows: list[dict[str, Any]], blocks: int) -> dict[str, Any]:
    """The figures that the README quotes: ratios to eager PyTorch, and the perturbation's share of image encoding."""
    eager = [row for row in rows if row["baseline"] in (None, "torch")]
    found: dict[str, Any] = {
        f"{row['stage']}, batch {row['batch']}, {row['boxes']} boxes": {"times": row["ratio"], "cpu": row["cpu_ratio"]}
        for row in eager
    }
    by_size = {(row["stage"], row["batch"], row["boxes"]): row for row in eager}
    vision, stock = by_size.get(("vision", 1, 0)), by_size.get(("image_query", 1, 0))
    if vision is None or stock is None:
        return {"torch over qpert": found}
    shares = {}
    for (stage, batch, boxes), row in by_size.items():
        if stage == "image_query" and batch == 1 and boxes:
            shares[f"{boxes} boxes"] = {
                clock: round((row[clock] - stock[clock]) / (vision[clock] * WHOLE / blocks), 5)
                for clock in ("median_ms", "cpu_ms")
            }
    return {"torch over qpert": found, "perturbation over image encoding": shares}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="a folder with 3 GB free (12 GB for all blocks)")
    parser.add_argument("--out", type=Path, help="where the figures go, as JSON")
    parser.add_argument("--blocks", type=int, default=4, help="of the 39 blocks of the vision tower")
    parser.add_argument("--baseline", default="torch,torch-sdpa")
    parser.add_argument("--stage", default="vision,image_query,text,itm")
    parser.add_argument("--batch", default="1")
    parser.add_argument("--boxes", default="0,1,8,32")
    parser.add_argument("--repeats", default="9")
    parser.add_argument("--threads", default="0")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoint and the bundle")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    checkpoint, bundle = options.work / f"random_{options.blocks}.pth", options.work / f"bundle_{options.blocks}"
    if not checkpoint.exists():
        make_checkpoint(checkpoint, options.blocks)
    if not bundle.exists():
        source = ["--checkpoint", str(checkpoint), "--tokenizer", str(VOCABULARY)]
        qpert(["export", "blip2", *source, "--out", str(bundle)])
    sizes = [f"--{name}={getattr(options, name)}" for name in ("stage", "batch", "boxes", "repeats", "threads")]
    report = json.loads(qpert(["bench", str(bundle), f"--baseline={options.baseline}", *sizes, "--json"]))
    report = {"vision_blocks": options.blocks, "summary": summary(report["rows"], options.blocks)} | report
    text = json.dumps(report, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")
    if not options.keep:
        shutil.rmtree(bundle)
        checkpoint.unlink()


if __name__ == "__main__":
    main()
