"""Everything around the network: preprocessing, tokenisation, masks and weights of boxes, compared with the reference.

The bundle's own graphs of the same (`preprocess.onnx`, `boxes.onnx`) are held against it too.

A live reference makes its own pixels and ids (`LiveReferences.live_samples`); without one, the recorded ones are used.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from qpert.runtime.bundle.manifest import Manifest
from qpert.runtime.bundle.samples import Samples
from qpert.runtime.errors import QpertWarning
from qpert.runtime.inputs.boxes import Boxes
from qpert.runtime.inputs.images import preprocess_images
from qpert.runtime.inputs.perturbation import box_inputs
from qpert.runtime.retrieval.encoder import Encoder
from qpert.runtime.verification.host_graphs import host_graph_gates
from qpert.runtime.verification.result import Gate


def host_gates(encoder: Encoder, samples: Samples) -> list[Gate]:
    """All gates of this module."""
    distance = partial(pixel_distance, rows_first=may_resize_rows_first(encoder.manifest, samples))
    return [
        preprocessing_gate(encoder, samples),
        tokenizer_gate(encoder, samples),
        *box_gates(encoder, samples),
        *host_graph_gates(encoder.bundle, samples, distance),
    ]


def preprocessing_gate(encoder: Encoder, samples: Samples) -> Gate:
    """Pixels made here against the reference's; 1e-5 is float32 rounding of (x/255 − mean)/std."""
    rows_first = may_resize_rows_first(encoder.manifest, samples)
    make = runtime_pixels(encoder.manifest)
    distances = [pixel_distance(make, picture, pixels, rows_first=rows_first) for picture, pixels in samples.pictures]
    return Gate("preprocessing: max abs difference", max(distances), 1e-5)


def runtime_pixels(manifest: Manifest) -> Callable[[np.ndarray], np.ndarray]:
    """What the runtime makes of a picture uint8 [H,W,3]: float32 [3,S,S]."""
    return lambda picture: preprocess_images([picture], manifest.preprocessing)[0]


def pixel_distance(
    make: Callable[[np.ndarray], np.ndarray], picture: np.ndarray, recorded: np.ndarray, *, rows_first: bool
) -> float:
    """Max abs difference between the pixels float32 [3,S,S] that `make` makes of `picture` uint8 [H,W,3] and the
    reference's.

    Old bundles, and stock processors under Pillow 13, resize a tall picture rows before columns, where the product (and
    LAVIS's figures) resize columns first. If the reference may be one of these (`rows_first`), a tall picture may
    instead match the rows-first result made here, to the same limit: that of the transposed picture, transposed back,
    because the two passes differ only in their axis.
    """
    distance = float(np.abs(make(picture) - recorded).max())
    if picture.shape[0] <= picture.shape[1] or not rows_first:
        return distance
    turned = make(np.ascontiguousarray(picture.transpose(1, 0, 2)))
    return min(distance, float(np.abs(turned.transpose(0, 2, 1) - recorded).max()))


def may_resize_rows_first(manifest: Manifest, samples: Samples) -> bool:
    """Whether the reference's pixels may be resized in another order than the product's."""
    return samples.pillow_decides or may_hold_rows_first(manifest)


def may_hold_rows_first(manifest: Manifest) -> bool:
    """Whether the recorded pixels may be rows-first: made with Pillow 13 or newer before the order was fixed, that is,
    under schema 1."""
    major = manifest.tools.get("pillow", "").partition(".")[0]
    return manifest.schema_read == 1 and major.isdecimal() and int(major) >= 13


def tokenizer_gate(encoder: Encoder, samples: Samples) -> Gate:
    """Captions whose token ids differ from the reference's."""
    different = 0
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", QpertWarning
        )  # these captions are not the user's, so truncation does not matter
        for caption, expected in samples.captions:
            ids = encoder.tokenizer.encode([caption]).input_ids[0]
            different += int(not np.array_equal(ids, expected))
    return Gate("tokenizer: captions with other ids", float(different), 0.0)


def box_gates(encoder: Encoder, samples: Samples) -> Iterator[Gate]:
    """Masks and weights of the recorded boxes; 1e-5 is float32 rounding of shares and of weights up to 10."""
    manifest = encoder.manifest
    if not manifest.query_head.takes_boxes:
        return
    masks, weights = 0.0, 0.0
    for sample in samples.boxes:
        boxes = [Boxes(sample.xyxy, (int(sample.size[0]), int(sample.size[1])))]
        made_masks, made_weights = box_inputs(boxes, manifest.perturbation, manifest.token_grid)
        masks = max(masks, float(np.abs(made_masks[0] - sample.masks).max()))
        weights = max(weights, float(np.abs(made_weights[0] - sample.weights).max()))
    yield Gate("boxes: masks, max abs difference", masks, 1e-5)
    yield Gate("boxes: weights, max abs difference", weights, 1e-5)
