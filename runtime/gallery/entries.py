"""Images that are to be indexed: what `qpert index` makes of a folder, a list or an annotation."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qpert.runtime.errors import ImageError, InputError, QpertWarning
from qpert.runtime.gallery.folders import image_files
from qpert.runtime.inputs.box_files import XmlCoordinates, read_box_file
from qpert.runtime.inputs.boxes import Boxes, one_warning_a_kind
from qpert.runtime.inputs.datasets import read_annotation
from qpert.runtime.inputs.images import image_size
from qpert.runtime.inputs.lines import text_lines
from qpert.runtime.inputs.names import named_file

__all__ = ["ImageEntry", "Listing", "image_size", "list_images", "read_entries", "with_boxes"]

SHOWN = 5
"""Files left out that a message names for each reason."""


@dataclass(frozen=True, eq=False)
class ImageEntry:
    """One image for a gallery: its unique `name`, its file, its boxes in the file's own pixels, and its captions."""

    name: str
    path: Path
    boxes: Boxes | None = None
    captions: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Listing:
    """The images of a source, and what else it holds: `left_out` is (name, reason) of files, folders or lines."""

    entries: tuple[ImageEntry, ...]
    left_out: tuple[tuple[str, str], ...] = ()

    def left_out_lines(self) -> list[str]:
        """For the user: a line a reason, with the count and the first few names."""
        counts = Counter(reason for _, reason in self.left_out)
        return [f"left out {count}, {reason}: {self._names(reason)}" for reason, count in counts.items()]

    def _names(self, reason: str) -> str:
        names = [name for name, why in self.left_out if why == reason]
        return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def read_entries(source: Path) -> list[ImageEntry]:
    """The images of `list_images`; a `QpertWarning` names what is left out."""
    listing = list_images(source)
    for line in listing.left_out_lines():
        warnings.warn(f"{source}: {line}", QpertWarning, stacklevel=2)
    return list(listing.entries)


def list_images(source: Path) -> Listing:
    """The images of a folder, a list file or an annotation, without boxes.

    - A folder: every image below it that Pillow can decode, in the order of the names, which are relative to the
      folder. Links are followed. Hidden files and folders are left out; see `qpert.runtime.gallery.folders`.
    - `.json`: LAVIS annotation JSON, with captions; images lie below the annotation's folder or the one above it.
    - `.txt`: a path a line, relative to the list's folder; the line is the name. Lines end at line feeds alone. A line
      that begins with `#` is a comment, and left out, unless there is a file of that name.

    Raises InputError for what is none of these (`image-source`), or holds no image (`no-images`).
    """
    if source.is_dir():
        return _folder(source)
    if not source.is_file():
        raise InputError(
            f"{source} does not exist; expected a folder of images, a .txt list or LAVIS annotation JSON",
            code="image-source",
        )
    if source.suffix.lower() == ".json":
        return _annotated(source)
    if source.suffix.lower() == ".txt":
        return _listed(source)
    raise InputError(
        f"{source} is neither a folder, a .txt list of images nor LAVIS annotation JSON (.json)", code="image-source"
    )


def with_boxes(
    entries: Sequence[ImageEntry],
    box_file: Path,
    *,
    xml_coordinates: XmlCoordinates = "one_based_inclusive",
    skip_bad_boxes: bool = False,
    max_boxes: int | None = None,
) -> list[ImageEntry]:
    """The same images with their boxes from a file; those of which it has none get an empty `Boxes`.

    An image that cannot be read stays without boxes, so that indexing reports it. With `skip_bad_boxes`, boxes that
    cannot be used are left out with a warning; of more than `max_boxes` on an image, the best by score are kept. Raises
    BoxError for what
    `qpert.runtime.inputs.box_files.read_box_file` refuses, and for boxes of images that are not among `entries`.
    """
    table = read_box_file(box_file, xml_coordinates=xml_coordinates, skip_bad_boxes=skip_bad_boxes)
    table = replace(table.require(entry.name for entry in entries), most=max_boxes)

    def boxes(entry: ImageEntry) -> Boxes | None:
        try:
            return table.for_image(entry.name, image_size(entry.path))
        except ImageError:
            return None

    with one_warning_a_kind():
        return [replace(entry, boxes=boxes(entry)) for entry in entries]


def _folder(folder: Path) -> Listing:
    files, left_out = image_files(folder)
    if not files:
        listing = Listing((), tuple(left_out))
        raise InputError(
            "; ".join([f"the folder {folder} has no image below it that Pillow can decode", *listing.left_out_lines()]),
            code="no-images",
        )
    return Listing(tuple(ImageEntry(name, path) for name, path in files), tuple(left_out))


def _listed(source: Path) -> Listing:
    entries: list[ImageEntry] = []
    comments: list[tuple[str, str]] = []
    for place, name in _list_names(source):
        path = named_file(source.parent, name)
        if name.startswith("#") and not path.exists():
            comments.append((f"line {place} {name!r}", "a comment (#)"))
        else:
            entries.append(ImageEntry(name, path))
    if not entries:
        raise InputError(f"the list {source} names no image; expected a path a line", code="no-images")
    return Listing(tuple(entries), tuple(comments))


def _list_names(source: Path) -> Iterator[tuple[int, str]]:
    """Line number and name; blanks around a name are its own where there is such a file."""
    for place, line in enumerate(text_lines(source, str(source)), start=1):
        name = line.strip(" \t")
        if name and name != line and (source.parent / line).is_file():
            name = line
        if name:
            yield place, name


def _annotated(source: Path) -> Listing:
    names, captions, owners = read_annotation(source)
    root = _root(source, names)
    texts: list[list[str]] = [[] for _ in names]
    for caption, owner in zip(captions, owners, strict=True):
        texts[owner].append(caption)
    return Listing(
        tuple(ImageEntry(name, named_file(root, name), captions=tuple(texts[i])) for i, name in enumerate(names))
    )


def _root(source: Path, names: Sequence[str]) -> Path:
    """LAVIS puts annotations into a separate folder next to the images."""
    exists: Callable[[Path], bool] = lambda root: any(named_file(root, name).is_file() for name in names[:100])  # noqa: E731
    found = next((root for root in (source.parent, source.resolve().parent.parent) if exists(root)), None)
    if found is None:
        raise InputError(
            f"none of the first images of {source} is below {source.parent} or the folder above it, {names[0]} for "
            "instance; put the annotation file next to the images",
            code="annotation-images",
        )
    return found
