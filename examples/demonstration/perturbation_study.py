"""What boxes do for a demonstration checkpoint: every way to put them together, on two sets of captions.

    python examples/demonstration/perturbation_study.py --out benchmarks/results/demonstration_boxes.json

Settings are chosen on the 500 validation scenes and reported on the 1,000 test scenes, ITC alone (with --rerank also
ITC + ITM), with intervals of the difference to no boxes: a paired bootstrap over pictures. The captions are those of the
demonstration's splits ("present") and two for each scene that name its smallest group of objects ("smallest").
A setting is chosen for each way by the mean of both sets' T2I R@1, and for each set by its own.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from evaluate import MODEL, keep
from key_centring import AttentionRecord, background_mean, set_key_centre
from scoring import Matcher, open_model
from study_data import CAPTIONS, WAYS, Point, Scorer, StudySplit, ceilings, detected_boxes, open_study_split

from qpert.graphs.families.blip2.model import Blip2Retrieval
from qpert.runtime.evaluation.bootstrap import Hits, draws, interval, once
from qpert.runtime.evaluation.bootstrap import scores as recall_scores
from qpert.runtime.files import sha256_of
from qpert.runtime.inputs.perturbation import WEIGHT_FUNCTIONS
from qpert.runtime.progress import Progress, Terminal
from qpert.runtime.scenes import SPLIT_SIZES

ALPHAS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
THRESHOLDS = (0.85, 0.9, 0.95, 0.99)
OBJECTIVES = ("both", *CAPTIONS)
SCORES = ("r1", "mr1", "small")


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
    best = max((row for row in rows if row["way"] == way), key=lambda r: (sum(r[f"{s}_t2i"] for s in sets), -r["alpha"]))
    return Point(way, best["weight"], best["alpha"], best["threshold"])


def compared(split: StudySplit, scores: dict[str, np.ndarray]) -> dict[str, Any]:
    """For each side: R@1, mR@1 and the small bin's R@1 in percent, and their difference to "stock" with its 95 %
    interval. small: pictures whose largest box covers less than a tenth."""
    names, areas = list(scores), split.encoded.areas
    result: dict[str, Any] = {name: {} for name in names}
    for captions in CAPTIONS:
        ranks = [split.ranks(scores[name], captions) for name in names]
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
                    low, high = interval(drawn[:, column] - drawn[:, names.index("stock")])
                    result[name].setdefault(captions, {}).setdefault(direction, {})[score] = {
                        "value": round(float(whole[column]), 2),
                        "gain": round(float(whole[column] - whole[names.index("stock")]), 2),
                        "interval": [round(low, 2), round(high, 2)],
                    }
    return result


def attention(scorer: Scorer, points: dict[str, Point]) -> dict[str, Any]:
    """Where the queries look, by cross-attention and averaged over heads and queries: the share of attention on the
    tokens that the smallest box of a picture covers, without boxes and with that box's own query set; the ranks kept;
    and the share of queries (and heads) whose product with the box's leading direction has the sign of its mean key,
    so that the perturbation raises the box's logits."""
    boxed, model = scorer.boxed, scorer.boxed.model
    smallest = [int(i) for i in _smallest_boxes(boxed.owners.numpy(), boxed.areas.numpy())]
    images = boxed.owners[smallest]
    masks = _covered(scorer.split)[smallest]  # [F', N]
    result: dict[str, Any] = {"tokens covered": round(float((masks > 0).float().sum(1).mean()), 2)}
    result["picture"] = round(float(boxed.areas[smallest].mean()), 4)
    with AttentionRecord(model) as record:
        boxed.stock()
    plain = [torch.cat(layer)[images] for layer in record.attention]
    result["stock"] = [_on_box(layer, masks) for layer in plain]
    for name, point in points.items():
        with AttentionRecord(model) as record:
            boxed.each(point.weights(boxed), point.threshold)
        perturbed = [torch.cat(layer)[smallest] for layer in record.attention]
        result[name] = {
            "setting": asdict(point),
            "on the box": [_on_box(layer, masks) for layer in perturbed],
            "raised": [
                round(float((_mass(a, masks) > _mass(b, masks)).float().mean()), 3)
                for a, b in zip(perturbed, plain, strict=True)
            ],
            "rank": [round(float(r), 2) for r in boxed.ranks(point.threshold)[smallest].float().mean((0, 2))],
        }
    return result


def _mass(layer: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    return (layer * (masks > 0)[:, None, None]).sum(-1)  # [F', H, Q]


def _on_box(layer: torch.Tensor, masks: torch.Tensor) -> float:
    return round(float(_mass(layer, masks).mean()), 4)


def _smallest_boxes(owners: np.ndarray, areas: np.ndarray) -> list[int]:
    order = np.lexsort((areas, owners))
    return [int(order[start]) for start in np.flatnonzero(np.r_[True, owners[1:] != owners[:-1]])]


def _covered(split: StudySplit) -> torch.Tensor:
    from scoring import token_grid

    from qpert.runtime.inputs.perturbation import object_masks

    boxes = split.encoded.boxes
    masks = object_masks(boxes, grid=token_grid(), coverage="exact")
    return torch.from_numpy(np.concatenate([masks[image, : len(each)] for image, each in enumerate(boxes)]))
