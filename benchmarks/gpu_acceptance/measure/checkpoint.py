"""Writes a BLIP-2 checkpoint of random numbers, and its vocabulary: nothing is downloaded.

    python -m gpu_acceptance.measure.checkpoint full|small CHECKPOINT VOCABULARY

`full` has every name, shape and dtype of `blip2_finetune_coco.pth` (`benchmarks/full_size.py`). The vocabulary starts
with the words of the demonstration's captions, so that captions differ, and is filled up to the rows of the checkpoint.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import full_size
import full_size_speed

from gpu_acceptance.measure.output import run
from qpert.exporter.demo import VOCABULARY

if TYPE_CHECKING:
    from qpert.graphs.families.blip2.config import Blip2Config

STOCK_ROWS = 30523
"""bert-base-uncased and `[DEC]`, which the demonstration's words have too."""


def main(kind: str, checkpoint: Path, vocabulary: Path) -> dict[str, Any]:
    words = vocabulary_of(kind)
    if kind == "full":
        full_size.make_checkpoint(checkpoint)
    else:
        full_size_speed.write_random(checkpoint, small_config(len(words)))
    vocabulary.write_text("\n".join(words) + "\n", encoding="utf-8")
    return {"bytes": checkpoint.stat().st_size, "words": len(words)}


def vocabulary_of(kind: str) -> list[str]:
    """A word for each row of the checkpoint's word embeddings."""
    words = VOCABULARY.read_text(encoding="utf-8").split()
    more = STOCK_ROWS - len(words) if kind == "full" else 0
    return words + [f"[unused{number}]" for number in range(more)]


def small_config(words: int) -> Blip2Config:
    """One block, and a Q-Former of two layers: the least that has every part."""
    from qpert.graphs.families.blip2.config import Blip2Config, QFormerConfig, VisionConfig

    vision = VisionConfig("eva", 56, 14, 32, 1, 2, 64, 1e-6)
    return Blip2Config("small", vision, QFormerConfig(32, 2, 2, 48, 1, 4, words, 32), 16)


if __name__ == "__main__":
    raise SystemExit(run(lambda: main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))))
