"""What callers pass to the Python API, made into what the code works with.

Any iterable will do where several of something are meant: lists, tuples, arrays, generators. What has no order (a set)
or two readings (one picture where several are meant, a dict) is refused: each message says what was got, what was
expected and what to do.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qpert.runtime.errors import BoxError, ImageError, InputError, TextError
from qpert.runtime.inputs.boxes import Boxes

if TYPE_CHECKING:
    from qpert.runtime.inputs.images import ImageInput


def as_list(values: Any, what: str, error: type[InputError], *, code: str) -> list[Any]:
    """Any iterable that has an order as a list; `what` names it in the message.

    Raises:
        InputError: (of class `error`) it is no iterable, a mapping, a set, text or bytes.
    """
    unordered = isinstance(values, Mapping | AbstractSet | str | bytes | bytearray)
    scalar = isinstance(values, np.ndarray) and values.ndim == 0
    if unordered or scalar or not isinstance(values, Iterable):
        raise error(f"{what} are a {kind_of(values)}; expected a list, a tuple or another iterable", code=code)
    return list(values)


def kind_of(value: object) -> str:
    """What a message calls the type of a value."""
    if isinstance(value, np.ndarray):
        return f"NumPy array of {value.dtype} {list(value.shape)}"
    return type(value).__name__


def as_images(images: Any) -> list[ImageInput]:
    """B images as a list. An array [B, H, W, 3] counts as B images.

    Raises:
        ImageError: one image, or something else that is no iterable of images (code `images-kind`).
        InputError: none at all (code `no-images`).
    """
    from PIL.Image import Image

    one = isinstance(images, str | Path | Image) or (isinstance(images, np.ndarray) and images.ndim == 3)
    if one:
        raise ImageError(
            f"images is one {kind_of(images)}; expected a sequence of images: put it in a list", code="images-kind"
        )
    found = as_list(images, "images", ImageError, code="images-kind")
    if not found:
        raise InputError("got no images to encode, expected at least one", code="no-images")
    return found


def as_texts(texts: Any) -> list[str]:
    """T texts as a list, which may be empty; what is in it is checked where it is cleaned.

    Raises:
        TextError: one string, or something else that is no iterable of texts (code `texts-kind`).
    """
    if isinstance(texts, str):
        shown = ascii(texts if len(texts) <= 80 else texts[:77] + "...")
        raise TextError(f"texts is the string {shown}; expected a list of strings: put it in a list", code="texts-kind")
    found = as_list(texts, "texts", TextError, code="texts-kind")
    wrong = next(((index, text) for index, text in enumerate(found) if not isinstance(text, str)), None)
    if wrong is not None:
        raise TextError(f"text {wrong[0]} is a {kind_of(wrong[1])}; expected a string", code="text-kind")
    return [str(text) for text in found]  # NumPy's strings too


def as_boxes(boxes: Any, count: int) -> list[Boxes | None]:
    """The boxes of each of `count` images; None for all stands for none.

    Raises:
        BoxError: something other than `Boxes` or None for each image (code `boxes-kind`).
        InputError: another number of them (code `boxes-count`).
    """
    if boxes is None:
        return [None] * count
    if isinstance(boxes, Boxes):
        raise BoxError(
            "boxes is one Boxes; expected a sequence with one entry for each image: put it in a list", code="boxes-kind"
        )
    found = as_list(boxes, "boxes", BoxError, code="boxes-kind")
    for index, entry in enumerate(found):
        if entry is not None and not isinstance(entry, Boxes):
            raise BoxError(
                f"the boxes of image {index} are a {kind_of(entry)}; expected Boxes or None: "
                "Boxes(xyxy=[[x1, y1, x2, y2], …], size=(width, height))",
                code="boxes-kind",
            )
    if len(found) != count:
        raise InputError(
            f"got boxes for {len(found)} images and {count} images; give one entry an image (or None)",
            code="boxes-count",
        )
    return found


def as_count(value: Any, name: str, *, least: int) -> int:
    """A whole number of at least `least`, NumPy's too; a bool or a float is none.

    Raises:
        InputError: it is not (code `count`).
    """
    try:
        number = None if isinstance(value, bool | np.bool_) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least:
        raise InputError(f"got {name}={value!r}, expected a whole number of at least {least}", code="count")
    return number


def as_rows(rows: Any, count: int) -> npt.NDArray[np.int64]:
    """int64 [m]: row numbers from 0 to `count` - 1, in any order.

    Raises:
        InputError: others (code `rows`).
    """
    array = np.asarray(as_list(rows, "rows", InputError, code="rows"))
    if not array.size:
        return np.empty(0, np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu" or array.min() < 0 or array.max() >= count:
        raise InputError(f"rows are {array.tolist()}; expected whole numbers from 0 to {count - 1}", code="rows")
    return array.astype(np.int64)


def as_path(path: Any, what: str) -> Path:
    """A `str` or `Path`; anything else is an InputError (code `path`) that calls it `what`."""
    if not isinstance(path, str | Path):
        raise InputError(f"{what} is a {kind_of(path)}; expected the path of a folder", code="path")
    return Path(path)


def as_numbers(values: Any, name: str) -> npt.NDArray[np.floating[Any]]:
    """An array of floating-point numbers; integers and nested lists become float32.

    Raises:
        InputError: it holds something else (code `numbers`).
    """
    try:
        array = np.asarray(values)
    except ValueError:  # rows of different lengths
        array = np.empty(0, object)
    if array.dtype.kind not in "iuf":
        raise InputError(f"{name} is a {kind_of(values)}; expected an array of numbers", code="numbers")
    return array if array.dtype.kind == "f" else array.astype(np.float32)
