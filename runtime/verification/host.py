"""What stands around the network: preprocessing, tokenisation, masks and weights of boxes, against the reference's.

A live reference brings its own pixels and ids (`LiveReferences.live_samples`); without one, the recorded ones count.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np

from qpert.runtime.bundle.samples import Samples
from qpert.runtime.errors import QpertWarning
from qpert.runtime.inputs.boxes import Boxes
from qpert.runtime.inputs.images import preprocess_images
from qpert.runtime.inputs.perturbation import box_inputs
from qpert.runtime.retrieval.encoder import Encoder
from qpert.runtime.verification.result import Gate


def host_gates(encoder: Encoder, samples: Samples) -> list[Gate]:
    """All of them."""
    return [preprocessing_gate(encoder, samples), tokenizer_gate(encoder, samples), *box_gates(encoder, samples)]


def preprocessing_gate(encoder: Encoder, samples: Samples) -> Gate:
    """Pictures preprocessed here against the reference's pixels; 1e-5 is float32 rounding of (x/255 − mean)/std."""
    pictures = [picture for picture, _ in samples.pictures]
    pixel_values = preprocess_images(pictures, encoder.manifest.preprocessing)
    distance = float(np.abs(pixel_values - np.stack([pixels for _, pixels in samples.pictures])).max())
    return Gate("preprocessing: max abs difference", distance, 1e-5)


def tokenizer_gate(encoder: Encoder, samples: Samples) -> Gate:
    """Captions whose token ids here are not the reference's."""
    different = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QpertWarning)  # these captions are not the user's: no matter if they are cut
        for caption, expected in samples.captions:
            ids = encoder.tokenizer.encode([caption]).input_ids[0]
            different += int(not np.array_equal(ids, expected))
    return Gate("tokenizer: captions with other ids", float(different), 0.0)


def box_gates(encoder: Encoder, samples: Samples) -> Iterator[Gate]:
    """Masks and weights made here of the recorded boxes; 1e-5 is float32 rounding of shares and of weights up to 10."""
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
