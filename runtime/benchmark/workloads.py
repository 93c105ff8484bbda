"""The workloads: each graph's inputs at each size, as data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from qpert.runtime.bundle.manifest import Manifest
from qpert.runtime.bundle.roles import (
    BOX_WEIGHTS,
    IMAGE_TOKENS,
    IMAGE_TOWER,
    OBJECT_MASKS,
    PAIR_SCORER,
    PIXELS,
    QUERY_HEAD,
    TEXT_TOWER,
    TOKEN_IDS,
    TOKEN_MASK,
)
from qpert.runtime.errors import InputError
from qpert.runtime.inputs.token_grid import TokenGrid

END_TO_END = ("encode", "search")
TEXT_LENGTH = 16
"""Tokens of a caption; those of COCO have about twelve words."""
AXES = {IMAGE_TOWER: "B", QUERY_HEAD: "B", TEXT_TOWER: "T", PAIR_SCORER: "T"}
"""Role of a graph → the axis that `batch` sets."""


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
    """The requested sizes; no stages means all."""

    stages: tuple[str, ...]
    batches: tuple[int, ...]
    boxes: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.batches or not self.boxes:
            raise InputError("got no batch or number of boxes, expected at least one of each", code="bench-sizes")
        if min(self.batches) < 1 or min(self.boxes) < 0:
            raise InputError(
                f"got batches {self.batches} and boxes {self.boxes}, expected 1 or more, and 0 or more",
                code="bench-sizes",
            )


def stages_of(manifest: Manifest, asked: Sequence[str]) -> tuple[str, ...]:
    """Graphs by name, then both directions; all if none are requested. Raises InputError for an unknown one."""
    known = (*(name for name, graph in manifest.graphs.items() if graph.role in AXES), *END_TO_END)
    if unknown := sorted(set(asked) - set(known)):
        raise InputError(
            f"got stage {', '.join(unknown)}, expected one or more of {', '.join(known)}", code="bench-stage-unknown"
        )
    return tuple(asked) or known


def sizes_of(manifest: Manifest, sizes: Sizes, skip: Callable[[str], None]) -> Iterator[tuple[str, int, int]]:
    """(stage, batch, boxes) of everything that can be measured; `skip` is called with a note for what cannot."""
    head = manifest.query_head
    for stage in stages_of(manifest, sizes.stages):
        graph = head if stage in END_TO_END else manifest.graphs[stage]
        boxed = head.takes_boxes and stage in (head.name, "encode")
        batches = (1,) if stage == "search" else sizes.batches
        for batch in batches:
            most = graph.ranges[AXES[graph.role]].max
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
        features: image tokens [1, N, C] of a picture; graphs behind the image tower get copies of it.
        size: (stage, batch, boxes).
    """
    stage, batch, boxes = size
    graph = manifest.graphs[stage]
    rng = np.random.default_rng((batch, boxes))
    pairs = graph.role == PAIR_SCORER
    images = 1 if pairs else batch
    slots: dict[str, np.ndarray] = {}
    if graph.takes(PIXELS):
        side = manifest.preprocessing.size
        slots[PIXELS] = rng.standard_normal((batch, 3, side, side), dtype=np.float32)
    if graph.takes(TOKEN_IDS):
        tokens = token_inputs(rng, manifest, batch)
        slots |= {slot: array[None] for slot, array in tokens.items()} if pairs else tokens
    if graph.takes(IMAGE_TOKENS):
        slots[IMAGE_TOKENS] = np.ascontiguousarray(np.repeat(features, images, axis=0))
    if graph.takes_boxes:
        slots |= box_inputs(rng, manifest.token_grid, images, boxes)
    inputs = {spec.name: slots[spec.slot] for spec in graph.inputs}
    lengths = {axis: n for spec in graph.inputs for axis, n in zip(spec.shape, inputs[spec.name].shape, strict=True)}
    return Workload(*size, inputs, graph.count_flops({str(axis): n for axis, n in lengths.items()}))


def token_inputs(rng: np.random.Generator, manifest: Manifest, count: int) -> dict[str, np.ndarray]:
    """Token ids and mask int64 [T, L] by slot, without padding."""
    last = manifest.text_tower.input(TOKEN_IDS).shape[-1]
    length = last if isinstance(last, int) else min(TEXT_LENGTH, manifest.text_tower.ranges[last].max)
    ids = rng.integers(1, manifest.tokenizer.vocab_size, (count, length), dtype=np.int64)
    return {TOKEN_IDS: ids, TOKEN_MASK: np.ones_like(ids)}


def box_inputs(rng: np.random.Generator, grid: TokenGrid, images: int, boxes: int) -> dict[str, np.ndarray]:
    """Object masks float32 [B, O, N] of boxes on whole cells and box weights float32 [B, O] of 1, by slot."""
    masks = np.zeros((images, boxes, grid.rows, grid.columns), np.float32)
    for image, box in np.ndindex(images, boxes):
        top, left = rng.integers(0, (grid.rows, grid.columns))
        height, width = rng.integers(1, (max(2, grid.rows // 2), max(2, grid.columns // 2)))
        masks[image, box, top : top + height, left : left + width] = 1
    return {OBJECT_MASKS: grid.flatten(masks), BOX_WEIGHTS: np.ones((images, boxes), np.float32)}
