"""Reading and encoding the images of a list, and whether one is still what was encoded before."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace as replace_fields
from typing import TYPE_CHECKING

import numpy as np

from qpert.runtime.bundle.roles import IMAGE_TOWER
from qpert.runtime.errors import BoxError, ImageError
from qpert.runtime.files import sha256_of
from qpert.runtime.gallery.box_json import boxes_to_json
from qpert.runtime.gallery.detected import DetectedBoxes, without_source
from qpert.runtime.gallery.entries import ImageEntry
from qpert.runtime.gallery.writer import NewImage
from qpert.runtime.inputs.images import load_image
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


class ImageBatches:
    """Reads images, finds their boxes where a source is to do that, and encodes them. `skipped` holds (name, reason) of
    those that could not be read; in `without_boxes` of the others, the source found nothing."""

    def __init__(
        self, encoder: Encoder, detected: DetectedBoxes | None = None, *, skip_unreadable: bool = False
    ) -> None:
        self.encoder, self.detected, self.skip_unreadable = encoder, detected, skip_unreadable
        self.without_boxes = 0
        self.skipped: list[tuple[str, str]] = []

    def encode(self, entries: Sequence[ImageEntry]) -> tuple[list[NewImage], ImageFeatures | None]:
        """The images that could be read, in order, and their features; None where there are none."""
        step = min(self.encoder.limit(IMAGE_TOWER, "B"), IMAGES_AT_ONCE)
        images: list[NewImage] = []
        parts: list[ImageFeatures] = []
        for start in range(0, len(entries), step):
            new, part = self._encode(entries[start : start + step])
            images += new
            parts += [] if part is None else [part]
        return images, concatenated(parts) if parts else None

    def _encode(self, entries: Sequence[ImageEntry]) -> tuple[list[NewImage], ImageFeatures | None]:
        """One batch, without the images that cannot be read where these are to be skipped."""
        found: list[tuple[ImageEntry, Image, NewImage]] = []
        for entry in entries:
            try:
                state = _state(entry)
                found.append((entry, _loaded(entry), state))
            except ImageError as error:
                if not self.skip_unreadable:
                    raise
                self.skipped.append((entry.name, str(error)))
        if not found:
            return [], None
        if self.detected is not None:
            found = self._with_detected(self.detected, found)
        features = self.encoder.encode_images([image for _, image, _ in found], [entry.boxes for entry, _, _ in found])
        _check_finite([entry.name for entry, _, _ in found], features)
        return [new for _, _, new in found], features

    def _with_detected(
        self, detected: DetectedBoxes, found: Sequence[tuple[ImageEntry, Image, NewImage]]
    ) -> list[tuple[ImageEntry, Image, NewImage]]:
        """The same with the source's boxes where an entry has none."""
        boxes = iter(detected.find([image for entry, image, _ in found if entry.boxes is None]))
        filled = []
        for entry, image, new in found:
            if entry.boxes is None:
                its = next(boxes)
                self.without_boxes += not len(its)
                entry, new = replace_fields(entry, boxes=its), replace_fields(new, boxes=detected.to_json(its))
            filled.append((entry, image, new))
        return filled


def _state(entry: ImageEntry) -> NewImage:
    """What the catalogue keeps of an image's file."""
    try:
        state = entry.path.stat()
        digest = sha256_of(entry.path)
    except OSError as error:
        raise ImageError(
            f"{entry.path} cannot be read: {error.strerror}; check the path", code="image-missing"
        ) from error
    path = os.path.abspath(entry.path)  # noqa: PTH100, resolve() would follow the links of a data set
    boxes = boxes_to_json(entry.boxes)
    captions, metadata = entry.captions, entry.metadata
    return NewImage(entry.name, path, state.st_size, state.st_mtime_ns, digest, boxes, captions, metadata)


def _loaded(entry: ImageEntry) -> Image:
    image = load_image(entry.path)
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
