"""Image names: which name in a box file or data set means which image, and where the file of a name is.

Every reader matches names here, so that a box file means the same images in each format and in each command.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Literal, TypeAlias

_SUFFIXES = (
    "apng avif avifs bmp bw cur dds dib emf eps fit fits flc fli gif heic heif icns ico icb im j2c j2k jfif "
    "jp2 jpc jpe jpeg jpf jpg jpx jxl mpo pbm pcd pcx pfm pgm png pnm ppm ps psd qoi ras rgb rgba sgi svg tga "
    "tif tiff vda vst webp wmf xbm xpm "
)
PICTURE_SUFFIXES = frozenset(f".{suffix}" for suffix in _SUFFIXES.split())
"""What counts as an extension of an image's name. The end of `clip.0001` does not: it is part of the name."""

LITTER = ("thumbs.db", "desktop.ini", "ehthumbs.db")
"""Files, in lower case, that systems leave in folders of pictures; names that begin with a dot count too."""

Side: TypeAlias = Literal["annotation", "image"]
"""Whose names: those that an annotation (a box file, an Entities folder) uses, or those of the images themselves."""


def is_litter(name: str) -> bool:
    """Whether a file's name is one that users did not choose: hidden (`.DS_Store`, `._photo.jpg`) or a system's own."""
    return name.startswith(".") or name.lower() in LITTER


def file_name(name: str) -> str:
    """The last component of a name, in Unicode's composed form (NFC), in which macOS names equal the others'."""
    return unicodedata.normalize("NFC", name.replace("\\", "/").rsplit("/", 1)[-1])


def image_stem(name: str) -> str:
    """The last component of an image's name without its extension, where it has one of `PICTURE_SUFFIXES`."""
    last = file_name(name)
    stem, dot, suffix = last.rpartition(".")
    return stem if stem and dot + suffix.lower() in PICTURE_SUFFIXES else last


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _final_number(name: str) -> str | None:
    digits = re.search(r"[0-9]+$", image_stem(name))
    return (digits[0].lstrip("0") or "0") if digits else None


def _bare_number(name: str) -> str | None:
    """The number that a name is; `139.0` is 139, which spreadsheets and pandas have written through floats."""
    digits = re.fullmatch(r"([0-9]+)(\.0+)?", name)
    return (digits[1].lstrip("0") or "0") if digits else None


_Key: TypeAlias = Callable[[str], "str | None"]
_KEYS: Mapping[Side, tuple[_Key, ...]] = {
    "annotation": (str, _composed, file_name, file_name, image_stem, _bare_number),
    "image": (str, _composed, file_name, image_stem, image_stem, _final_number),
}
"""What is compared, level by level, until something is equal.

The names; the names in one Unicode form; their last components; the annotation's whole last component with the image's
stem (`clip.0001` means `clip.0001.jpg`); their stems; an annotation's bare number (COCO's `image_id`) with the number
at the end of the image's stem.
"""


class NameIndex:
    """Names of one side, in which names of the other side are looked up."""

    def __init__(self, names: Iterable[str], side: Side) -> None:
        listed = tuple(names)
        self._levels = [_level(listed, key) for key in _KEYS[side]]
        self._other = _KEYS["image" if side == "annotation" else "annotation"]

    def find(self, name: str) -> tuple[int, tuple[str, ...]]:
        """The level of the closest match, from 0 for equal names, and all names that match there; none give ()."""
        for number, (key, level) in enumerate(zip(self._other, self._levels, strict=True)):
            if (value := key(name)) is not None and value in level:
                return number, level[value]
        return len(self._levels), ()


def _level(names: Iterable[str], key: _Key) -> Mapping[str, tuple[str, ...]]:
    level: dict[str, list[str]] = defaultdict(list)
    for name in names:
        if (value := key(name)) is not None:
            level[value].append(name)
    return {value: tuple(found) for value, found in level.items()}


def named_file(root: Path, name: str) -> Path:
    """Where the file called `name` below `root` is; `root / name` where there is none.

    An accented letter can be one character or two (NFC, NFD), and archives made on macOS hold the other form of what an
    annotation says: the form that exists is taken.
    """
    given = root / name
    if name.isascii() or given.exists():
        return given
    others = (root / unicodedata.normalize(form, name) for form in ("NFC", "NFD"))
    return next((path for path in others if path.exists()), given)
