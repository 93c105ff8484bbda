"""The recorded images and captions as a reference prepares them, for the preprocessing and tokenizer gates."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from qpert.exporter.checkpoints.checkpoint import Checkpoint
from qpert.exporter.references.pixels import picture_pixels
from qpert.exporter.references.protocol import Reference
from qpert.runtime.bundle.manifest import Manifest
from qpert.runtime.bundle.samples import Samples
from qpert.runtime.inputs.text import clean_caption

PixelsOf = Callable[[Path], np.ndarray]
TokenIds = Callable[[Sequence[str], int], "list[np.ndarray]"]


def pixels_by(reference: Reference, checkpoint: Checkpoint) -> PixelsOf:
    """How a reference reads an image: with its stock processor, if any, else the checkpoint's preprocessing."""
    own: PixelsOf | None = upstream_attribute(reference, "pixels")
    return own or (lambda file: picture_pixels(file, checkpoint.preprocessing))


def upstream_attribute(reference: Reference, name: str) -> Any:
    """The attribute of a reference or of the third-party one inside it; None if neither has it."""
    return getattr(reference, name, None) or getattr(getattr(reference, "upstream", None), name, None)


def with_own_inputs(samples: Samples, reference: Reference, pixels: PixelsOf, manifest: Manifest) -> Samples:
    """The samples with the reference's own pixels and, if it has a tokenizer, its own ids.

    Images pass through a lossless PNG file, because a stock processor reads files.
    """
    pictures = tuple((picture, _through_file(picture, pixels)) for picture, _ in samples.pictures)
    samples = replace(samples, pillow_decides=upstream_attribute(reference, "pixels") is not None)
    token_ids: TokenIds | None = upstream_attribute(reference, "token_ids")
    if token_ids is None:
        return replace(samples, pictures=pictures)
    captions = [caption for caption, _ in samples.captions]
    cleaned = [clean_caption(caption) if manifest.tokenizer.clean == "lavis" else caption for caption in captions]
    ids = token_ids(cleaned, manifest.tokenizer.max_length)
    return replace(samples, pictures=pictures, captions=tuple(zip(captions, ids, strict=True)))


def _through_file(picture: np.ndarray, pixels: PixelsOf) -> np.ndarray:
    from PIL import Image

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "picture.png"
        Image.fromarray(picture).save(file)
        return pixels(file)
