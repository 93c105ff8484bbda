"""A live reference as something that ranks: pictures and captions in, scores out, on the schedule of an evaluation.

From the picture file to the score it shares nothing with the deployed path but the token ids: pictures are opened,
turned, resized and normalised here, with LAVIS's constants and not with the bundle's, and masks of boxes are made cell
by cell (`literal_boxes`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from qpert.exporter.references.boxes import mask, weight
from qpert.runtime.inputs.boxes import Boxes
from qpert.runtime.inputs.perturbation import Perturbation
from qpert.runtime.inputs.text import TokenizedTexts
from qpert.runtime.progress import Progress
from qpert.runtime.retrieval.encoder import ImageFeatures, concatenated, trimmed

IMAGES_AT_ONCE = 8
TEXTS_AT_ONCE = 64
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""LAVIS `lavis/processors/blip_processors.py`, BlipImageBaseProcessor."""


class GraphRunner(Protocol):
    """The part of a reference that is needed here."""

    def run(self, graph: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]: ...


@dataclass(frozen=True)
class ReferenceScorer:
    """A `PairScorer` over a reference. `stages`: of the perturbation, which graphs take boxes."""

    name: str
    reference: GraphRunner
    perturbation: Perturbation
    grid: int
    image_size: int

    def encode_images(self, files: Sequence[Path], boxes: Sequence[Boxes | None], progress: Progress) -> ImageFeatures:
        """B pictures with their boxes: float32 features as `Encoder.encode_images` gives them."""
        parts = []
        with progress.stage(f"reference ({self.name}): encoding {len(files):,} images", len(files)) as advance:
            for start in range(0, len(files), IMAGES_AT_ONCE):
                part = slice(start, start + IMAGES_AT_ONCE)
                parts.append(self._encode(files[part], boxes[part]))
                advance(len(files[part]))
        return concatenated(parts)

    def _encode(self, files: Sequence[Path], boxes: Sequence[Boxes | None]) -> ImageFeatures:
        pixels = np.stack([reference_pixels(file, self.image_size) for file in files])
        embeds = self.reference.run("vision", {"pixel_values": pixels})["image_embeds"]
        objects = {} if self.perturbation.stages == "none" else self._objects(boxes)
        queries = self.reference.run("image_query", {"image_embeds": embeds} | objects)["query_embeds"]
        kept = objects if self.perturbation.stages == "both" else {}
        return ImageFeatures(queries, embeds, kept.get("object_masks"), kept.get("box_weights"))

    def _objects(self, boxes: Sequence[Boxes | None]) -> dict[str, np.ndarray]:
        """object_masks [B, O, N] and box_weights [B, O], padded with zeros."""
        most = max((len(one) for one in boxes if one is not None), default=0)
        masks = np.zeros((len(boxes), most, self.grid**2 + 1), np.float32)
        weights = np.zeros((len(boxes), most), np.float32)
        for image, one in enumerate(boxes):
            for place, corners in enumerate([] if one is None else one.xyxy.tolist()):
                assert one is not None
                box = tuple(corners)
                masks[image, place] = mask(box, one.size, self.perturbation.coverage, self.grid, self.image_size)
                weights[image, place] = weight(box, one.size, self.perturbation, len(one))
        return {"object_masks": masks, "box_weights": weights}

    def encode_texts(self, texts: TokenizedTexts) -> np.ndarray:
        """T texts → float32 [T, E]."""
        chunks = [np.arange(start, min(start + TEXTS_AT_ONCE, len(texts))) for start in chunk_starts(len(texts))]
        return np.concatenate([self.reference.run("text", trimmed(texts, rows))["text_embeds"] for rows in chunks])

    def itm_scores(self, features: ImageFeatures, texts: TokenizedTexts) -> np.ndarray:
        """Every image with every text: float32 [B, T]."""
        scores = np.empty((len(features), len(texts)), np.float32)
        for image in range(len(features)):
            one = features.rows([image])
            inputs: dict[str, np.ndarray] = {"image_embeds": one.image_embeds}
            if one.object_masks is not None and one.box_weights is not None:
                inputs |= {"object_masks": one.object_masks, "box_weights": one.box_weights}
            for start in chunk_starts(len(texts)):
                rows = np.arange(start, min(start + TEXTS_AT_ONCE, len(texts)))
                tokens = {name: array[None] for name, array in trimmed(texts, rows).items()}
                scores[image, rows] = self.reference.run("itm", inputs | tokens)["itm_scores"][0]
        return scores


def chunk_starts(count: int) -> range:
    return range(0, count, TEXTS_AT_ONCE)


def reference_pixels(file: Path, size: int) -> np.ndarray:
    """float32 [3, S, S]: PIL and torch alone, as LAVIS's evaluation processor does it, after EXIF orientation.

    One call for each axis, columns first: the order of Pillow up to 12, which LAVIS's figures were made with. Pillow 13
    takes the rows of a tall picture first. The runtime's own `resize` is what this is compared with, so it is not used.
    """
    from PIL import Image, ImageOps

    with Image.open(file) as opened:
        upright = ImageOps.exif_transpose(opened).convert("RGB")
    columns = upright.resize((size, upright.height), Image.Resampling.BICUBIC)
    resized = columns.resize((size, size), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1).float().div(255)
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    result: np.ndarray = ((pixels - mean) / std).numpy()
    return result
