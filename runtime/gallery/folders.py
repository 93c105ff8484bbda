"""The pictures below a folder, and what else is in it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from qpert.runtime.files import portable_name
from qpert.runtime.inputs.names import LITTER, is_litter

NOT_PICTURES = frozenset({"BUFR", "EPS", "FPX", "GRIB", "HDF5", "IPTC", "MIC", "MPEG", "WMF"})
"""Formats that Pillow names but decodes not at all, only with another program (Ghostscript) or only on Windows."""

SNIFFED = ("AVIF", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "WEBP")
"""What a file with another extension, or none, is tried as: formats whose first bytes no other file has. TIFF is none
of them, because cameras' raw files begin as TIFF does."""

HIDDEN = "hidden"
BROKEN_LINK = "links to nothing"
SEEN = "a folder that is read under another name"
NO_PICTURE = "no picture that this Pillow can decode"

LeftOut = tuple[str, str]
"""Name relative to the folder, and the reason."""


def image_files(folder: Path) -> tuple[list[tuple[str, Path]], list[LeftOut]]:
    """(name, path) of the pictures below a folder, by name, and what else is there.

    Names are relative to the folder, with `/`. Linked files and folders count, each folder once: a link to a folder
    that is read already, which may be one around the link itself, is left out. So are hidden files and folders, and
    what Pillow has no decoder for. Files that systems leave behind (`.DS_Store`, `._a.jpg`, `Thumbs.db`) are not worth
    a word.
    """
    found: list[tuple[str, Path]] = []
    left_out: list[LeftOut] = []
    for path in _files(folder, left_out):
        name = portable_name(path.relative_to(folder).as_posix())
        if path.suffix.lower() in decodable_suffixes() or _is_picture(path):
            found.append((name, path))
        else:
            left_out.append((name, NO_PICTURE))
    return sorted(found, key=lambda item: item[1]), sorted(left_out)


@cache
def decodable_suffixes() -> frozenset[str]:
    """Extensions, in lower case, of the pictures that the installed Pillow can decode."""
    from PIL import Image

    registered = Image.registered_extensions()  # this loads all of Pillow's plugins
    return frozenset(
        suffix.lower() for suffix, kind in registered.items() if kind in Image.OPEN and kind not in NOT_PICTURES
    )


def _is_picture(path: Path) -> bool:
    """Whether the first bytes are a picture's, whatever the file is called."""
    from PIL import Image

    try:
        with Image.open(path, formats=[kind for kind in SNIFFED if kind in Image.OPEN]):
            return True
    except Exception:  # noqa: BLE001, decoders raise nearly any class; what cannot be opened is no picture
        return False


def _files(folder: Path, left_out: list[LeftOut]) -> Iterator[Path]:
    """The files below a folder that are not hidden. Folders come first, then links to folders, so that a folder keeps
    its own name where a link leads to it too."""
    seen: set[Path] = set()
    folders, links = [folder], list[Path]()
    while folders or links:
        current = folders.pop() if folders else links.pop(0)
        name = portable_name(current.relative_to(folder).as_posix())
        real = current.resolve()
        if real in seen:
            left_out.append((name, SEEN))
            continue
        seen.add(real)
        try:
            paths = sorted(Path(entry.path) for entry in os.scandir(current))
        except OSError as error:
            left_out.append((name, f"cannot be read ({error.strerror})"))
            continue
        for path in paths:
            if is_litter(path.name):
                if not _is_systems(path.name):
                    left_out.append((path.relative_to(folder).as_posix(), HIDDEN))
            elif path.is_dir():
                (links if path.is_symlink() else folders).append(path)
            elif path.is_file():
                yield path
            else:
                why = BROKEN_LINK if path.is_symlink() else NO_PICTURE
                left_out.append((path.relative_to(folder).as_posix(), why))


def _is_systems(name: str) -> bool:
    return name.startswith("._") or name.lower() in (".ds_store", ".localized", *LITTER)
