"""What is measured: each graph's inputs at each size, as data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from qpert.runtime.benchmark.work import itm_flops, query_flops, text_flops, vision_flops
from qpert.runtime.bundle.manifest import GRAPH_NAMES, Manifest
from qpert.runtime.errors import InputError

END_TO_END = ("encode", "search")
STAGES = (*GRAPH_NAMES, *END_TO_END)
TEXT_LENGTH = 16
"""Tokens of a caption; those of COCO have about twelve words."""
AXES = {"vision": "B", "image_query": "B", "text": "T", "itm": "T"}
"""The axis of each graph that `batch` is."""


@dataclass(frozen=True, eq=False)
class Workload:
    """One graph at one size. `flops`: useful work of a call."""

    stage: str
    batch: int
    boxes: int
    inputs: dict[str, np.ndarray]
    flops: int

    def __str__(self) -> str:
        return f"{self.stage}, batch {self.batch}" + (f", {self.boxes} boxes" if self.boxes else "")


@dataclass(frozen=True)
class Sizes:
    """What was asked for."""

    stages: tuple[str, ...]
    batches: tuple[int, ...]
    boxes: tuple[int, ...]

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.stages) - set(STAGES)):
            raise InputError(f"got stage {', '.join(unknown)}, expected some of {', '.join(STAGES)}")
        if not self.stages or not self.batches or not self.boxes:
            raise InputError("got no stage, batch or number of boxes, expected at least one of each")
        if min(self.batches) < 1 or min(self.boxes) < 0:
            raise InputError(f"got batches {self.batches} and boxes {self.boxes}, expected 1 or more, and 0 or more")


def sizes_of(manifest: Manifest, sizes: Sizes, skip: Callable[[str], None]) -> Iterator[tuple[str, int, int]]:
    """(stage, batch, boxes) of all that can be measured; `skip` is told what the bundle is too small for."""
    for stage in sizes.stages:
        graph = manifest.graphs["image_query" if stage in END_TO_END else stage]
        boxed = graph.takes_boxes and stage in ("image_query", "encode")
        batches = (1,) if stage == "search" else sizes.batches
        for batch in batches:
            most = graph.ranges[AXES.get(stage, "B")].max
            if batch > most and stage not in END_TO_END:
                skip(f"{stage} with batch {batch}: this bundle takes up to {most}")
                continue
            for boxes in sizes.boxes if boxed else (0,):
                if boxes and boxes > graph.ranges["O"].max:
                    skip(f"{stage} with {boxes} boxes: this bundle takes up to {graph.ranges['O'].max}")
                    continue
                yield stage, batch, boxes


def make_workload(manifest: Manifest, features: np.ndarray, size: tuple[str, int, int]) -> Workload:
    """Inputs of one graph.

    Args:
        manifest: of the bundle.
        features: image_embeds [1, N, C] of a picture; graphs behind vision get copies of it.
        size: (stage, batch, boxes).
    """
    stage, batch, boxes = size
    rng = np.random.default_rng((batch, boxes))
    architecture, side = manifest.architecture, manifest.preprocessing.size
    if stage == "vision":
        pixels = rng.standard_normal((batch, 3, side, side), dtype=np.float32)
        return Workload(*size, {"pixel_values": pixels}, batch * vision_flops(architecture))
    tokens = token_inputs(rng, manifest, batch)
    if stage == "text":
        return Workload(*size, tokens, batch * text_flops(architecture, tokens["input_ids"].shape[1]))
    images = batch if stage == "image_query" else 1
    inputs = {"image_embeds": np.ascontiguousarray(np.repeat(features, images, axis=0))}
    if manifest.graphs[stage].takes_boxes:
        inputs |= box_inputs(rng, manifest.grid, images, boxes)
    if stage == "image_query":
        return Workload(*size, inputs, batch * query_flops(architecture))
    inputs |= {name: array[None] for name, array in tokens.items()}
    return Workload(*size, inputs, itm_flops(architecture, batch, tokens["input_ids"].shape[1]))


def token_inputs(rng: np.random.Generator, manifest: Manifest, count: int) -> dict[str, np.ndarray]:
    """input_ids and attention_mask int64 [T, L], without padding."""
    length = min(TEXT_LENGTH, manifest.graphs["text"].ranges["L"].max)
    ids = rng.integers(1, manifest.tokenizer.vocab_size, (count, length), dtype=np.int64)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def box_inputs(rng: np.random.Generator, grid: int, images: int, boxes: int) -> dict[str, np.ndarray]:
    """object_masks float32 [B, O, N] of boxes on whole cells and box_weights float32 [B, O] of 1."""
    masks = np.zeros((images, boxes, grid, grid), np.float32)
    for image, box in np.ndindex(images, boxes):
        (top, left), (height, width) = rng.integers(0, grid, 2), rng.integers(1, max(2, grid // 2), 2)
        masks[image, box, top : top + height, left : left + width] = 1
    tokens = np.pad(masks.reshape(images, boxes, grid * grid), ((0, 0), (0, 0), (1, 0)))
    return {"object_masks": tokens, "box_weights": np.ones((images, boxes), np.float32)}
