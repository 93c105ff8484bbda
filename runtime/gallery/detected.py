"""Boxes that a `BoxSource` finds while images are indexed: found, counted, and recorded with the source's identity."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qpert.runtime.bundle.roles import QUERY_HEAD
from qpert.runtime.detection.source import BoxSource, boxes_of, source_identity
from qpert.runtime.errors import InputError
from qpert.runtime.gallery.box_json import boxes_to_json
from qpert.runtime.inputs.boxes import Boxes
from qpert.runtime.retrieval.encoder import Encoder

if TYPE_CHECKING:
    from PIL.Image import Image

SOURCE = "source"
"""The key of the identity in an image's boxes in the catalogue."""


@dataclass(frozen=True)
class DetectedBoxes:
    """A source, and the SHA-256 of what it says decides its boxes; None where it says nothing."""

    source: BoxSource
    digest: str | None

    @classmethod
    def of(cls, source: BoxSource, encoder: Encoder) -> DetectedBoxes:
        """Raises InputError where `source` is none, or the encoder's bundle takes no boxes."""
        if not isinstance(source, BoxSource):
            raise InputError(
                f"boxes are a {type(source).__name__}; expected a BoxSource, such as a Detector: give boxes that you "
                "have to the entries",
                code="box-source",
            )
        if not encoder.graph(QUERY_HEAD).spec.takes_boxes:
            raise InputError(
                f"this bundle ({encoder.manifest.family}) takes no boxes, so a detector would have no effect; leave it "
                "out, or export a bundle that takes boxes",
                code="bundle-without-boxes",
            )
        identity = source_identity(source)
        text = None if identity is None else json.dumps(identity, sort_keys=True)
        return cls(source, None if text is None else hashlib.sha256(text.encode()).hexdigest())

    def find(self, images: Sequence[Image]) -> list[Boxes]:
        """The boxes of each picture; none give `Boxes.empty`."""
        found = boxes_of(self.source, images)
        return [boxes or Boxes.empty(image.size) for boxes, image in zip(found, images, strict=True)]

    def to_json(self, boxes: Boxes) -> str:
        """Boxes as the catalogue keeps them, with the identity."""
        values = json.loads(boxes_to_json(boxes) or "")
        return json.dumps(values if self.digest is None else values | {SOURCE: self.digest})

    def made(self, recorded: str | None) -> bool:
        """Whether an image's recorded boxes are this source's. Those of a source without identity are taken to be."""
        return self.digest is None or (recorded is not None and json.loads(recorded).get(SOURCE) == self.digest)


def without_source(recorded: str | None) -> str | None:
    """Recorded boxes as `boxes_to_json` writes them, to be compared with boxes of a file."""
    if recorded is None or f'"{SOURCE}"' not in recorded:
        return recorded
    return json.dumps({key: value for key, value in json.loads(recorded).items() if key != SOURCE})
