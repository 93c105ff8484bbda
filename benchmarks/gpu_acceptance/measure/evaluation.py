"""Throughput of an evaluation, and what it means for Flickr30K and COCO.

    python -m gpu_acceptance.measure.evaluation BUNDLE --provider cuda --images 256

`evaluate` as `qpert eval` calls it, from image files to ranks, on generated scenes with five captions each: with 64
candidates an image meets as many texts as in both data sets. The first run is not counted: it allocates, and its shapes
are new. The scenes' captions are longer than COCO's (18 tokens against some 14). No boxes: it is the stock evaluation.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_acceptance.measure.device import Accelerator
from gpu_acceptance.measure.output import run
from gpu_acceptance.measure.speed import without_gpu
from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.bundle.manifest import Manifest
from qpert.runtime.evaluation.evaluate import evaluate
from qpert.runtime.evaluation.inputs import DEMO, NO_BOXES, EvaluationData, open_data
from qpert.runtime.evaluation.result import Evaluation
from qpert.runtime.evaluation.work import Binding, open_work
from qpert.runtime.progress import Terminal
from qpert.runtime.retrieval.encoder import SHORTLIST, Encoder


@dataclass(frozen=True)
class DataSet:
    """The size of a test split. pairs: with 64 candidates of each text and of each image (tensorrt.md)."""

    images: int
    texts: int
    pairs: int


DATA_SETS = {
    "Flickr30K": DataSet(1_000, 5_000, 384_000),
    "COCO-5K": DataSet(5_000, 25_010, 1_920_640),
}


def main(given: argparse.Namespace) -> dict[str, Any]:
    peak = Accelerator(given.provider).peak_flops()
    opened = Bundle.open(given.bundle)
    data = open_data(DEMO, boxes=NO_BOXES, limit=given.images, progress=Terminal())
    with closing(Encoder(opened, given.provider)) as encoder:
        evaluated(encoder, data)
        found = evaluated(encoder, data)
        length = round(float(encoder.tokenize(data.dataset.captions).attention_mask.sum(axis=1).mean()))
    rates = rates_of(found)
    return {
        "images": len(data.dataset),
        "texts": len(data.dataset.captions),
        "pairs": found.itm_pairs,
        "tokens_of_a_text": length,
        "seconds": found.seconds,
        "per_second": rates,
        "peak_tflops": peak / 1e12,
        "data_sets": {
            name: {"seconds": seconds_of(size, rates), "pflop": flops_of(size, opened.manifest, length) / 1e15}
            for name, size in DATA_SETS.items()
        },
    }


def evaluated(encoder: Encoder, data: EvaluationData) -> Evaluation:
    """One evaluation in a work folder of its own, so that nothing is resumed."""
    folder = Path(tempfile.mkdtemp(prefix="qpert-acceptance-"))
    try:
        work = open_work(folder / "work", Binding.of(encoder, data, encoder.provider))
        return evaluate(encoder, data, rerank=SHORTLIST, work=work, progress=Terminal())
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def rates_of(found: Evaluation) -> dict[str, float]:
    counted = {
        "images": len(found.data.dataset),
        "texts": len(found.data.dataset.captions),
        "pairs": found.itm_pairs,
    }
    return {name: count / found.seconds[name] for name, count in counted.items()}


def seconds_of(size: DataSet, rates: Mapping[str, float]) -> float:
    """Images, texts and pairs at the measured rates. First scores and ranks, seconds on the CPU, are not in it."""
    return size.images / rates["images"] + size.texts / rates["texts"] + size.pairs / rates["pairs"]


def flops_of(size: DataSet, manifest: Manifest, length: int) -> float:
    """FLOPs of the matrix products of all graphs; an image's keys and values count once, for all its texts."""
    scorer = manifest.pair_scorer
    assert scorer is not None  # the measured model has one
    texts = round(size.pairs / size.images)
    image = manifest.image_tower.count_flops({"B": 1}) + manifest.query_head.count_flops({"B": 1, "O": 0})
    pairs = scorer.count_flops({"I": 1, "T": texts, "L": length, "O": 0})
    return float(size.images * (image + pairs) + size.texts * manifest.text_tower.count_flops({"T": 1, "L": length}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--provider", required=True)
    parser.add_argument("--images", type=int, required=True)
    arguments = parser.parse_args()
    raise SystemExit(run(lambda: without_gpu(main, arguments)))
