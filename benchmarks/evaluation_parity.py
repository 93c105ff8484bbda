"""`qpert eval` against PyTorch, pair by pair, on the generated test split: the same recall?

    python benchmarks/evaluation_parity.py --images 200 --out benchmarks/results/evaluation_parity_200.json
    python benchmarks/evaluation_parity.py --out benchmarks/results/evaluation_parity.json

The PyTorch side is written after LAVIS's `compute_sim_matrix` and `_report_metrics` and shares no line with
`qpert.runtime.evaluation`: eager float32 modules with the perturbation by `torch.linalg.eigh`, for every text its 64
best images and for every image its 64 best texts, each pair with a copy of its image's features, −100 for whatever is
not re-ranked. (LAVIS pads to 35 tokens; `--padded` does, too. Otherwise a row of 64 pairs is padded to its longest.)
Both sides keep what they have under `--work`, so that an interrupted comparison goes on; `seconds` are of the last run.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from full_size import machine
from torch import Tensor

from qpert.exporter.export import ExportRequest, export_bundle
from qpert.exporter.families.blip2.checkpoint import open_checkpoint
from qpert.exporter.families.blip2.family import FAMILY
from qpert.exporter.perturbation import graph_perturbation
from qpert.exporter.references.eager import TorchReference
from qpert.graphs.families.blip2.model import Blip2Retrieval
from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.evaluation.evaluate import evaluate
from qpert.runtime.evaluation.inputs import EvaluationData, open_data
from qpert.runtime.evaluation.result import Evaluation
from qpert.runtime.evaluation.work import Binding, open_work
from qpert.runtime.inputs.images import preprocess_images
from qpert.runtime.inputs.perturbation import box_inputs
from qpert.runtime.progress import Terminal
from qpert.runtime.retrieval.encoder import Encoder

K = 64
NOT_RERANKED = -100.0
CUTS = (1, 5, 10)


class PairByPair:
    """A BLIP-2 in eager PyTorch over one split, one image with one text at a time (in batches of such pairs)."""

    def __init__(self, bundle: Bundle, data: EvaluationData, *, padded: bool) -> None:
        self.padded = padded
        manifest, settings = bundle.manifest, bundle.manifest.perturbation
        with open_checkpoint("demo", image_size=manifest.preprocessing.size) as checkpoint:
            reference = TorchReference.open(FAMILY, checkpoint, manifest.graphs, graph_perturbation(settings))
        network = reference.network
        assert isinstance(network, Blip2Retrieval)
        self.network = network
        masks, weights = box_inputs(data.boxes, settings, manifest.token_grid)
        features, queries = [], []
        for start in range(0, len(data.dataset), 50):
            part = slice(start, start + 50)
            pixels = torch.from_numpy(preprocess_images(data.dataset.images[part], manifest.preprocessing))
            features.append(self.network.encode_image(pixels))
            boxes = torch.from_numpy(masks[part]), torch.from_numpy(weights[part])
            queries.append(self.network.encode_queries(features[-1], *boxes))
        self.features, self.queries = torch.cat(features), torch.cat(queries)
        self.ids, self.mask = self.tokens(bundle, data)
        parts = zip(self.ids.split(500), self.mask.split(500), strict=True)
        self.texts = torch.cat([self.network.encode_text(*part) for part in parts])

    @staticmethod
    def tokens(bundle: Bundle, data: EvaluationData) -> tuple[Tensor, Tensor]:
        """[T, 35]: padded to the full length, as LAVIS pads."""
        encoder = Encoder(bundle, "cpu", threads=1)
        tokens = encoder.tokenize(data.dataset.captions)
        encoder.close()
        wide = encoder.tokenizer.max_length - tokens.input_ids.shape[1]
        ids = np.pad(tokens.input_ids, ((0, 0), (0, wide)), constant_values=encoder.tokenizer.spec.pad_id)
        return torch.from_numpy(ids), torch.from_numpy(np.pad(tokens.attention_mask, ((0, 0), (0, wide))))

    def itc(self) -> Tensor:
        """[B, T]."""
        return torch.stack([(queries @ self.texts.T).amax(0) for queries in self.queries])

    def itm(self, images: Tensor, texts: Tensor) -> Tensor:
        """[P]: pair p is image `images[p]` with text `texts[p]`, its features repeated."""
        length = self.ids.shape[1] if self.padded else int(self.mask[texts].sum(1).max())
        ids, mask = self.ids[texts, None, :length], self.mask[texts, None, :length]
        return self.network.match(self.features[images], ids, mask)[:, 0]

    def matrices(self, k: int = K, folder: Path | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Image to text [B, T] and text to image [T, B], as `compute_sim_matrix` with `k_test` = k returns them.

        Rows are written to files in `folder` as they come; those that are there are not computed again.
        """
        itc = self.itc()
        return self.matrix(itc, "i2t", k, folder), self.matrix(itc.T.contiguous(), "t2i", k, folder)

    def matrix(self, itc: Tensor, way: str, k: int, folder: Path | None) -> np.ndarray:
        """One direction, [queries, candidates]."""
        rows = opened(folder and folder / f"{way}.npy", tuple(itc.shape))
        best = itc.topk(min(k, itc.shape[1]), dim=1)
        for row in np.flatnonzero(np.isnan(rows[:, 0])).tolist():
            columns, own = best.indices[row], torch.full_like(best.indices[row], row)
            itm = self.itm(own, columns) if way == "i2t" else self.itm(columns, own)
            line = np.full(itc.shape[1], NOT_RERANKED, np.float32)
            line[columns.numpy()] = (best.values[row] + itm).numpy()
            rows[row] = line
            if row % 500 == 499:  # an hour's work says how far it is
                print(f"{way} {row + 1} of {len(rows)}", file=sys.stderr, flush=True)
        return np.asarray(rows)


