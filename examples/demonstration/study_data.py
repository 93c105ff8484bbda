"""What `perturbation_study.py` measures on: a generated split, two sets of captions, and boxes true or detected."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from box_queries import BoxedImages, best_of_sets, boxed_images
from data import tokenizer
from evaluate import SEED, open_split
from scoring import EncodedSplit, encode_split, itc
from torch import Tensor

from qpert.graphs.families.blip2.model import Blip2Retrieval
from qpert.runtime.evaluation.metrics import image_to_text_ranks, text_to_image_ranks
from qpert.runtime.inputs.box_files import read_box_file
from qpert.runtime.inputs.boxes import Boxes
from qpert.runtime.inputs.images import image_size
from qpert.runtime.inputs.perturbation import WEIGHT_FUNCTIONS
from qpert.runtime.progress import Progress
from qpert.runtime.scenes import caption_ceiling, describe_smallest, generate

Floats = npt.NDArray[np.floating]
CAPTIONS = ("present", "smallest")
"""The five captions of the demonstration's splits, and two that name the smallest group and the background."""
WAYS = ("sum", "mean", "each", "each or stock", "each and stock")
"""Summed and averaged projectors; the best over a query set for each box, over these and the stock set, and the
former's score added to the stock set's."""


@dataclass(frozen=True)
class Point:
    """One setting: how boxes are put together, and w = α(β + γS)."""

    way: str
    weight: str
    alpha: float
    threshold: float

    def weights(self, boxed: BoxedImages) -> Tensor:
        """float32 [F]; a mean is a sum of weights divided by the picture's number of boxes."""
        beta, gamma = WEIGHT_FUNCTIONS[self.weight]
        found = self.alpha * (beta + gamma * boxed.areas)
        return found / boxed.counts()[boxed.owners] if self.way == "mean" else found


@dataclass(frozen=True, eq=False)
class StudySplit:
    """B pictures; texts float32 [T, E] of the present captions, then of those of the smallest object; owners int64 [T],
    the picture of each; `first` is the number of present captions; ids and mask int64 [T, L]."""

    encoded: EncodedSplit
    texts: Tensor
    owners: npt.NDArray[np.int64]
    first: int
    ids: Tensor
    mask: Tensor

    def part(self, captions: str) -> slice:
        return slice(0, self.first) if captions == "present" else slice(self.first, len(self.owners))

    def ranks(self, scores: Floats, captions: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Of each text's picture, and of each picture's first own text."""
        part, owners = scores[:, self.part(captions)], self.owners[self.part(captions)]
        return text_to_image_ranks(part, owners), image_to_text_ranks(part, owners)


def open_study_split(model: Blip2Retrieval, split: str, count: int, work: Path, progress: Progress) -> StudySplit:
    """The demonstration's split, and two captions of each scene's smallest group."""
    encoded = encode_split(model, open_split(work, split, count, progress))
    found = [describe_smallest(scene, f"{scene.seed}/smallest") for scene, _ in generate(split, count, SEED)]
    texts = [caption.text for captions in found for caption in captions]
    tokens = tokenizer().encode([*encoded.dataset.captions, *texts])
    ids, mask = torch.from_numpy(tokens.input_ids), torch.from_numpy(tokens.attention_mask)
    parts = [model.encode_text(*part) for part in zip(ids.split(500), mask.split(500), strict=True)]
    owners = np.concatenate([encoded.dataset.image_of_caption, np.repeat(np.arange(count), len(found[0]))])
    return StudySplit(encoded, torch.cat(parts), owners, len(encoded.dataset.captions), ids, mask)


def ceilings(split: str, count: int) -> dict[str, float]:
    """The best T2I R@1 in percent that ambiguous captions allow."""
    scenes = list(generate(split, count, SEED))
    own = [captions for _, captions in scenes]
    smallest = [describe_smallest(scene, f"{scene.seed}/smallest") for scene, _ in scenes]
    found = [caption_ceiling([scene for scene, _ in scenes], captions).t2i[1] for captions in (own, smallest)]
    return dict(zip(CAPTIONS, found, strict=True))


def detected_boxes(split: StudySplit, file: Path, least: float, most: int) -> list[Boxes]:
    """The `most` best detections of each picture with a score of at least `least`; a picture may have none."""
    table = read_box_file(file)
    found = []
    for picture in split.encoded.dataset.images:
        boxes = table.for_image(picture.name, image_size(picture))
        if boxes.scores is not None:
            kept = [row for row in np.argsort(-boxes.scores, kind="stable")[:most] if boxes.scores[row] >= least]
            boxes = Boxes(boxes.xyxy[kept], boxes.size)
        found.append(boxes)
    return found


class Scorer:
    """ITC scores of a split under boxes. What several ways of one setting share is computed once."""

    def __init__(self, model: Blip2Retrieval, split: StudySplit, boxes: list[Boxes] | tuple[Boxes, ...]) -> None:
        self.split = split
        self.boxed = boxed_images(model, split.encoded.image_embeds, boxes)
        self.stock = itc(self.boxed.stock(), split.texts)
        self._last: tuple[Point, Floats] | None = None

    def scores(self, point: Point) -> Floats:
        """float32 [B, T]. A picture without boxes keeps its stock scores."""
        if point.way in ("sum", "mean"):
            return itc(self.boxed.together(point.weights(self.boxed), point.threshold), self.split.texts)
        each = self._each(Point("each", point.weight, point.alpha, point.threshold))
        bare = np.isneginf(each)
        if point.way == "each":
            return np.where(bare, self.stock, each)
        if point.way == "each or stock":
            return np.maximum(each, self.stock)
        return np.where(bare, self.stock, each) + self.stock

    def _each(self, point: Point) -> Floats:
        if self._last is None or self._last[0] != point:
            sets = self.boxed.each(point.weights(self.boxed), point.threshold)
            scores = np.concatenate([itc(part, self.split.texts) for part in sets.split(1000)])
            self._last = point, best_of_sets(scores, self.boxed.owners.numpy(), len(self.boxed))
        return self._last[1]
