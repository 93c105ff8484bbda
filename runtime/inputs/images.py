"""Photographs from files, PIL and NumPy to the network's `pixel_values`, with LAVIS's arithmetic.

Source: LAVIS `lavis/processors/blip_processors.py` (BlipImageEvalProcessor: bicubic resize of the PIL image to a
square, no crop, ToTensor, Normalize) and `lavis/datasets/datasets/retrieval_datasets.py` (`.convert("RGB")`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from qpert.runtime.errors import ImageError
from qpert.runtime.inputs.preprocessing import ImagePreprocessing

if TYPE_CHECKING:
    from PIL.Image import Image, Resampling

ImageInput: TypeAlias = "str | Path | Image | npt.NDArray[np.uint8]"
"""A path, a PIL image of any mode but `F`, or a uint8 array [H,W,3] in RGB order."""


def load_image(source: ImageInput, *, name: str | None = None) -> Image:
    """The image as PIL RGB, 8 bits a channel, in the orientation in which it is meant to be seen.

    `name` is what error messages call it (default: the path, or the kind of input).

    Follows LAVIS's `Image.open(path).convert("RGB")`: alpha (RGBA, LA, PA, palette transparency) is dropped without
    compositing, because the retrieval checkpoints were fine-tuned and evaluated that way; grey, 1-bit, palette, CMYK
    and the rest convert as PIL converts them. Of an animation the first frame is used (of an opened PIL image, the
    frame it stands at).

    Departs from LAVIS in two places. EXIF orientation is honoured, which LAVIS ignores: boxes are therefore in the
    pixels of the oriented image, as viewers and detectors show it. 16-bit grey images (modes `I;16*`, and `I` read as
    16-bit) are scaled to 8 bits, where PIL's conversion clips everything above 255 to white.

    Raises `ImageError`, naming the image, for a file that is missing, empty, truncated, too large (PIL's
    decompression-bomb limit) or not an image; for zero size; for mode `F`; for arrays that are not uint8 [H,W,3].
    """
    from PIL import Image

    if isinstance(source, np.ndarray):
        return _from_array(source, name or "image array")
    if isinstance(source, Image.Image):
        return _to_rgb(source, name or "PIL image", owned=False)
    if isinstance(source, str | Path):
        return _from_file(source, name or str(source))
    raise ImageError(
        f"{name or 'image'} is a {type(source).__name__}; expected a path, a PIL image or a uint8 array [H,W,3]"
    )


def preprocess_images(images: Sequence[ImageInput], preprocessing: ImagePreprocessing) -> npt.NDArray[np.float32]:
    """`pixel_values` float32 [B,3,S,S] of B images, S = `preprocessing.size`. Errors as in `load_image`.

    The resize runs on 8-bit pixels, as in LAVIS, so a normalised value depends on its channel and byte alone: a table
    of 3×256 float32 values, computed in ToTensor's and Normalize's order, gives their result bit for bit.
    """
    from PIL import Image

    if isinstance(images, str | Path | Image.Image | np.ndarray):
        raise ImageError(f"images is one {type(images).__name__}; expected a sequence of images: put it in a list")
    size = preprocessing.size
    filter_ = Image.Resampling[preprocessing.resample.upper()]
    table = _normalised_bytes(preprocessing)  # [3, 256]
    pixel_values = np.empty((len(images), 3, size, size), np.float32)
    for index, source in enumerate(images):
        name = str(source) if isinstance(source, str | Path) else f"image {index}"
        pixels = np.asarray(_fitted(load_image(source, name=name), preprocessing, filter_))  # [S, S, 3]
        for channel in range(3):
            np.take(table[channel], pixels[:, :, channel], out=pixel_values[index, channel], mode="clip")
    return pixel_values


def _fitted(image: Image, preprocessing: ImagePreprocessing, filter_: Resampling) -> Image:
    """The picture as a square of `preprocessing.size`, 8 bits a channel."""
    resized = image.resize(preprocessing.resized(*image.size), filter_)
    if preprocessing.fit == "squash":
        return resized
    left, top = preprocessing.crop_offset(*resized.size)
    return resized.crop((left, top, left + preprocessing.size, top + preprocessing.size))


def _normalised_bytes(preprocessing: ImagePreprocessing) -> npt.NDArray[np.float32]:
    """[3,256]: what each byte of each channel becomes."""
    mean = np.array(preprocessing.mean, np.float32)[:, None]
    std = np.array(preprocessing.std, np.float32)[:, None]
    scaled = np.arange(256, dtype=np.float32) / np.float32(255)
    return np.asarray((scaled - mean) / std, np.float32)


def _from_array(array: npt.NDArray[Any], name: str) -> Image:
    from PIL import Image

    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ImageError(
            f"{name} is {array.dtype} {list(array.shape)}; expected uint8 [H,W,3], RGB, 0–255: convert it first"
        )
    if 0 in array.shape:
        raise ImageError(f"{name} is empty: its shape is {list(array.shape)}; expected at least one pixel")
    return Image.fromarray(np.ascontiguousarray(array))


def _from_file(path: str | Path, name: str) -> Image:
    from PIL import Image, UnidentifiedImageError

    _check_is_file(path, name)
    try:
        with Image.open(path) as image:
            image.load()
            return _to_rgb(image, name, owned=True)
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(f"{name} is not an image that PIL can read; expected JPEG, PNG, WebP or the like") from None
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name} is too large to open safely: {error} Downsize it first.") from error
    except Exception as error:  # decoders meet strangers' bytes and raise nearly any class
        raise ImageError(f"{name} is broken or truncated: {error!r}. Replace the file or leave it out.") from error


def _check_is_file(path: str | Path, name: str) -> None:
    """A regular file with something in it; pipes and devices, which could block, are refused."""
    try:
        file = Path(path)
        found, size = file.is_file(), file.stat().st_size if file.exists() else 0
    except (OSError, ValueError) as error:
        raise ImageError(f"{name!r} cannot be opened: {error}") from error
    if not found:
        what = "is a folder, not an image file" if file.is_dir() else "does not exist (or is not a regular file)"
        raise ImageError(f"{name} {what}; check the path")
    if size == 0:
        raise ImageError(f"{name} is an empty file; expected an image")


def _to_rgb(image: Image, name: str, *, owned: bool) -> Image:
    """Oriented and converted; a new image that no longer depends on an open file. The caller's image stays as it is."""
    from PIL import ImageOps

    if 0 in image.size:
        raise ImageError(f"{name} has zero size: {image.width}×{image.height} pixels")
    try:
        if owned:
            ImageOps.exif_transpose(image, in_place=True)
            return _convert(image, name)
        return _convert(ImageOps.exif_transpose(image), name)
    except ImageError:
        raise
    except Exception as error:  # as in _from_file: a caller's PIL image may be decoded only now
        raise ImageError(f"{name} cannot be decoded or converted from {image.mode} to RGB: {error!r}") from error


def _convert(image: Image, name: str) -> Image:
    if image.mode == "F":
        raise ImageError(
            f"{name} has floating-point pixels (mode F), whose range is unknown: convert it to 8 bits first"
        )
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _from_16_bit(image, name)
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA").convert("RGB")  # the same pixels as a direct conversion, without PIL's warning
    return image.convert("RGB")


def _from_16_bit(image: Image, name: str) -> Image:
    from PIL import Image

    grey = np.asarray(image).astype(np.int64)  # [H, W]
    low, high = int(grey.min()), int(grey.max())
    if low < 0 or high > 65535:
        raise ImageError(f"{name} has values {low}…{high} in mode {image.mode}; expected 0…65535 (16-bit grey)")
    return Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
