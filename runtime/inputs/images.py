"""Photographs from files, PIL and NumPy to the network's `pixel_values`, with LAVIS's arithmetic.

Source: LAVIS `lavis/processors/blip_processors.py` (BlipImageEvalProcessor: bicubic resize of the PIL image to a
square, no crop, ToTensor, Normalize) and `lavis/datasets/datasets/retrieval_datasets.py` (`.convert("RGB")`).
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from qpert.runtime.errors import ImageError
from qpert.runtime.inputs.preprocessing import ImagePreprocessing

if TYPE_CHECKING:
    from PIL.Image import Image

ImageInput: TypeAlias = "str | Path | Image | npt.NDArray[np.uint8]"
"""A path, a PIL image of any mode but `F`, or a uint8 array [H,W,3] in RGB order."""

ORIENTATION = 0x0112
"""The EXIF tag. 1 is upright, 2 to 8 are the other flips and quarter turns, anything else means nothing to PIL."""
QUARTER_TURNS = (5, 6, 7, 8)
"""Orientations that exchange width and height."""
_ORIENTED_INFO = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")
"""Where PIL keeps what states an orientation."""


LARGEST_RESIZED = 1 << 26
"""Pixels of a picture whose shorter side is resized before a crop: 200 MB in RGB. A line one pixel wide needs more."""


def load_image(source: ImageInput, *, name: str | None = None) -> Image:
    """The image as PIL RGB, 8 bits a channel, in the orientation in which it is meant to be seen.

    `name` is what error messages call it (default: the path, or the kind of input).

    Follows LAVIS's `Image.open(path).convert("RGB")`: alpha (RGBA, LA, PA, palette transparency) is dropped without
    compositing, because the retrieval checkpoints were fine-tuned and evaluated that way; grey, 1-bit, palette, CMYK
    and the rest convert as PIL converts them. Of an animation the first frame is used (of an opened PIL image, the
    frame it stands at).

    Departs from LAVIS in two places. EXIF orientation is honoured, which LAVIS ignores: boxes are therefore in the
    pixels of the oriented image, as viewers and detectors show it. Integer grey images (modes `I;16*` and `I`) with
    values above 255 are scaled from 16 to 8 bits, where PIL's conversion clips everything above 255 to white; where
    no value is above 255, the values are taken as they are, as PIL takes them.

    Raises `ImageError`, naming the image, for a file that is missing, empty, truncated, too large (PIL's
    decompression-bomb limit) or not an image; for zero size; for mode `F`; for arrays that are not uint8 [H,W,3].
    """
    from PIL import Image

    if isinstance(source, np.ndarray):
        return _from_array(source, name or "image array")
    if isinstance(source, Image.Image):
        return _to_rgb(source, name or "PIL image")
    if isinstance(source, str | Path):
        return _from_file(source, name or str(source))
    raise ImageError(
        f"{name or 'image'} is a {type(source).__name__}; expected a path, a PIL image or a uint8 array [H,W,3]",
        code="image-type",
    )


def decode_image(data: bytes, *, name: str) -> Image:
    """The picture in the bytes of an image file, as `load_image` gives that of a path; `name` is what errors call it.

    Raises `ImageError` as `load_image` does.
    """
    if not data:
        raise ImageError(f"{name} is empty; expected the bytes of an image file", code="image-empty")
    return _decoded(io.BytesIO(data), name)


def preprocess_images(images: Sequence[ImageInput], preprocessing: ImagePreprocessing) -> npt.NDArray[np.float32]:
    """`pixel_values` float32 [B,3,S,S] of B images, S = `preprocessing.size`. Errors as in `load_image`.

    The resize runs on 8-bit pixels, as in LAVIS, so a normalised value depends on its channel and byte alone: a table
    of 3×256 float32 values, computed in ToTensor's and Normalize's order, gives their result bit for bit.
    """
    from PIL import Image

    if isinstance(images, str | Path | Image.Image | np.ndarray):
        raise ImageError(
            f"images is one {type(images).__name__}; expected a sequence of images: put it in a list",
            code="images-kind",
        )
    size = preprocessing.size
    table = normalised_bytes(preprocessing)  # [3, 256]
    pixel_values = np.empty((len(images), 3, size, size), np.float32)
    for index, source in enumerate(images):
        name = str(source) if isinstance(source, str | Path) else f"image {index}"
        pixels = np.asarray(_fitted(load_image(source, name=name), preprocessing, name))  # [S, S, 3]
        for channel in range(3):
            np.take(table[channel], pixels[:, :, channel], out=pixel_values[index, channel], mode="clip")
    return pixel_values


def _fitted(image: Image, preprocessing: ImagePreprocessing, name: str) -> Image:
    """The picture as a square of `preprocessing.size`, 8 bits a channel."""
    width, height = preprocessing.resized(*image.size)
    if width * height > LARGEST_RESIZED:
        raise ImageError(
            f"{name} has {image.width}×{image.height} pixels, which its shorter side at {preprocessing.shortest_side} "
            f"makes {width}×{height}; expected at most {LARGEST_RESIZED:,} pixels: cut the picture first",
            code="image-elongated",
        )
    resized = resize(image, (width, height), preprocessing.resample)
    if preprocessing.fit == "squash":
        return resized
    left, top = preprocessing.crop_offset(width, height)
    return resized.crop((left, top, left + preprocessing.size, top + preprocessing.size))


def resize(image: Image, size: tuple[int, int], resample: str = "bicubic") -> Image:
    """`image` at `size` (width, height) in pixels: the columns first, then the rows, with 8 bits between the passes.

    Pillow up to 12 resizes in this order, and LAVIS's figures were made so. Pillow 13 (python-pillow/Pillow#9549) takes
    the rows first where the picture is much taller than wide, which changes pixels by up to 28 of 255 levels. One call
    for each axis leaves Pillow no choice, so every Pillow gives the same bytes. `resample` is one of `RESAMPLES`.
    """
    from PIL import Image

    filter_ = Image.Resampling[resample.upper()]
    return image.resize((size[0], image.height), filter_).resize(size, filter_)


def image_size(path: str | Path) -> tuple[int, int]:
    """(width, height) in pixels of the picture that `load_image` gives, mostly from the file's header alone.

    Raises `ImageError` as `load_image` does.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            return _upright_size(image)
    except Exception:  # noqa: BLE001, decoders raise nearly any class; load_image says what is wrong with the file
        return load_image(path).size


