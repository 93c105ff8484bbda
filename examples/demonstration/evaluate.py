"""Measure the demonstration checkpoint on generated scenes: the numbers of its model card.

    python examples/demonstration/evaluate.py --out .cache/demonstration/evaluation.json

Recall of ITC and of ITC + ITM (score = ITM logit + ITC, top 64 re-ranked) on the test split; the ceiling that ambiguous
captions set; the paper's grid of the query perturbation, α × weight × τ, on the validation split by ITC, and its best
setting once on the test split. Nothing is chosen on the test split.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from scoring import EncodedSplit, Matcher, Perturber, encode_split, itc, open_model, settings_grid

from qpert.runtime.evaluation.metrics import RetrievalMetrics
from qpert.runtime.files import sha256_of, write_atomically
from qpert.runtime.inputs.datasets import read_dataset
from qpert.runtime.inputs.perturbation import WEIGHT_FUNCTIONS, Perturbation
from qpert.runtime.progress import Progress, Terminal
from qpert.runtime.scenes import SPLIT_SIZES, caption_ceiling, generate, write_dataset

MODEL = Path(__file__).parents[2] / "exporter" / "demo" / "model.safetensors"
THRESHOLDS = (0.85, 0.9, 0.95, 0.99)
ALPHAS = (2.0, 4.0, 6.0, 8.0, 10.0)
SEED = 0
"""Of the validation and test scenes."""


def open_split(folder: Path, split: str, count: int, progress: Progress) -> Any:
    """Written once, then read by the readers of the real data sets."""
    root = folder / f"{split}-{count}"
    if not (root / "annotations" / f"{split}.json").exists():
        write_dataset(root, split, count, SEED, progress=progress)
    return read_dataset(root, split)


def grid(split: EncodedSplit, model: Any, progress: Progress) -> list[dict[str, Any]]:
    """ITC recall of every setting, best first: by T2I R@1, then I2T R@1, then the smaller α."""
    rows = []
    with progress.stage("perturbation grid on the validation split", len(THRESHOLDS)) as advance:
        for threshold in THRESHOLDS:
            perturber = Perturber(model, split, threshold=threshold)
            for name, setting in settings_grid(dict(WEIGHT_FUNCTIONS), ALPHAS):
                setting = replace(setting, threshold=threshold)
                scores = itc(perturber.query_embeds(setting), split.text_embeds)
                found = summary(split.metrics(scores, scores))
                rows.append({"weight": name, "setting": asdict(setting), **found})
            advance(1)
    return sorted(rows, key=lambda row: (-row["t2i"]["r1"], -row["i2t"]["r1"], row["setting"]["alpha"]))


def summary(metrics: RetrievalMetrics) -> dict[str, Any]:
    whole = metrics.to_dict()
    return {key: whole[key] for key in ("t2i", "i2t", "small", "images", "texts")}


def evaluate(options: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    began = time.monotonic()
    model = open_model(options.model)
    report: dict[str, Any] = {"model": str(options.model.name), "sha256": sha256_of(options.model), "seed": SEED}
    stock = Perturbation(stages="none")
    val = encode_split(model, open_split(options.work, "val", options.val, progress))
    plain = itc(model.encode_queries(val.image_embeds), val.text_embeds)
    report["val"] = {"itc": summary(val.metrics(plain, plain))}
    best = None
    if not options.no_grid:
        rows = grid(val, model, progress)
        best = Perturbation(**rows[0]["setting"])
        report["val"]["grid"] = rows
    test = encode_split(model, open_split(options.work, "test", options.test, progress))
    scenes = list(generate("test", options.test, SEED))
    report["ceiling"] = asdict(caption_ceiling([scene for scene, _ in scenes], [captions for _, captions in scenes]))
    matcher = Matcher(model, test, progress, bf16=options.bf16_pairs)
    report["pairs_dtype"] = "bfloat16" if options.bf16_pairs else "float32"
    report["test"] = {}
    for name, setting in (("stock", stock), ("perturbed", best)):
        if setting is None:
            continue
        if setting.stages == "none":
            queries = model.encode_queries(test.image_embeds)
        else:
            queries = Perturber(model, test, threshold=setting.threshold).query_embeds(setting)
        scores = itc(queries, test.text_embeds)
        report["test"][name] = {"setting": asdict(setting), "itc": summary(test.metrics(scores, scores))}
        for k in sorted(options.rerank):
            final = matcher.final(scores, k)
            report["test"][name][f"itm_{k}"] = summary(test.metrics(*final))
            keep(options.out, report)
    report["seconds"] = round(time.monotonic() - began)
    return report


def keep(path: Path | None, report: dict[str, Any]) -> None:
    """Write the report as far as it is."""
    if path is not None:
        write_atomically(path, json.dumps(report, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--work", type=Path, default=Path(".cache/demonstration"), help="where the splits are written")
    parser.add_argument("--val", type=int, default=SPLIT_SIZES["val"])
    parser.add_argument("--test", type=int, default=SPLIT_SIZES["test"])
    parser.add_argument("--rerank", type=int, nargs="*", default=[64], help="top k for ITM; without a number, no ITM")
    parser.add_argument("--no-grid", action="store_true", help="leave the perturbation out")
    parser.add_argument("--bf16-pairs", action="store_true", help="ITM in bfloat16: faster, in three digits")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="also write the report here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    report = evaluate(options, Terminal())
    keep(options.out, report)
    brief = {**report, "val": {**report["val"], "grid": report["val"].get("grid", [])[:3]}}
    print(json.dumps(brief, indent=1))


if __name__ == "__main__":
    main()
