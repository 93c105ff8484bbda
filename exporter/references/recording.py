"""What is recorded from the reference at export: inputs that exercise every graph, and the reference's outputs.

Inputs are made from a seed: smooth coloured noise for pictures (natural images are smooth, white noise is not), boxes
from tiny to whole, texts of different lengths.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from qpert.graphs.families.blip2.config import Blip2Config
from qpert.runtime.bundle.manifest import GraphSpec
from qpert.runtime.bundle.samples import BoxSample, Case, Samples
from qpert.runtime.inputs.images import ImagePreprocessing

SEED = 20240712
TIE_WIDTH = 1e-4
"""Boxes whose cut margin or relative eigenvalue gap is smaller get weight 0 in samples. The Gram matrix that a graph
computes in float32 differs from the reference's by about 1e-7 of its largest eigenvalue, and a projector by that
difference divided by the gap: below 1e-4 it is not decided to the 1e-3 that a lowering must reach."""
CANDIDATES = 4
"""Boxes drawn for each box that is used: those whose cut is decided most clearly are taken."""

CAPTIONS = (
    "a small red box on a table",
    "Two dogs, a cat and a bird: near the old house!",
    "a man",
    "An astronaut in an orange suit is smiling in front of a flag and a small model of a space shuttle",
)


class Reference(Protocol):
    """What verification compares with."""

    @property
    def name(self) -> str: ...

    def run(self, graph: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]: ...

    def cut_margins(self, image_embeds: np.ndarray, object_masks: np.ndarray) -> np.ndarray: ...


@dataclass(frozen=True)
class InputMaker:
    """Makes inputs for a model from a seed; the same seed gives the same inputs."""

    config: Blip2Config
    graphs: dict[str, GraphSpec]
    preprocessing: ImagePreprocessing
    seed: int = SEED

    def rng(self, what: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, what))

    def pixel_values(self, count: int) -> np.ndarray:
        """float32 [count, 3, S, S], as preprocessed pictures are distributed."""
        size = self.config.vision.image_size
        pictures = [smooth_picture(self.rng(10 + number), size, size) for number in range(count)]
        return np.stack([lavis_pixels(picture, self.preprocessing) for picture in pictures])

    def masks(self, count: int, boxes: int) -> np.ndarray:
        """Object masks float32 [count, boxes, N] of boxes from tiny to whole."""
        rng, grid = self.rng(20), self.config.vision.grid
        masks = np.zeros((count, boxes, grid * grid + 1), dtype=np.float32)
        for image in range(count):
            for box in range(boxes):
                masks[image, box, 1:] = np.outer(_random_cover(rng, grid), _random_cover(rng, grid)).ravel()
        return masks

    def weights(self, count: int, boxes: int) -> np.ndarray:
        """Box weights float32 [count, boxes]: of either sign, and one box fewer with each image (0: padding)."""
        weights = self.rng(21).uniform(-2, 8, (count, boxes))
        counts = np.maximum(1, boxes - np.arange(count))
        return np.where(np.arange(boxes) < counts[:, None], weights, 0).astype(np.float32)

    def tokens(self, *shape: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """input_ids and attention_mask int64 [*shape, length] of texts of different lengths, right-padded with 0."""
        rng = self.rng(30)
        ids = rng.integers(1, self.config.qformer.vocab_size, (*shape, length), dtype=np.int64)
        lengths = rng.integers(min(3, length), length + 1, shape)
        lengths.flat[0] = length
        mask = (np.arange(length) < lengths[..., None]).astype(np.int64)
        return ids * mask, mask


def record(
    reference: Reference,
    maker: InputMaker,
    *,
    images: int,
    token_ids: tuple[tuple[str, np.ndarray], ...],
    boxes: tuple[BoxSample, ...],
) -> Samples:
    """Run the reference on inputs for every graph.

    Args:
        reference: the unpatched network.
        maker: where inputs come from.
        images: distinct pictures; 2 at least, so that a row's neighbour can differ from it.
        token_ids: captions with the ids that the tokenizer gives, recorded as they are.
        boxes: boxes with their masks and weights, recorded as they are.
    """
    cases = list(make_cases(reference, maker, images=images))
    pictures = tuple(
        (picture, lavis_pixels(picture, maker.preprocessing))
        for picture in (smooth_picture(maker.rng(40), 211, 160), smooth_picture(maker.rng(41), 97, 640))
    )
    return Samples(tuple(cases), pictures, token_ids, boxes)


def make_cases(reference: Reference, maker: InputMaker, *, images: int) -> list[Case]:
    """Every graph's cases with the reference's outputs: features, 0, 1 and many boxes, zero weights, texts, pairs."""
    pixel_values = maker.pixel_values(images)
    cases = [run_case(reference, "vision", "pictures", {"pixel_values": pixel_values})]
    features = cases[0].expected["image_embeds"]
    graphs = maker.graphs
    for name, objects in box_inputs(reference, maker, features, graphs["image_query"]).items():
        cases.append(run_case(reference, "image_query", name, {"image_embeds": features} | objects))
    length = graphs["text"].ranges["L"].max
    ids, mask = maker.tokens(5, length=length)
    cases.append(run_case(reference, "text", "longest", {"input_ids": ids, "attention_mask": mask}))
    ids, mask = maker.tokens(3, length=2)
    cases.append(run_case(reference, "text", "shortest", {"input_ids": ids, "attention_mask": mask}))
    ids, mask = maker.tokens(images, 3, length=min(12, length))
    pairs = {"image_embeds": features, "input_ids": ids, "attention_mask": mask}
    for name, objects in box_inputs(reference, maker, features, graphs["itm"]).items():
        cases.append(run_case(reference, "itm", name, pairs | objects))
    return cases


def run_case(reference: Reference, graph: str, name: str, inputs: dict[str, np.ndarray]) -> Case:
    return Case(graph, name, inputs, reference.run(graph, inputs))


def box_inputs(
    reference: Reference, maker: InputMaker, features: np.ndarray, graph: GraphSpec
) -> dict[str, dict[str, np.ndarray]]:
    """Named sets of box inputs that a graph is tried with; one empty set where it takes none."""
    if not graph.takes_boxes:
        return {"stock": {}}
    count = len(features)
    many = min(6, graph.ranges["O"].max)
    masks, decided = decided_masks(reference, features, maker.masks(count, CANDIDATES * many), many)
    weights = np.where(decided, maker.weights(count, many), 0).astype(np.float32)
    named = {f"{name}_boxes": (masks[:, :boxes], weights[:, :boxes]) for name, boxes in (("no", 0), ("many", many))}
    named |= {"one_box": (masks[:, :1], weights[:, :1]), "zero_weights": (masks, np.zeros_like(weights))}
    return {name: {"object_masks": given, "box_weights": weight} for name, (given, weight) in named.items()}


def decided_masks(
    reference: Reference, features: np.ndarray, candidates: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Of each image's candidate masks [B, M, N] the `count` whose cut is clearest, and which of those are decided."""
    margins = reference.cut_margins(features, candidates)
    best = np.argsort(-margins, axis=1, kind="stable")[:, :count]
    masks = np.take_along_axis(candidates, best[..., None], axis=1)
    return masks, np.take_along_axis(margins, best, axis=1) > TIE_WIDTH


