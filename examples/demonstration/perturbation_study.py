"""What boxes do for a demonstration checkpoint: every way to put them together, on two sets of captions.

    python examples/demonstration/perturbation_study.py --checkpoint demo-small-objects --rerank 16 \
        --out benchmarks/results/demonstration_boxes.json

Settings are chosen on the 500 validation scenes and reported on the 1,000 test scenes, ITC alone (with --rerank also
ITC + ITM), with intervals of the difference to no boxes: a paired bootstrap over pictures. The captions are those of
the demonstration's splits ("present") and two for each scene that name its smallest group of objects ("smallest").
A setting is chosen for each way by the mean of both sets' T2I R@1, for each set by its own, and by the smallest
captions' among those that do no harm to the present ones. Detected boxes, if there are any, are tested with the
settings chosen on true ones. `--keys`: the key biases (see `key_centring.py`).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from attention_shares import attention
from evaluate import keep
from key_centring import background_mean, set_key_centre
from scoring import Matcher, open_model
from study_data import CAPTIONS, WAYS, Point, Scorer, StudySplit, ceilings, detected_boxes, open_study_split

from qpert.exporter import demo
from qpert.graphs.families.blip2.model import Blip2Retrieval
from qpert.runtime.evaluation.bootstrap import Hits, draws, interval, once
from qpert.runtime.evaluation.bootstrap import scores as recall_scores
from qpert.runtime.evaluation.metrics import image_to_text_ranks, text_to_image_ranks
from qpert.runtime.files import sha256_of
from qpert.runtime.inputs.perturbation import WEIGHT_FUNCTIONS
from qpert.runtime.progress import Progress, Terminal
from qpert.runtime.scenes import SPLIT_SIZES

ALPHAS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
THRESHOLDS = (0.85, 0.9, 0.95, 0.99)
OBJECTIVES = ("both", *CAPTIONS)
UNHARMED = "present unharmed"
SCORES = ("r1", "mr1", "small")
Ranks = dict[str, tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]
"""Of each text's picture, and of each picture's first own text, by set of captions."""


def grid(scorer: Scorer, progress: Progress, alphas: tuple[float, ...]) -> list[dict[str, Any]]:
    """T2I and I2T R@1 in percent of every setting, on both sets of captions."""
    rows = []
    steps = [(t, w, a) for t in THRESHOLDS for w in WEIGHT_FUNCTIONS for a in alphas]
    with progress.stage("settings on the validation split", len(steps)) as advance:
        for threshold, weight, alpha in steps:
            for way in WAYS:
                point = Point(way, weight, alpha, threshold)
                rows.append({**asdict(point), **recall_at_1(scorer.split, scorer.scores(point))})
            advance(1)
    return rows


def recall_at_1(split: StudySplit, scores: np.ndarray) -> dict[str, float]:
    found = {}
    for captions in CAPTIONS:
        for direction, ranks in zip(("t2i", "i2t"), split.ranks(scores, captions), strict=True):
            found[f"{captions}_{direction}"] = round(100 * float((ranks == 0).mean()), 3)
    return found


def chosen(rows: list[dict[str, Any]], way: str, objective: str) -> Point:
    """The best row of a way; of equal ones that with the smallest α, then the one tried first."""
    sets = CAPTIONS if objective == "both" else (objective,)
    best = max(
        (row for row in rows if row["way"] == way), key=lambda r: (sum(r[f"{s}_t2i"] for s in sets), -r["alpha"])
    )
    return Point(way, best["weight"], best["alpha"], best["threshold"])


def ranks_of(split: StudySplit, scores: np.ndarray) -> Ranks:
    return {captions: split.ranks(scores, captions) for captions in CAPTIONS}


def unharmed(val: dict[str, Any], way: str) -> Point | None:
    """Of a way's best settings of each α, the one that finds most by captions of the smallest object among those that
    are on the validation split not worse than no boxes by present captions, in either direction."""
    rows = [
        row
        for row in val["best"]
        if row["way"] == way and all(row[key] >= val["stock"][key] for key in ("present_t2i", "present_i2t"))
    ]
    if not rows:
        return None
    best = max(rows, key=lambda row: (row["smallest_t2i"], -row["alpha"]))
    return Point(way, best["weight"], best["alpha"], best["threshold"])


def compared(split: StudySplit, sides: dict[str, Ranks]) -> dict[str, Any]:
    """For each side: R@1, mR@1 and the small bin's R@1 in percent, and their difference to "stock" with its 95 %
    interval. small: pictures whose largest box covers less than a tenth."""
    names, areas = list(sides), split.encoded.areas
    stock = names.index("stock")
    result: dict[str, Any] = {name: {} for name in names}
    for captions in CAPTIONS:
        ranks = [sides[name][captions] for name in names]
        owners = split.owners[split.part(captions)]
        hits = {
            "t2i": Hits.of_texts([t2i for t2i, _ in ranks], owners, areas),
            "i2t": Hits.of_images([i2t for _, i2t in ranks], areas),
        }
        for direction, one in hits.items():
            for score in SCORES:
                whole = recall_scores(one, once(len(areas)), score)[0]
                drawn = np.concatenate([recall_scores(one, part, score) for part in draws(len(areas))])
                for column, name in enumerate(names):
                    low, high = interval(drawn[:, column] - drawn[:, stock])
                    result[name].setdefault(captions, {}).setdefault(direction, {})[score] = {
                        "value": round(float(whole[column]), 2),
                        "gain": round(float(whole[column] - whole[stock]), 2),
                        "interval": [round(low, 2), round(high, 2)],
                    }
    return result


def study(options: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    began = time.monotonic()
    weights = demo.model_file(options.checkpoint) if options.model is None else options.model
    model = open_model(weights)
    splits = {
        name: open_study_split(model, name, count, options.work, progress)
        for name, count in (("val", options.val), ("test", options.test))
    }
    sources = {name: {"true": list(split.encoded.boxes)} for name, split in splits.items()}
    if options.detections:
        for name, split in splits.items():
            found = detected_boxes(split, options.detections / f"{name}.jsonl", options.least_score, options.most_boxes)
            sources[name]["detected"] = found
    report: dict[str, Any] = {
        "sha256": sha256_of(weights),
        "images": {name: len(split.encoded.dataset) for name, split in splits.items()},
        "captions": {
            name: {"present": split.first, "smallest": len(split.owners) - split.first}
            for name, split in splits.items()
        },
        "ceiling": ceilings("test", options.test),
        "grid": {"alphas": options.alphas, "thresholds": THRESHOLDS, "weights": list(WEIGHT_FUNCTIONS), "ways": WAYS},
        "boxes": {
            name: {source: round(float(np.mean([len(each) for each in boxes])), 2) for source, boxes in found.items()}
            for name, found in sources.items()
        },
        "keys": {},
    }
    own = own_report(options, report["sha256"]) if options.again else {"keys": {}}
    before, report["grid"] = own["keys"], own.get("grid", report["grid"])
    centre = background_mean(splits["val"].encoded.image_embeds, splits["val"].encoded.boxes)
    shipped = [cross.self.key.bias.clone() for cross in model.Qformer.cross_attentions]
    for keys in options.keys:
        if keys == "shipped":
            for cross, bias in zip(model.Qformer.cross_attentions, shipped, strict=True):
                cross.self.key.bias.data.copy_(bias)
        else:
            set_key_centre(model, centre if keys == "centred" else None)
        for found in of_keys(model, splits, sources, options, before.get(keys), progress):
            report["keys"][keys] = found
            report["seconds"] = round(time.monotonic() - began)
            write(options, report)
    return report


def write(options: argparse.Namespace, report: dict[str, Any]) -> None:
    """Put the report into the file, under the checkpoint's name. Those of other checkpoints stay, and of the same file
    those with other key biases."""
    if options.out is not None:
        before = json.loads(options.out.read_text()) if options.out.exists() else {}
        keys = {**own_report(options, report["sha256"])["keys"], **report["keys"]}
        keep(options.out, {**before, options.checkpoint: {**report, "keys": keys}})


def own_report(options: argparse.Namespace, sha256: str) -> dict[str, Any]:
    """What the file holds of these weights."""
    before = json.loads(options.out.read_text()) if options.out and options.out.exists() else {}
    own = before.get(options.checkpoint, {})
    return own if own.get("sha256") == sha256 else {"keys": {}}


def of_keys(
    model: Blip2Retrieval,
    splits: dict[str, StudySplit],
    sources: Any,
    options: argparse.Namespace,
    before: dict[str, Any] | None,
    progress: Progress,
) -> Iterator[dict[str, Any]]:
    """The search and the test with the key biases that `model` has now: the report as it grows. `before`: that of an
    earlier run, whose settings are tested again instead of a search."""
    if before is None:
        validation = Scorer(model, splits["val"], sources["val"]["true"])
        rows = grid(validation, progress, tuple(options.alphas))
        picked = {f"{way}, for {objective}": chosen(rows, way, objective) for way in WAYS for objective in OBJECTIVES}
        val = {"stock": recall_at_1(splits["val"], validation.stock), "best": _best(rows)}
        found: dict[str, Any] = {"val": val}
    else:
        found = dict(before)
        picked = {name: Point(**point) for name, point in before["settings"].items()}
    picked |= {f"{way}, {UNHARMED}": point for way in WAYS if (point := unharmed(found["val"], way))}
    found["settings"] = {name: asdict(point) for name, point in picked.items()}
    for source, boxes in sources["test"].items():
        test = Scorer(model, splits["test"], boxes)
        scores = {"stock": test.stock} | {name: test.scores(point) for name, point in picked.items()}
        found[source] = {"itc": compared(test.split, {name: ranks_of(test.split, one) for name, one in scores.items()})}
        if source == "true":
            points = {name: picked[f"each, for {name}"] for name in OBJECTIVES}
            found[source]["attention"] = attention(test, points)
        if before is not None:
            found[source] = {**before.get(source, {}), **found[source]}
        yield found
        if options.rerank:
            found[source] |= reranked(model, splits["test"], scores, options, progress)
            yield found


def _best(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The best setting of each way and α by both sets of captions: what a larger α does."""
    best: dict[tuple[str, float], dict[str, Any]] = {}
    for row in rows:
        key = row["way"], row["alpha"]
        if key not in best or row["present_t2i"] + row["smallest_t2i"] > (
            best[key]["present_t2i"] + best[key]["smallest_t2i"]
        ):
            best[key] = row
    return list(best.values())


