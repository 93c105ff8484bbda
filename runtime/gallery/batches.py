"""Reading and encoding the images of a list, and whether one is still what was encoded before."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from dataclasses import replace as replace_fields
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from qpert.runtime.bundle.roles import IMAGE_TOWER
from qpert.runtime.errors import BoxError, ImageError
from qpert.runtime.gallery.box_json import boxes_to_json
from qpert.runtime.gallery.detected import DetectedBoxes, without_source
from qpert.runtime.gallery.entries import ImageEntry
from qpert.runtime.gallery.pipeline import ordered
from qpert.runtime.gallery.writer import NewImage
from qpert.runtime.inputs.images import check_is_file, decode_image
from qpert.runtime.retrieval.encoder import Encoder
from qpert.runtime.retrieval.features import ImageFeatures, concatenated

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGES_AT_ONCE = 16
"""Decoded photographs held in memory (a batch of the vision graph may be smaller)."""


def boxes_difference(recorded: str | None, entry: ImageEntry, detected: DetectedBoxes | None) -> str | None:
    """What differs about the boxes of an image that was indexed with `recorded`, or None."""
    if detected is not None and entry.boxes is None:
        return None if detected.made(recorded) else "detector or its options"
    return None if without_source(recorded) == boxes_to_json(entry.boxes) else "boxes"


@dataclass(frozen=True)
class EncodedPart:
    """`entries` that are durable together: those that could be read, in order, and their features; None where none
    could."""

    entries: Sequence[ImageEntry]
    images: Sequence[NewImage]
    features: ImageFeatures | None


@dataclass(frozen=True)
class _Batch:
    """What one call made of its images."""

    images: Sequence[NewImage]
    features: ImageFeatures | None
    skipped: Sequence[tuple[str, str]]
    without_boxes: int


class ImageBatches:
    """Reads images, finds their boxes where a source is to do that, and encodes them. `skipped` holds (name, reason) of
    those that could not be read; in `without_boxes` of the others, the source found nothing."""

    def __init__(
        self,
        encoder: Encoder,
        detected: DetectedBoxes | None = None,
        *,
        skip_unreadable: bool = False,
        workers: int = 1,
    ) -> None:
        """`workers`: batches that are read and encoded at the same time."""
        self.encoder, self.detected, self.skip_unreadable = encoder, detected, skip_unreadable
        self.workers = workers
        self.without_boxes = 0
        self.skipped: list[tuple[str, str]] = []

    @contextmanager
    def encoded(self, entries: Sequence[ImageEntry], at_once: int) -> Iterator[Iterator[EncodedPart]]:
        """`entries` in parts of `at_once`, in order. Batches start with a part, so that a resumed run makes the same
        batches as one that was never interrupted; workers go on with later parts while one is written."""
        step = min(self.encoder.limit(IMAGE_TOWER, "B"), IMAGES_AT_ONCE)
        parts = [entries[start : start + at_once] for start in range(0, len(entries), at_once)]
        batches = [[part[start : start + step] for start in range(0, len(part), step)] for part in parts]
        with ordered(self._encode, [batch for own in batches for batch in own], self.workers) as results:
            yield (
                self._joined(part, list(islice(results, len(own)))) for part, own in zip(parts, batches, strict=True)
            )

    def _joined(self, entries: Sequence[ImageEntry], batches: Sequence[_Batch]) -> EncodedPart:
        for batch in batches:
            self.skipped += batch.skipped
            self.without_boxes += batch.without_boxes
        features = [batch.features for batch in batches if batch.features is not None]
        images = [image for batch in batches for image in batch.images]
        return EncodedPart(entries, images, concatenated(features) if features else None)

    def _encode(self, entries: Sequence[ImageEntry]) -> _Batch:
        """One batch, without the images that cannot be read where these are to be skipped. In any thread."""
        found: list[tuple[ImageEntry, Image, NewImage]] = []
        skipped: list[tuple[str, str]] = []
        for entry in entries:
            try:
                state, content = _read(entry)
                found.append((entry, _decoded(entry, content), state))
            except ImageError as error:
                if not self.skip_unreadable:
                    raise
                skipped.append((entry.name, str(error)))
        if not found:
            return _Batch([], None, skipped, 0)
        without_boxes = 0
        if self.detected is not None:
            found, without_boxes = _with_detected(self.detected, found)
        features = self.encoder.encode_images([image for _, image, _ in found], [entry.boxes for entry, _, _ in found])
        _check_finite([entry.name for entry, _, _ in found], features)
        return _Batch([new for _, _, new in found], features, skipped, without_boxes)


def _with_detected(
    detected: DetectedBoxes, found: Sequence[tuple[ImageEntry, Image, NewImage]]
) -> tuple[list[tuple[ImageEntry, Image, NewImage]], int]:
    """The same with the source's boxes where an entry has none, and in how many of these it found nothing."""
    boxes = iter(detected.find([image for entry, image, _ in found if entry.boxes is None]))
    filled, empty = [], 0
    for entry, image, new in found:
        if entry.boxes is None:
            its = next(boxes)
            empty += not len(its)
            entry, new = replace_fields(entry, boxes=its), replace_fields(new, boxes=detected.to_json(its))
        filled.append((entry, image, new))
    return filled, empty


def _read(entry: ImageEntry) -> tuple[NewImage, bytes]:
    """What the catalogue keeps of an image's file, and the file's bytes: what is hashed is what is decoded."""
    check_is_file(entry.path, str(entry.path))
    try:
        state, content = entry.path.stat(), entry.path.read_bytes()
    except OSError as error:
        raise ImageError(
            f"{entry.path} cannot be read: {error.strerror}; check the path", code="image-missing"
        ) from error
    path = os.path.abspath(entry.path)  # noqa: PTH100, resolve() would follow the links of a data set
    boxes = boxes_to_json(entry.boxes)
    captions, metadata = entry.captions, entry.metadata
    digest = hashlib.sha256(content).hexdigest()
    new = NewImage(entry.name, path, state.st_size, state.st_mtime_ns, digest, boxes, captions, metadata)
    return new, content


def _decoded(entry: ImageEntry, content: bytes) -> Image:
    image = decode_image(content, name=str(entry.path))
    if entry.boxes is not None and entry.boxes.size != image.size:
        raise BoxError(
            f"the boxes of {entry.name} are for a picture of {entry.boxes.size[0]}×{entry.boxes.size[1]} pixels, "
            f"it has {image.size[0]}×{image.size[1]}; give boxes in the picture's own pixels (after EXIF rotation)",
            code="box-image-size",
        )
    return image


def _check_finite(names: Sequence[str], features: ImageFeatures) -> None:
    """Half precision can overflow; a NaN in the gallery would spoil every search."""
    for index, name in enumerate(names):
        if not (np.isfinite(features.query_embeds[index]).all() and np.isfinite(features.image_embeds[index]).all()):
            raise ImageError(
                f"{name} was encoded to NaN or infinity; verify the bundle (`qpert verify`), and export it in fp32 if "
                "half precision overflows",
                code="image-not-finite",
            )
