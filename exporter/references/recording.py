"""Samples recorded at export: inputs for every graph, and the reference's outputs.

Inputs are generated from a seed: smooth coloured noise for images (natural images are smooth, white noise is not),
boxes from tiny to full-size, texts of different lengths.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from qpert.exporter.references.pixels import reference_pixels
from qpert.exporter.references.protocol import MarginReference, Reference
from qpert.runtime.bundle.graph_spec import GraphSpec
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
from qpert.runtime.bundle.samples import BoxSample, Case, Samples
from qpert.runtime.inputs.preprocessing import ImagePreprocessing
from qpert.runtime.inputs.token_grid import TokenGrid

SEED = 20240712
TIE_WIDTH = 1e-4
"""Boxes whose cut margin or relative eigenvalue gap is smaller get weight 0 in samples. The Gram matrix that a graph
computes in float32 differs from the reference's by about 1e-7 of its largest eigenvalue, and a projector by that
difference divided by the gap: below 1e-4 it is not decided to the 1e-3 that a lowering must reach."""
CANDIDATES = 4
"""Boxes drawn for each box that is used; those with the clearest cuts are taken."""

CAPTIONS = (
    "a small red box on a table",
    "Two dogs, a cat and a bird: near the old house!",
    "a man",
    "An astronaut in an orange suit is smiling in front of a flag and a small model of a space shuttle",
)


@dataclass(frozen=True)
class InputMaker:
    """Makes inputs for a model from a seed; the same seed gives the same inputs."""

    graphs: dict[str, GraphSpec]
    grid: TokenGrid
    vocab_size: int
    seed: int = SEED

    @property
    def preprocessing(self) -> ImagePreprocessing:
        return self.grid.image

    def graph(self, role: str) -> GraphSpec | None:
        """The graph of a role, or None."""
        return next((spec for spec in self.graphs.values() if spec.role == role), None)

    def rng(self, what: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, what))

    def pixel_values(self, count: int) -> np.ndarray:
        """float32 [count, 3, S, S], distributed like preprocessed images."""
        size = self.preprocessing.size
        pictures = [smooth_picture(self.rng(10 + number), size, size) for number in range(count)]
        return np.stack([pixels_of(picture, self.preprocessing) for picture in pictures])

    def masks(self, count: int, boxes: int) -> np.ndarray:
        """Object masks float32 [count, boxes, N] of boxes from tiny to full-size."""
        rng, grid = self.rng(20), self.grid
        cells = np.zeros((count, boxes, grid.rows, grid.columns))
        for image in range(count):
            for box in range(boxes):
                cells[image, box] = np.outer(_random_cover(rng, grid.rows), _random_cover(rng, grid.columns))
        return grid.flatten(cells)

    def weights(self, count: int, boxes: int) -> np.ndarray:
        """Box weights float32 [count, boxes], of either sign. Each image has one box fewer (0: padding)."""
        weights = self.rng(21).uniform(-2, 8, (count, boxes))
        counts = np.maximum(1, boxes - np.arange(count))
        return np.where(np.arange(boxes) < counts[:, None], weights, 0).astype(np.float32)

    def tokens(self, *shape: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and mask int64 [*shape, length] of texts of different lengths, right-padded with 0."""
        rng = self.rng(30)
        ids = rng.integers(1, self.vocab_size, (*shape, length), dtype=np.int64)
        lengths = rng.integers(min(3, length), length + 1, shape)
        lengths.flat[0] = length
        mask = (np.arange(length) < lengths[..., None]).astype(np.int64)
        return ids * mask, mask


def record(
    reference: MarginReference,
    maker: InputMaker,
    *,
    images: int,
    token_ids: tuple[tuple[str, np.ndarray], ...],
    boxes: tuple[BoxSample, ...],
) -> Samples:
    """Run the reference on inputs for every graph.

    Args:
        reference: the unpatched network.
        maker: generates the inputs.
        images: distinct images; at least 2, so that neighbouring rows differ.
        token_ids: captions with the tokenizer's ids, recorded unchanged.
        boxes: boxes with their masks and weights, recorded unchanged.
    """
    cases = list(make_cases(reference, maker, images=images))
    pictures = tuple(
        (picture, pixels_of(picture, maker.preprocessing))
        for picture in (smooth_picture(maker.rng(40), 211, 160), smooth_picture(maker.rng(41), 97, 640))
    )
    return Samples(tuple(cases), pictures, token_ids, boxes)


