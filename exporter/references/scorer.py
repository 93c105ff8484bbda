"""A live reference that ranks: images and captions in, scores out, in an evaluation's order.

From the image file to the score it shares only the token ids with the deployed path: images are opened, rotated,
resized and normalised here, with the checkpoint's constants rather than the bundle's, and box masks are computed cell
by cell (`references.boxes`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qpert.exporter.references.boxes import mask, weight
from qpert.exporter.references.own_inputs import with_own_inputs
from qpert.exporter.references.protocol import Reference
from qpert.runtime.bundle.graph_spec import GraphSpec
from qpert.runtime.bundle.manifest import Manifest
from qpert.runtime.bundle.roles import (
    BOX_WEIGHTS,
    IMAGE_TOKENS,
    IMAGE_VECTORS,
    OBJECT_MASKS,
    PAIR_SCORER,
    PAIR_SCORES,
    PIXELS,
    TEXT_VECTORS,
)
from qpert.runtime.bundle.samples import Samples
from qpert.runtime.inputs.boxes import Boxes
from qpert.runtime.inputs.text import TokenizedTexts
from qpert.runtime.inputs.token_grid import TokenGrid
from qpert.runtime.progress import Progress
from qpert.runtime.retrieval.encoder import token_slots
from qpert.runtime.retrieval.features import ImageFeatures, concatenated
from qpert.runtime.retrieval.query_sets import NO_BOX, QuerySets

IMAGES_AT_ONCE = 8
TEXTS_AT_ONCE = 64


@dataclass(frozen=True)
class ReferenceScorer:
    """A `PairScorer` over a reference. `manifest`: the bundle's, for tensor names and box settings.

    `pixels`: image file → float32 [3, S, S], with the checkpoint's own processor. `grid`: of image tokens.
    """

    name: str
    reference: Reference
    manifest: Manifest
    grid: TokenGrid
    pixels: Callable[[Path], np.ndarray]

    def encode_images(self, files: Sequence[Path], boxes: Sequence[Boxes | None], progress: Progress) -> ImageFeatures:
        """B images with their boxes → float32 features, like those of `Encoder.encode_images`."""
        parts = []
        with progress.stage(f"reference ({self.name}): encoding {len(files):,} images", len(files)) as advance:
            for start in range(0, len(files), IMAGES_AT_ONCE):
                part = slice(start, start + IMAGES_AT_ONCE)
                parts.append(self._encode(files[part], boxes[part]))
                advance(len(files[part]))
        return concatenated(parts)

    def own_inputs(self, samples: Samples) -> Samples:
        """The recorded images and captions, with this reference's pixels and ids."""
        return with_own_inputs(samples, self.reference, self.pixels, self.manifest)

    def _run(self, graph: GraphSpec, slots: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return graph.by_slot(self.reference.run(graph.name, graph.bind(slots)))

    def _encode(self, files: Sequence[Path], boxes: Sequence[Boxes | None]) -> ImageFeatures:
        head, pairs = self.manifest.query_head, self.manifest.pair_scorer
        pixels = np.stack([self.pixels(file) for file in files])
        tokens = self._run(self.manifest.image_tower, {PIXELS: pixels})[IMAGE_TOKENS]
        if self.manifest.perturbation.reduction == "each" and any(boxes):
            return ImageFeatures(self._box_by_box(tokens, boxes), tokens)
        objects = self._objects(boxes) if head.takes_boxes else {}
        vectors = self._run(head, {IMAGE_TOKENS: tokens, **objects})[IMAGE_VECTORS]
        kept = objects if pairs is not None and pairs.takes_boxes else {}
        return ImageFeatures(vectors, tokens, kept.get(OBJECT_MASKS), kept.get(BOX_WEIGHTS))

    def _box_by_box(self, tokens: np.ndarray, boxes: Sequence[Boxes | None]) -> QuerySets:
        """A query set for each box, from a call that sees that box alone; the stock set from one without boxes."""
        settings, counts, numbers, vectors = self.manifest.perturbation, [], [], []
        for image, one in enumerate(boxes):
            own: list[int | None] = [] if one is None else list(range(len(one)))
            sets = own if own and not settings.keep_stock else [None, *own]
            for number in sets:
                alone = None if one is None or number is None else Boxes(one.xyxy[number : number + 1], one.size)
                slots = {IMAGE_TOKENS: tokens[image : image + 1], **self._objects([alone])}
                vectors.append(self._run(self.manifest.query_head, slots)[IMAGE_VECTORS])
                numbers.append(NO_BOX if number is None else number)
            counts.append(len(sets))
        return QuerySets(np.concatenate(vectors), np.array(counts, np.int64), np.array(numbers, np.int64))

    def _objects(self, boxes: Sequence[Boxes | None]) -> dict[str, np.ndarray]:
        """Object masks [B, O, N] and box weights [B, O] by slot, padded with zeros."""
        most = max((len(one) for one in boxes if one is not None), default=0)
        masks = np.zeros((len(boxes), most, self.grid.tokens), np.float32)
        settings = self.manifest.perturbation
        weights = np.zeros((len(boxes), most), np.float32)
        for image, one in enumerate(boxes):
            if one is None:
                continue
            for place, corners in enumerate(one.xyxy.tolist()):
                box = tuple(corners)
                masks[image, place] = mask(box, one.size, settings.coverage, self.grid)
                weights[image, place] = weight(box, one.size, settings, len(one))
        return {OBJECT_MASKS: masks, BOX_WEIGHTS: weights}

    def encode_texts(self, texts: TokenizedTexts) -> np.ndarray:
        """T texts → float32 [T, E]."""
        tower = self.manifest.text_tower
        chunks = [np.arange(start, min(start + TEXTS_AT_ONCE, len(texts))) for start in chunk_starts(len(texts))]
        return np.concatenate([self._run(tower, token_slots(texts.trimmed(rows)))[TEXT_VECTORS] for rows in chunks])

    def itm_scores(self, features: ImageFeatures, texts: TokenizedTexts) -> np.ndarray:
        """Every image with every text: float32 [B, T]."""
        graph = self.manifest.graph(PAIR_SCORER)
        scores = np.empty((len(features), len(texts)), np.float32)
        for image in range(len(features)):
            one = features.rows([image])
            slots: dict[str, np.ndarray] = {IMAGE_TOKENS: one.image_embeds}
            if one.object_masks is not None and one.box_weights is not None:
                slots |= {OBJECT_MASKS: one.object_masks, BOX_WEIGHTS: one.box_weights}
            for start in chunk_starts(len(texts)):
                rows = np.arange(start, min(start + TEXTS_AT_ONCE, len(texts)))
                tokens = {slot: array[None] for slot, array in token_slots(texts.trimmed(rows)).items()}
                scores[image, rows] = self._run(graph, slots | tokens)[PAIR_SCORES][0]
        return scores


def chunk_starts(count: int) -> range:
    return range(0, count, TEXTS_AT_ONCE)
