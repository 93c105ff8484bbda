"""Detections of stock transformers on generated scenes, and their average precision by pycocotools."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from detector_data import LABELS, as_written
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from transformers import AutoImageProcessor, PreTrainedModel

from qpert.runtime.scenes import Scene, generate

FOLDER = Path(__file__).parents[2] / "exporter" / "detectors" / "demo"
"""What ships. Its `preprocessor_config.json` is written by hand and counts for training too."""
SEED = 0
"""Of the validation and test scenes: the demonstration's own."""
QUICK = 200
"""Validation scenes that a training run looks at."""
SMALL_SHARE = 0.02
"""Of the picture: an object below it is "tiny" in the captions' words (`qpert.runtime.scenes.facts`)."""

MEASURES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "recall50", "recall50_small")


@dataclass(frozen=True)
class Found:
    """Detections in one picture, best first. boxes: float32 [N, 4], x1, y1, x2, y2 in pixels; scores: float32 [N];
    labels: int64 [N]."""

    boxes: npt.NDArray[np.float32]
    scores: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]

    def __getitem__(self, chosen: npt.NDArray[Any]) -> Found:
        return Found(self.boxes[chosen], self.scores[chosen], self.labels[chosen])


def detect(
    model: PreTrainedModel, processor: Any, pictures: Sequence[Image.Image], threshold: float
) -> Iterator[Found]:
    """What stock transformers finds in each picture: all its post-processing keeps from `threshold` on."""
    for start in range(0, len(pictures), 20):
        part = pictures[start : start + 20]
        with torch.inference_mode():
            answer = model(**processor(images=list(part), return_tensors="pt"))
        sizes = [(picture.height, picture.width) for picture in part]
        for one in processor.post_process_object_detection(answer, threshold=threshold, target_sizes=sizes):
            yield Found(*(one[name].numpy() for name in ("boxes", "scores", "labels")))


def kept(found: Found, *, threshold: float, overlap: float, most: int) -> Found:
    """As boxes for retrieval: scores from `threshold` on; of boxes that overlap by an IoU above `overlap`, whatever
    their classes, the one with the best score (ties: the first); at most `most`."""
    order = np.argsort(-found.scores, kind="stable")
    chosen: list[int] = []
    for row in order[found.scores[order] >= threshold]:
        if len(chosen) < most and all(_iou(found.boxes[row], found.boxes[other]) <= overlap for other in chosen):
            chosen.append(int(row))
    return found[np.array(chosen, np.int64)]


def _iou(first: npt.NDArray[np.float32], second: npt.NDArray[np.float32]) -> float:
    sides = np.minimum(first[2:], second[2:]) - np.maximum(first[:2], second[:2])
    shared = float(np.prod(sides.clip(min=0)))
    return shared / (float(np.prod(first[2:] - first[:2])) + float(np.prod(second[2:] - second[:2])) - shared)


def precision(
    scenes: Sequence[Scene], found: Sequence[Found], *, small: float | None = None, one_class: bool = False
) -> dict[str, float | None]:
    """COCO's measures by pycocotools, in percent: ap (mean over IoU 0.5, 0.55, … 0.95), ap50, ap75, ap_small, ap_medium
    and ap_large, and the recall at IoU 0.5 of all and of small objects, over all detections given (≤ 100 a picture).

    Small is an area of at most 32² pixels, as in COCO, or with `small` of at most that share of the picture.
    `one_class` ignores what an object is. A measure without any object to find is None.
    """
    areas = [small * (s.size[0] * s.size[1]) if small else 32**2 for s in scenes]
    if small and len(set(areas)) > 1:
        raise ValueError("pictures of different areas have no common limit in pixels")
    truth = COCO()
    truth.dataset = {
        "images": [{"id": n, "width": s.size[0], "height": s.size[1]} for n, s in enumerate(scenes)],
        "categories": [{"id": n, "name": name} for n, name in enumerate(["object"] if one_class else LABELS)],
        "annotations": list(_annotations(scenes, one_class)),
    }
    rows = [
        [number, *_corner_and_size(box), score, 0 if one_class else label]
        for number, one in enumerate(found)
        for box, score, label in zip(one.boxes.tolist(), one.scores, one.labels, strict=True)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(np.array(rows, np.float64).reshape(-1, 7)), "bbox")
        evaluation.params.areaRng[1] = [0, areas[0]]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    recalls = evaluation.eval["recall"][0, :, :2, -1]  # IoU 0.5: [classes, (all, small)]; −1 without such an object
    values = [
        *evaluation.stats[:6],
        *(column[column >= 0].mean() if (column >= 0).any() else -1 for column in recalls.T),
    ]
    return {name: None if value < 0 else 100 * float(value) for name, value in zip(MEASURES, values, strict=True)}


def _annotations(scenes: Sequence[Scene], one_class: bool) -> Iterator[dict[str, Any]]:
    identity = 1  # pycocotools takes 0 for "no match"
    for number, scene in enumerate(scenes):
        for item in scene.objects:
            x1, y1, x2, y2 = item.box
            yield {
                "id": identity,
                "image_id": number,
                "category_id": 0 if one_class else LABELS.index(item.kind),
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": (x2 - x1) * (y2 - y1),
                "iscrowd": 0,
            }
            identity += 1


def _corner_and_size(box: Sequence[float]) -> tuple[float, float, float, float]:
    return box[0], box[1], box[2] - box[0], box[3] - box[1]


@lru_cache(maxsize=1)
def _quick() -> tuple[list[Scene], list[Image.Image]]:
    scenes = [scene for scene, _ in generate("val", QUICK, SEED)]
    return scenes, [as_written(scene) for scene in scenes]


def quick_precision(model: PreTrainedModel) -> dict[str, float]:
    """AP on the first validation scenes."""
    scenes, pictures = _quick()
    found = list(detect(model, AutoImageProcessor.from_pretrained(FOLDER), pictures, 0.0))
    return {f"val_{name}": value or 0.0 for name, value in precision(scenes, found).items()}
