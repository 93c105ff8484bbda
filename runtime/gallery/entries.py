"""Images that are to be indexed: what `qpert index` makes of a folder, a list or an annotation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qpert.runtime.errors import ImageError, InputError
from qpert.runtime.inputs.box_files import XmlCoordinates, read_box_file
from qpert.runtime.inputs.boxes import Boxes
from qpert.runtime.inputs.datasets import read_annotation
from qpert.runtime.inputs.images import load_image

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
ORIENTATION = 0x0112
"""The EXIF tag; from 5 on, width and height are exchanged."""


@dataclass(frozen=True, eq=False)
class ImageEntry:
    """One image for a gallery: its unique `name`, its file, its boxes in the file's own pixels, and its captions."""

    name: str
    path: Path
    boxes: Boxes | None = None
    captions: tuple[str, ...] = ()


def read_entries(source: Path) -> list[ImageEntry]:
    """The images of a folder, a list file or an annotation, without boxes.

    - A folder: every image file below it, in the order of the names, which are relative to the folder. Hidden files
      are left out.
    - `.json`: LAVIS annotation JSON, with captions; images lie below the annotation's folder or the one above it.
    - `.txt`: a path a line, relative to the list's folder; the line is the name.

    Raises InputError for what is none of these, or holds no image.
    """
    if source.is_dir():
        return _folder(source)
    if not source.is_file():
        raise InputError(f"{source} does not exist; expected a folder of images, a .txt list or LAVIS annotation JSON")
    if source.suffix.lower() == ".json":
        return _annotated(source)
    if source.suffix.lower() == ".txt":
        return _listed(source)
    raise InputError(f"{source} is neither a folder, a .txt list of images nor LAVIS annotation JSON (.json)")


def with_boxes(
    entries: Sequence[ImageEntry], box_file: Path, *, xml_coordinates: XmlCoordinates = "one_based_inclusive"
) -> list[ImageEntry]:
    """The same images with their boxes from a file; those of which it has none get an empty `Boxes`.

    An image that cannot be read stays without boxes: indexing it tells. Raises BoxError for what
    `qpert.runtime.inputs.box_files.read_box_file` refuses, and for boxes of images that are not among `entries`.
    """
    table = read_box_file(box_file, xml_coordinates=xml_coordinates).require(entry.name for entry in entries)

    def boxes(entry: ImageEntry) -> Boxes | None:
        try:
            return table.for_image(entry.name, image_size(entry.path))
        except ImageError:
            return None

    return [replace(entry, boxes=boxes(entry)) for entry in entries]


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) in pixels after EXIF orientation, from the file's header alone. Raises ImageError."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            width, height = image.size
            turned = image.getexif().get(ORIENTATION, 1) >= 5
    except Exception:  # noqa: BLE001, decoders raise nearly any class: load_image has the words for it
        return load_image(path).size
    return (height, width) if turned else (width, height)


def _folder(folder: Path) -> list[ImageEntry]:
    def is_image(path: Path) -> bool:
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        return path.suffix.lower() in IMAGE_SUFFIXES and not hidden and path.is_file()

    paths = sorted(path for path in folder.rglob("*") if is_image(path))
    if not paths:
        raise InputError(f"the folder {folder} has no image below it; expected {', '.join(IMAGE_SUFFIXES)}")
    return [ImageEntry(path.relative_to(folder).as_posix(), path) for path in paths]


def _listed(source: Path) -> list[ImageEntry]:
    lines = [line.strip() for line in _text_lines(source)]
    names = [line for line in lines if line and not line.startswith("#")]
    if not names:
        raise InputError(f"the list {source} names no image; expected a path a line")
    return [ImageEntry(name, source.parent / name) for name in names]


def _text_lines(source: Path) -> list[str]:
    try:
        return source.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{source} cannot be read as UTF-8 text: {error}") from error


def _annotated(source: Path) -> list[ImageEntry]:
    names, captions, owners = read_annotation(source)
    root = _root(source, names)
    texts: list[list[str]] = [[] for _ in names]
    for caption, owner in zip(captions, owners, strict=True):
        texts[owner].append(caption)
    return [ImageEntry(name, root / name, captions=tuple(texts[i])) for i, name in enumerate(names)]


def _root(source: Path, names: Sequence[str]) -> Path:
    """LAVIS puts annotations into a folder of their own beside the images."""
    exists: Callable[[Path], bool] = lambda root: any((root / name).is_file() for name in names[:100])  # noqa: E731
    found = next((root for root in (source.parent, source.resolve().parent.parent) if exists(root)), None)
    if found is None:
        raise InputError(
            f"none of the first images of {source} lies below {source.parent} or the folder above it, {names[0]} for "
            "instance; put the annotation beside its images"
        )
    return found
