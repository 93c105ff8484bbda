"""Pictures of strangers: from what a request holds to what the image tower takes."""

from __future__ import annotations

import base64
import binascii
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from qpert.runtime.detection import source
from qpert.runtime.detection.source import BoxSource
from qpert.runtime.errors import BoxError, ImageError, LimitError
from qpert.runtime.inputs.boxes import Boxes
from qpert.runtime.inputs.images import load_image, preprocess_images
from qpert.runtime.retrieval.encoder import Encoder
from qpert.runtime.serving.settings import Limits

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
"""Decoders that see strangers' bytes. Others that Pillow has are old and rarely looked at, and one (EPS) starts a
program."""

Corners = Sequence[Sequence[float]]
"""Boxes as a request gives them: x1, y1, x2, y2 in pixels of the picture as it is seen."""


@dataclass(frozen=True, eq=False)
class Picture:
    """One picture, ready for the image tower: `pixels` float32 [1, 3, S, S], and its boxes."""

    pixels: npt.NDArray[np.float32]
    boxes: Boxes | None


def decode_base64(text: str, name: str, limits: Limits) -> bytes:
    """The bytes of a data URI, or of base64 alone.

    Raises:
        ImageError: it is neither (code `picture-encoding`), or too long (`picture-bytes`).
    """
    if text.startswith("data:"):
        head, comma, text = text.partition(",")
        if not comma or not head.endswith(";base64"):
            raise ImageError(
                f"{name} is a data URI without base64; expected data:image/jpeg;base64,…", code="picture-encoding"
            )
    check_bytes(len(text) * 3 // 4, name, limits)
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(
            f"{name} is not base64 ({error}); expected a data URI or the base64 of a picture file",
            code="picture-encoding",
        ) from None


def check_bytes(count: int, name: str, limits: Limits) -> None:
    """Raises ImageError for more than a picture may have."""
    if count > limits.picture_bytes:
        raise ImageError(
            f"{name} has {count:,} bytes, expected at most {limits.picture_bytes:,}; send a smaller file",
            code="picture-bytes",
        )


def open_picture(data: bytes, name: str, limits: Limits) -> Image:
    """The picture as PIL RGB, upright, as `load_image` gives it. The header is looked at before anything is decoded.

    Raises:
        ImageError: not a picture, broken, truncated.
        LimitError: more pixels than allowed (code `picture-pixels`).
    """
    from PIL import Image, UnidentifiedImageError

    check_bytes(len(data), name, limits)
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise ImageError(
            f"{name} is not a picture; expected one of {', '.join(FORMATS)}", code="image-format"
        ) from None
    except Image.DecompressionBombError as error:
        raise LimitError(f"{name} is too large: {error} Send a smaller picture.", code="picture-pixels") from error
    except Exception as error:  # decoders meet strangers' bytes and raise nearly any class
        raise ImageError(f"{name} cannot be read: {error!r}; send another file", code="image-broken") from error
    with image:
        if (pixels := image.width * image.height) > limits.pixels:
            raise LimitError(
                f"{name} has {image.width}×{image.height} = {pixels:,} pixels, expected at most {limits.pixels:,}; "
                "send a smaller picture",
                code="picture-pixels",
            )
        return load_image(image, name=name)


def boxes_of(corners: Corners | None, size: tuple[int, int], name: str) -> Boxes | None:
    """The boxes of a picture of `size` (width, height). Raises BoxError, naming the picture."""
    if corners is None:
        return None
    try:
        xyxy = np.array(corners, np.float64).reshape(-1, 4) if len(corners) == 0 else np.array(corners, np.float64)
        return Boxes(xyxy, size)
    except BoxError as error:
        raise BoxError(f"{name}: {error}", code=error.code) from error
    except (ValueError, OverflowError):
        raise BoxError(
            f"{name}: boxes are not rows of x1, y1, x2, y2; expected four numbers each", code="box-shape"
        ) from None


def prepare(
    data: bytes, corners: Corners | None, name: str, encoder: Encoder, limits: Limits, detector: BoxSource | None = None
) -> Picture:
    """Decode, check and preprocess one picture; what is left of it is small, whatever its size was.

    `detector`: finds the boxes where the request gives none (null; an empty list means that there are none).

    Raises:
        ImageError, BoxError, LimitError: as `open_picture`, `boxes_of` and `Encoder.check_boxes`.
    """
    image = open_picture(data, name, limits)
    if corners is None and detector is not None:
        found = source.boxes_of(detector, [image])
    else:
        found = [boxes_of(corners, image.size, name)]
    (boxes,) = encoder.check_boxes(1, found)
    return Picture(preprocess_images([image], encoder.manifest.preprocessing), boxes)


def corners_from_json(text: str, name: str) -> list[Corners | None]:
    """The form field `boxes`: of each picture a list of boxes, or null. Raises BoxError."""
    try:
        values = json.loads(text)
    except ValueError:
        values = text
    if not isinstance(values, list) or not all(value is None or isinstance(value, list) for value in values):
        raise BoxError(f"{name} is no JSON list with the boxes of each picture, or null for each", code="box-shape")
    return values