def _upright_size(image: Image) -> tuple[int, int]:
    """The size that an opened, not yet decoded image has once it is upright."""
    width, height = image.size
    tags = getattr(image, "tag_v2", None)
    if image.format == "TIFF" and tags is not None:
        width, height = tags[256], tags[257]  # as stored; newer Pillow has exchanged `size` already, older has not
    return (height, width) if _orientation(image) in QUARTER_TURNS else (width, height)


def _orientation(image: Image) -> int:
    """The EXIF orientation that PIL reads; 1 where there is none, or none that can be read."""
    try:
        value = image.getexif().get(ORIENTATION, 1)
        return next((known for known in range(1, 9) if value == known), 1)
    except Exception:  # noqa: BLE001, a broken EXIF block: PIL raises SyntaxError, struct.error and others
        return 1


def _upright(image: Image) -> Image:
    """The decoded image, turned as its orientation says. Its EXIF block is never written again, unlike in
    `ImageOps.exif_transpose`: a tag that nobody needs here may be one that PIL cannot write."""
    from PIL.Image import Transpose

    image.load()
    if image.format == "TIFF":
        return image  # PIL's TIFF reader has turned it, and before Pillow 10.1 left the tag there all the same
    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    turn = turns.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def normalised_bytes(preprocessing: ImagePreprocessing) -> npt.NDArray[np.float32]:
    """float32 [3,256]: what each byte of each channel becomes, (byte/255 − mean)/std."""
    mean = np.array(preprocessing.mean, np.float32)[:, None]
    std = np.array(preprocessing.std, np.float32)[:, None]
    scaled = np.arange(256, dtype=np.float32) / np.float32(255)
    return np.asarray((scaled - mean) / std, np.float32)


