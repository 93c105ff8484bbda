"""OEs: object embeddings of an image, one for each box.

Source: Sogi, Shibata, Terao, ECCV 2024, supplement B.1: region-of-interest pooling of the visual tokens, given to the
Q-Former. What this leaves open is in `Choices`.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from qpert.runtime.bundle.roles import BOX_WEIGHTS, IMAGE_TOKENS, IMAGE_VECTORS, OBJECT_MASKS, QUERY_HEAD
from qpert.runtime.errors import UnavailableError
from qpert.runtime.evaluation.methods.choices import TOKEN_SELECTIONS, Choices
from qpert.runtime.inputs.boxes import Boxes
from qpert.runtime.inputs.images import load_image
from qpert.runtime.inputs.perturbation import object_masks
from qpert.runtime.retrieval.encoder import Encoder

ENTRY_POINTS = "qpert.token_selectors"
"""The entry-point group of the package that cuts the query head at its keys (`qpert.calibration`)."""

Floats = npt.NDArray[np.float32]
Masks = npt.NDArray[np.float32]


class TokenSelector(Protocol):
    """Stock queries that see some of an image's tokens."""

    def query_vectors(self, image_tokens: npt.NDArray[np.floating], places: Sequence[npt.NDArray[np.int64]]) -> Floats:
        """image_tokens [1, N, C] and R selections of them → float32 [R, Q, E], unit length."""
        ...


class ObjectEncoder:
    """Object embeddings of images, with the choices that the paper leaves open."""

    def __init__(self, encoder: Encoder, choices: Choices) -> None:
        """Raises UnavailableError where tokens are to be selected and the `onnx` package is missing."""
        self.encoder, self.choices = encoder, choices
        self.selector = token_selector(encoder) if choices.pooling in TOKEN_SELECTIONS else None

    def of_image(self, image_tokens: npt.NDArray[np.floating], boxes: Boxes, path: Path) -> Floats:
        """One image, from its tokens [1, N, C], boxes and file → float32 [R, Q, E], or [R, 1, E] with similarity
        `mean`.

        R is the number of boxes that cover a token; where there is none, the image itself is its only object.
        """
        masks = self._masks(boxes)
        vectors = self._vectors(image_tokens, boxes, masks, path) if len(masks) else self._stock(image_tokens)
        return vectors.mean(axis=1, keepdims=True) if self.choices.similarity == "mean" else vectors

    def _masks(self, boxes: Boxes) -> Masks:
        """float32 [R, N] of the boxes that cover a token; of all boxes where pictures are cropped to them."""
        (masks,) = object_masks(
            [boxes], grid=self.encoder.manifest.token_grid, coverage=self.encoder.perturbation.coverage
        )
        return masks if self.choices.pooling == "crop" else masks[masks.sum(axis=1) > 0]

    def _vectors(self, image_tokens: npt.NDArray[np.floating], boxes: Boxes, masks: Masks, path: Path) -> Floats:
        if self.choices.pooling == "crop":
            return self.encoder.encode_images(crops(path, boxes)).query_sets.vectors
        if self.selector is not None:
            prefix = self.encoder.manifest.token_grid.prefix if self.choices.pooling == "tokens-and-cls" else 0
            return self.selector.query_vectors(image_tokens, [selected(mask, prefix) for mask in masks])
        return stock_vectors(self.encoder, pooled(image_tokens[0], masks))

    def _stock(self, image_tokens: npt.NDArray[np.floating]) -> Floats:
        return stock_vectors(self.encoder, image_tokens)


def pooled(image_tokens: npt.NDArray[np.floating], masks: Masks) -> npt.NDArray[np.floating]:
    """image_tokens [N, C], masks [R, N] → [R, N, C]: each box's mean token, weighted by coverage, N times."""
    shares = masks.astype(np.float64) / masks.sum(axis=1, keepdims=True, dtype=np.float64)
    means = (shares @ image_tokens.astype(np.float64)).astype(image_tokens.dtype)  # [R, C]
    return np.repeat(means[:, None], len(image_tokens), axis=1)


def selected(mask: Masks, prefix: int) -> npt.NDArray[np.int64]:
    """The places of the tokens that a box touches, after the first `prefix` tokens."""
    return np.concatenate([np.arange(prefix), np.flatnonzero(mask > 0)])


def crops(path: Path, boxes: Boxes) -> list[npt.NDArray[np.uint8]]:
    """The picture cropped to each box, uint8 [h, w, 3]; whole pixels, those that a box cuts included."""
    picture = np.asarray(load_image(path))
    corners = [(math.floor(x1), math.floor(y1), math.ceil(x2), math.ceil(y2)) for x1, y1, x2, y2 in boxes.xyxy.tolist()]
    return [picture[y1:y2, x1:x2] for x1, y1, x2, y2 in corners]


def stock_vectors(encoder: Encoder, image_tokens: npt.NDArray[np.floating]) -> Floats:
    """image_tokens [R, N, C] → float32 [R, Q, E] of the unperturbed query head, in calls within its limit."""
    head, most = encoder.graph(QUERY_HEAD), encoder.limit(QUERY_HEAD, "B")
    parts = []
    for start in range(0, len(image_tokens), most):
        rows = image_tokens[start : start + most]
        slots = {IMAGE_TOKENS: np.ascontiguousarray(rows)}
        if head.spec.takes_boxes:
            slots[OBJECT_MASKS] = np.zeros((len(rows), 0, rows.shape[1]), np.float32)
            slots[BOX_WEIGHTS] = np.zeros((len(rows), 0), np.float32)
        parts.append(head.run(slots)[IMAGE_VECTORS])
    return np.concatenate(parts)


def token_selector(encoder: Encoder) -> TokenSelector:
    """Raises UnavailableError where `onnx` is missing, BundleError where the graph cannot be cut at its keys."""
    found = next(iter(entry_points(group=ENTRY_POINTS)), None)
    if found is None or importlib.util.find_spec("onnx") is None:
        raise UnavailableError(
            "--oes-pooling tokens cuts the query head at its keys, which needs onnx, not installed here; pip install "
            "'qpert[export]', or use --oes-pooling mean",
            code="missing-extra",
        )
    selector: TokenSelector = found.load()(encoder)
    return selector