def make_cases(reference: MarginReference, maker: InputMaker, *, images: int) -> list[Case]:
    """Every graph's cases with the reference's outputs: features, 0, 1 and many boxes, zero weights, texts, pairs."""
    tower, head, text = (maker.graph(role) for role in (IMAGE_TOWER, QUERY_HEAD, TEXT_TOWER))
    assert tower is not None  # every bundle has these three
    assert head is not None
    assert text is not None
    cases = [run_case(reference, tower, "pictures", {PIXELS: maker.pixel_values(images)})]
    features = tower.by_slot(cases[0].expected)[IMAGE_TOKENS]
    for name, objects in box_cases(reference, maker, features, head).items():
        cases.append(run_case(reference, head, name, {IMAGE_TOKENS: features} | objects))
    longest = longest_text(text)
    for name, count, length in (("longest", 5, longest), ("shortest", 3, shortest_text(text))):
        ids, mask = maker.tokens(count, length=length)
        cases.append(run_case(reference, text, name, {TOKEN_IDS: ids, TOKEN_MASK: mask}))
    if (pairs := maker.graph(PAIR_SCORER)) is not None:
        ids, mask = maker.tokens(images, 3, length=min(12, longest))
        slots = {IMAGE_TOKENS: features, TOKEN_IDS: ids, TOKEN_MASK: mask}
        for name, objects in box_cases(reference, maker, features, pairs).items():
            cases.append(run_case(reference, pairs, name, slots | objects))
    return cases


def longest_text(text: GraphSpec) -> int:
    """Tokens of the longest text that a graph takes."""
    last = text.input(TOKEN_IDS).shape[-1]
    return last if isinstance(last, int) else text.ranges[last].max


def shortest_text(text: GraphSpec) -> int:
    """Tokens of the shortest text that a graph takes."""
    last = text.input(TOKEN_IDS).shape[-1]
    return last if isinstance(last, int) else text.ranges[last].min


def run_case(reference: Reference, graph: GraphSpec, name: str, slots: dict[str, np.ndarray]) -> Case:
    inputs = graph.bind(slots)
    return Case(graph.name, name, inputs, reference.run(graph.name, inputs))


def box_cases(
    reference: MarginReference, maker: InputMaker, features: np.ndarray, graph: GraphSpec
) -> dict[str, dict[str, np.ndarray]]:
    """Named sets of box inputs by slot; one empty set if the graph takes no boxes."""
    if not graph.takes_boxes:
        return {"stock": {}}
    count = len(features)
    many = min(6, graph.ranges["O"].max)
    masks, decided = decided_masks(reference, features, maker.masks(count, CANDIDATES * many), many)
    weights = np.where(decided, maker.weights(count, many), 0).astype(np.float32)
    named = {f"{name}_boxes": (masks[:, :boxes], weights[:, :boxes]) for name, boxes in (("no", 0), ("many", many))}
    named |= {"one_box": (masks[:, :1], weights[:, :1]), "zero_weights": (masks, np.zeros_like(weights))}
    return {name: {OBJECT_MASKS: given, BOX_WEIGHTS: weight} for name, (given, weight) in named.items()}


def decided_masks(
    reference: MarginReference, features: np.ndarray, candidates: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """The `count` clearest cuts among each image's candidate masks [B, M, N], and which of them are decided."""
    margins = reference.cut_margins(features, candidates)
    best = np.argsort(-margins, axis=1, kind="stable")[:, :count]
    masks = np.take_along_axis(candidates, best[..., None], axis=1)
    return masks, np.take_along_axis(margins, best, axis=1) > TIE_WIDTH


def smooth_picture(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """A uint8 [H, W, 3] image of soft coloured shapes with a little grain."""
    coarse = torch.from_numpy(rng.uniform(0, 255, (1, 3, 7, 9)))
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")[0].permute(1, 2, 0).numpy()
    return np.clip(smooth + rng.normal(0, 6, smooth.shape), 0, 255).astype(np.uint8)


def pixels_of(picture: np.ndarray, preprocessing: ImagePreprocessing) -> np.ndarray:
    """float32 [3, S, S] of a uint8 [H, W, 3] image, with the reference preprocessing."""
    from PIL import Image

    return reference_pixels(Image.fromarray(picture), preprocessing)


def _random_cover(rng: np.random.Generator, grid: int) -> np.ndarray:
    """The share of each of `grid` cells in a row that a random interval covers."""
    low, high = np.sort(rng.uniform(0, grid, 2))
    high = min(grid, max(high, low + 0.3))
    cells = np.arange(grid)
    return np.clip(np.minimum(high, cells + 1) - np.maximum(low, cells), 0, 1)