def opened(path: Path | None, shape: tuple[int, ...]) -> np.ndarray:
    """A matrix of NaN in memory, or in a file that may be filled in part."""
    if path is not None and path.exists():
        return np.load(path, mmap_mode="r+")
    if path is None:
        return np.full(shape, np.nan, np.float32)
    rows = np.lib.format.open_memmap(path, "w+", np.float32, shape)
    rows[:] = np.nan
    return rows


def recalls(i2t: np.ndarray, t2i: np.ndarray, owners: np.ndarray) -> dict[str, Any]:
    """R@K in percent and ranks, after LAVIS's retrieval task: argsort, then the first right answer."""
    by_image = np.argsort(-i2t, axis=1, kind="stable")
    by_text = np.argsort(-t2i, axis=1, kind="stable")
    ranks = {
        "t2i": np.array([np.flatnonzero(order == owner)[0] for order, owner in zip(by_text, owners, strict=True)]),
        "i2t": np.array([np.flatnonzero(owners[order] == image)[0] for image, order in enumerate(by_image)]),
    }
    share = {way: {f"r{cut}": float((own < cut).mean() * 100) for cut in CUTS} for way, own in ranks.items()}
    return {"recalls": share, "ranks": ranks}


def compare(evaluation: Evaluation, i2t: np.ndarray, t2i: np.ndarray) -> dict[str, Any]:
    """Both sides' recalls, how many of the first ten places differ, and the largest difference of a score."""
    owners = evaluation.data.dataset.image_of_caption
    stock, report = recalls(i2t, t2i, owners), evaluation.to_dict()
    ours = {way: {f"r{cut}": report[way][f"r{cut}"] for cut in CUTS} for way in ("t2i", "i2t")}
    scores = evaluation.scores
    own = {"t2i": scores.t2i_ranks(owners), "i2t": scores.i2t_ranks(owners)}
    tops = {
        "t2i": sum(
            (scores.images_for(text)[:10] != np.argsort(-t2i[text], kind="stable")[:10]).any()
            for text in range(len(t2i))
        ),
        "i2t": sum(
            (scores.texts_for(image)[:10] != np.argsort(-i2t[image], kind="stable")[:10]).any()
            for image in range(len(i2t))
        ),
    }
    shared = np.take_along_axis(i2t, scores.schedule.by_image, 1), np.take_along_axis(t2i, scores.schedule.by_text, 1)
    return {
        "qpert": ours,
        "pytorch": stock["recalls"],
        "largest_recall_difference": max(
            abs(ours[way][name] - stock["recalls"][way][name]) for way in ours for name in ours[way]
        ),
        "queries": {way: len(ranks) for way, ranks in own.items()},
        "queries_with_another_rank": {way: int((own[way] != stock["ranks"][way]).sum()) for way in own},
        "queries_with_another_top_ten": {way: int(count) for way, count in tops.items()},
        "largest_score_difference": max(
            score_difference(scores.i2t_scores, shared[0]), score_difference(scores.t2i_scores, shared[1])
        ),
        "mr1": {way: report[way]["mr1"] for way in ours},
        "small": report["small"],
        "itm_pairs": {
            "qpert": evaluation.itm_pairs,
            "pytorch": sum(row.shape[0] * min(K, row.shape[1]) for row in (i2t, t2i)),
        },
    }


def score_difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Over the pairs that both re-ranked (scores on the edge of a shortlist may be on one side only)."""
    both = theirs > NOT_RERANKED / 2
    return float(np.abs(ours - theirs)[both].max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, help="only so many of the 1,000 images")
    parser.add_argument("--padded", action="store_true", help="every text padded to 35 tokens in PyTorch")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--work", type=Path, default=Path("/tmp/qpert-evaluation-parity"), help="where results are kept"
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = open_data("demo", limit=options.images, progress=Terminal())
    folder = options.work / "bundle"
    bundle = Bundle.open(folder if folder.exists() else export_bundle(ExportRequest("blip2", "demo", folder)).folder)
    count = len(data.dataset)
    kept = options.work / f"pytorch-{count}{'-padded' * options.padded}"
    kept.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    with torch.inference_mode():
        i2t, t2i = PairByPair(bundle, data, padded=options.padded).matrices(folder=kept)
    seconds = time.perf_counter() - began
    encoder = Encoder(bundle, "cpu", threads=options.threads)
    work = open_work(options.work / f"qpert-{count}", Binding.of(encoder, data, "cpu"))
    evaluation = evaluate(encoder, data, rerank=K, work=work, progress=Terminal())
    found = {"images": count, "texts": len(data.dataset.captions), "rerank": K, "padded": options.padded}
    found |= compare(evaluation, i2t, t2i)
    found |= {"seconds": {"pytorch": round(seconds, 1), "qpert": evaluation.to_dict()["seconds"]}}
    found |= {"resumed": evaluation.resumed, "threads": options.threads, "machine": machine()}
    text = json.dumps(found, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