def _from_array(array: npt.NDArray[Any], name: str) -> Image:
    from PIL import Image

    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ImageError(
            f"{name} is {array.dtype} {list(array.shape)}; expected uint8 [H,W,3], RGB, 0–255: convert it first",
            code="image-array",
        )
    if 0 in array.shape:
        raise ImageError(
            f"{name} is empty: its shape is {list(array.shape)}; expected at least one pixel", code="image-empty"
        )
    return Image.fromarray(np.ascontiguousarray(array))


def _from_file(path: str | Path, name: str) -> Image:
    check_is_file(path, name)
    return _decoded(path, name)


def _decoded(source: str | Path | io.BytesIO, name: str) -> Image:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(source) as image:
            image.load()
            return _to_rgb(image, name)
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(
            f"{name} is not an image that PIL can read; expected JPEG, PNG, WebP or the like", code="image-format"
        ) from None
    except Image.DecompressionBombError as error:
        raise ImageError(
            f"{name} is too large to open safely: {error} Downsize it first.", code="image-too-large"
        ) from error
    except Exception as error:  # decoders meet strangers' bytes and raise nearly any class
        raise ImageError(
            f"{name} is broken or truncated: {error!r}. Replace the file or leave it out.", code="image-broken"
        ) from error


def check_is_file(path: str | Path, name: str) -> None:
    """Raises ImageError unless it is a regular file with something in it: pipes and devices could block."""
    try:
        file = Path(path)
        found, size = file.is_file(), file.stat().st_size if file.exists() else 0
    except (OSError, ValueError) as error:
        raise ImageError(f"{name!r} cannot be opened: {error}", code="image-missing") from error
    if not found:
        what = "is a folder, not an image file" if file.is_dir() else "does not exist (or is not a regular file)"
        raise ImageError(f"{name} {what}; check the path", code="image-missing")
    if size == 0:
        raise ImageError(f"{name} is an empty file; expected an image", code="image-empty")


def _to_rgb(image: Image, name: str) -> Image:
    """Oriented and converted; a new image that no longer depends on an open file. The caller's image stays as it is."""
    if 0 in image.size:
        raise ImageError(f"{name} has zero size: {image.width}×{image.height} pixels", code="image-empty")
    try:
        converted = _convert(_upright(image), name)
    except ImageError:
        raise
    except Exception as error:  # as in _from_file: a caller's PIL image may be decoded only now
        raise ImageError(
            f"{name} cannot be decoded or converted from {image.mode} to RGB: {error!r}", code="image-broken"
        ) from error
    for key in _ORIENTED_INFO:  # it is upright now: loaded again, it must not be turned again
        converted.info.pop(key, None)
    return converted


def _convert(image: Image, name: str) -> Image:
    if image.mode == "F":
        raise ImageError(
            f"{name} has floating-point pixels (mode F), whose range is unknown: convert it to 8 bits first",
            code="image-float",
        )
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _from_integers(image, name)
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA").convert("RGB")  # the same pixels as a direct conversion, without PIL's warning
    return image.convert("RGB")


def _from_integers(image: Image, name: str) -> Image:
    """8-bit RGB of grey integers: as they are up to 255 (PIL's and LAVIS's reading), else 16 bits scaled to 8."""
    from PIL import Image

    grey = np.asarray(image).astype(np.int64)  # [H, W]
    low, high = int(grey.min()), int(grey.max())
    if low < 0 or high > 65535:
        raise ImageError(
            f"{name} has values {low}…{high} in mode {image.mode}; expected 0…65535 (16-bit grey), or 0…255 "
            "(8-bit grey): convert it first",
            code="image-range",
        )
    scaled = grey if high <= 255 else (grey * 255 + 32767) // 65535
    return Image.fromarray(scaled.astype(np.uint8)).convert("RGB")