def reranked(
    model: Blip2Retrieval,
    split: StudySplit,
    scores: dict[str, np.ndarray],
    options: argparse.Namespace,
    progress: Progress,
) -> dict[str, Any]:
    """ITC + ITM of the top K of each direction, for the ways chosen by both sets; ITM sees no boxes (the paper)."""
    sides: dict[str, Ranks] = {name: {} for name in ("stock", *(f"{way}, for both" for way in options.rerank_ways))}
    for captions in CAPTIONS:
        part, owners = split.part(captions), split.owners[split.part(captions)]
        pairs = replace(split.encoded, ids=split.ids[part], mask=split.mask[part])
        matcher = Matcher(model, pairs, progress, bf16=True)
        for name, ranks in sides.items():
            t2i, i2t = matcher.final(scores[name][:, part], options.rerank)
            ranks[captions] = text_to_image_ranks(t2i, owners), image_to_text_ranks(i2t, owners)
    return {f"itm_{options.rerank}": compared(split, sides)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", choices=demo.NAMES, default="demo-small-objects")
    parser.add_argument("--model", type=Path, help="another file than the built-in one, under its name")
    parser.add_argument("--work", type=Path, default=Path(".cache/demonstration"), help="where the splits are written")
    parser.add_argument("--val", type=int, default=SPLIT_SIZES["val"])
    parser.add_argument("--test", type=int, default=SPLIT_SIZES["test"])
    parser.add_argument("--alphas", type=float, nargs="+", default=ALPHAS)
    parser.add_argument("--keys", nargs="+", choices=("shipped", "zero", "centred"), default=["shipped", "zero"])
    parser.add_argument(
        "--again", action="store_true", help="no search: test the settings that --out has, on these boxes and captions"
    )
    parser.add_argument("--detections", type=Path, help="a folder with val.jsonl and test.jsonl of a detector")
    parser.add_argument("--least-score", type=float, default=0.5, help="of a detection that counts")
    parser.add_argument("--most-boxes", type=int, default=8, help="detections a picture that count")
    parser.add_argument("--rerank", type=int, default=0, help="top k for ITM; 0: ITC alone")
    parser.add_argument("--rerank-ways", nargs="+", choices=WAYS, default=["sum", "each or stock"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write the report here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    report = study(options, Terminal())
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
