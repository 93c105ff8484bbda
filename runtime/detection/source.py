"""`BoxSource`: whatever yields boxes for pictures. A detector is one, and so is any object with the same method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from qpert.runtime.errors import BoxError
from qpert.runtime.inputs.boxes import Boxes

if TYPE_CHECKING:
    from PIL.Image import Image


@runtime_checkable
class BoxSource(Protocol):
    """Yields the boxes of pictures."""

    def boxes(self, images: Sequence[Image]) -> list[Boxes | None]:
        """One `Boxes` for each picture, in its own pixels, with scores and label names; None where nothing was found.

        Args:
            images: PIL pictures in RGB, EXIF orientation already applied.
        """
        ...


def boxes_of(source: BoxSource, images: Sequence[Image]) -> list[Boxes | None]:
    """`source.boxes(images)`, checked: one `Boxes` or None for each picture, of the picture's size.

    Raises:
        BoxError: the source returned something else (`box-source`).
    """
    found = source.boxes(images)
    if not isinstance(found, list) or len(found) != len(images):
        what = f"{len(found)} results" if isinstance(found, list) else f"a {type(found).__name__}"
        raise BoxError(
            f"{type(source).__name__}.boxes returned {what} for {len(images)} pictures; expected a list with a Boxes "
            "or None for each",
            code="box-source",
        )
    for place, (boxes, image) in enumerate(zip(found, images, strict=True)):
        if boxes is None:
            continue
        if not isinstance(boxes, Boxes) or boxes.size != image.size:
            got = f"boxes for {boxes.size}" if isinstance(boxes, Boxes) else f"a {type(boxes).__name__}"
            raise BoxError(
                f"{type(source).__name__}.boxes returned {got} for picture {place}, which has {image.size} pixels; "
                "expected a Boxes of that size, or None",
                code="box-source",
            )
    return [boxes if boxes is not None and len(boxes) else None for boxes in found]


def source_identity(source: BoxSource) -> dict[str, Any] | None:
    """What a source says decides its boxes (attribute `identity`, a dictionary for JSON); None if nothing."""
    identity = getattr(source, "identity", None)
    return identity if isinstance(identity, dict) else None