def smooth_picture(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """A uint8 [H, W, 3] picture of soft coloured shapes with a little grain."""
    coarse = torch.from_numpy(rng.uniform(0, 255, (1, 3, 7, 9)))
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")[0].permute(1, 2, 0).numpy()
    return np.clip(smooth + rng.normal(0, 6, smooth.shape), 0, 255).astype(np.uint8)


def lavis_pixels(picture: np.ndarray, preprocessing: ImagePreprocessing) -> np.ndarray:
    """float32 [3, S, S]: the arithmetic of LAVIS's `BlipImageEvalProcessor`, written with PIL and torch alone, so that
    the runtime's preprocessing is compared with something else than itself.

    LAVIS's figures were made with Pillow up to 12, which resizes columns before rows. Pillow 13 takes the rows of a
    tall picture first, so each axis gets a call of its own.
    """
    from PIL import Image

    size = preprocessing.size
    columns = Image.fromarray(picture).resize((size, picture.shape[0]), Image.Resampling.BICUBIC)
    resized = columns.resize((size, size), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1).float().div(255)
    mean, std = (torch.tensor(values)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
    return ((pixels - mean) / std).numpy()


def _random_cover(rng: np.random.Generator, grid: int) -> np.ndarray:
    """How much of each of `grid` cells in a row a random interval covers."""
    low, high = np.sort(rng.uniform(0, grid, 2))
    high = min(grid, max(high, low + 0.3))
    cells = np.arange(grid)
    return np.clip(np.minimum(high, cells + 1) - np.maximum(low, cells), 0, 1)
