"""Images that are to be indexed: what `qpert index` makes of a folder, a list or an annotation."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from qpert.runtime.errors import ImageError, InputError, QpertWarning
from qpert.runtime.filters.metadata import Metadata, checked_metadata
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
    """One image for a gallery: its unique `name`, its file, its boxes in the file's own pixels, its captions, and its
    metadata, which filters are about."""

    name: str
    path: Path
    boxes: Boxes | None = None
    captions: tuple[str, ...] = ()
    metadata: Metadata = field(default_factory=dict)


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
    - `.jsonl`: a JSON object a line, `{"image": path, …}`. `image` is the name, and a path relative to the list's
      folder; `captions` may be a list of texts; every other key is metadata of the image.

    Raises InputError for what is none of these (`image-source`), or holds no image (`no-images`).
    """
    if source.is_dir():
        return _folder(source)
    if not source.is_file():
        raise InputError(
            f"{source} does not exist; expected a folder of images, a .txt or .jsonl list, or LAVIS annotation JSON",
            code="image-source",
        )
    if source.suffix.lower() == ".json":
        return _annotated(source)
    if source.suffix.lower() == ".txt":
        return _listed(source)
    if source.suffix.lower() == ".jsonl":
        return _described(source)
    raise InputError(
        f"{source} is neither a folder, a list of images (.txt or .jsonl) nor LAVIS annotation JSON (.json)",
        code="image-source",
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


def _described(source: Path) -> Listing:
    lines = [(place, line) for place, line in enumerate(text_lines(source, str(source)), start=1) if line.strip()]
    if not lines:
        raise InputError(
            f'the list {source} names no image; expected a line for each, such as {{"image": "a.jpg"}}',
            code="no-images",
        )
    return Listing(tuple(_described_entry(source, place, line) for place, line in lines))


def _described_entry(source: Path, place: int, line: str) -> ImageEntry:
    what = f"{source}, line {place}"
    try:
        values = json.loads(line, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{what} is no JSON ({error})", code="image-list-line") from error
    name = values.pop("image", None) if isinstance(values, dict) else None
    if not isinstance(name, str) or not name:
        raise InputError(
            f'{what} is {line!r:.80}; expected an object such as {{"image": "a.jpg"}}', code="image-list-line"
        )
    captions = values.pop("captions", [])
    if not isinstance(captions, list) or not all(isinstance(text, str) for text in captions):
        raise InputError(f"{what} has captions {captions!r:.80}; expected a list of texts", code="image-list-line")
    path = named_file(source.parent, name)
    return ImageEntry(name, path, captions=tuple(captions), metadata=checked_metadata(values, what))


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")


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
