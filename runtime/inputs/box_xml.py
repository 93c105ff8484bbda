"""XML files of one image each: Flickr30k Entities, Pascal VOC and what annotation tools write in VOC's name."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

from qpert.runtime.errors import BoxError
from qpert.runtime.inputs.box_table import BoxRow
from qpert.runtime.inputs.box_values import TURNED, Corners, Notes, number, stated_size, turned, upright_corners
from qpert.runtime.inputs.boxes import check_box
from qpert.runtime.inputs.names import image_stem, is_litter

XmlCoordinates = Literal["one_based_inclusive", "one_based_shift_all", "zero_based"]
"""How corners in an XML file are read.

`one_based_inclusive`: pixels counted from 1, both corners inside the box, as Flickr30k Entities and VOC define them:
(xmin-1, ymin-1, xmax, ymax). `one_based_shift_all`: 1 subtracted from all four, as the authors' release reads them; a
box loses its last row and column. `zero_based`: as they stand, for boxes that were 0-based before they became XML.
"""

SHIFTS = {"one_based_inclusive": (1, 0), "one_based_shift_all": (1, 1), "zero_based": (0, 0)}
"""What is subtracted from the low and from the high corner."""

BELOW = (
    "start at 0 or below, in pixels counted from 1; if they are counted from 0, read the file with "
    "xml_coordinates='zero_based'"
)
NO_BOX = "are objects without a <bndbox>, and are left out"
EMPTIED = (
    "of one pixel's width or height are empty once 1 is subtracted from all four corners (one_based_shift_all), and "
    "are left out"
)


class _NoDoctype(ET.TreeBuilder):
    """Refuses a DOCTYPE, and with it every entity declaration (expansion attacks, external files)."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise BoxError("declares a DOCTYPE, which box files do not need; remove it", code="box-file-doctype")


def xml_files(path: Path) -> list[Path]:
    """The XML files directly in a folder, in the order of their names, or the file itself.

    Hidden files, such as macOS's `._name.xml`, are not among them.
    """
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.iterdir() if file.suffix.lower() == ".xml" and not is_litter(file.name))
    if not files:
        raise BoxError(
            f"the folder {path} has no .xml file; expected Flickr30k-Entities or VOC annotations",
            code="box-folder-empty",
        )
    return files


def read_xml_files(files: Sequence[Path], coordinates: XmlCoordinates, notes: Notes) -> Iterator[BoxRow]:
    """The boxes of all files; `notes` is given what looks like the wrong base and what is left out."""
    for file in files:
        yield from read_xml(file, coordinates, notes)


def read_xml(path: Path, coordinates: XmlCoordinates, notes: Notes) -> Iterator[BoxRow]:
    """The boxes of one file. The image is called as `<filename>` says if the file itself is called so too: annotation
    tools leave stale names behind."""
    root = _root(path)
    image = (root.findtext("filename") or "").strip()
    image = image if image_stem(image) == image_stem(path.stem) else path.stem
    size = stated_size(*(_size(root, key) for key in ("width", "height")))
    for place, item in enumerate(root.findall("object"), start=1):
        source = f"{path}: object {place}"
        names = tuple((name.text or "").strip() for name in item.findall("name"))
        blank = BoxRow(image, (0, 0, 0, 0), source, None, names, size)
        boxes = item.findall("robndbox") or item.findall("bndbox")
        if not boxes and item.find("nobndbox") is None and item.find("scene") is None:
            yield from notes.row(partial(notes.add, NO_BOX, source))
        for box in boxes:
            yield from notes.row(partial(_row, item, box, coordinates, notes, blank))


def _row(item: ET.Element, box: ET.Element, coordinates: XmlCoordinates, notes: Notes, blank: BoxRow) -> BoxRow | None:
    """`blank` with its corners; None where the chosen reading of the corners leaves nothing."""
    if box.tag == "robndbox":
        notes.add(TURNED, blank.source)
        corners = _rotated_corners(box, blank.source)
    else:
        corners = _corners(box, coordinates, blank.source)
        if coordinates != "zero_based" and min(corners[:2]) < 0:
            notes.add(BELOW, blank.source)
        if corners[0] >= corners[2] or corners[1] >= corners[3]:
            notes.add(EMPTIED, blank.source)
            return None
        if degrees := _rotation(item, blank.source):
            notes.add(TURNED, blank.source)
            corners = turned(corners, degrees)
    return replace(blank, xyxy=corners)


def _root(path: Path) -> ET.Element:
    parser = ET.XMLParser(target=_NoDoctype())
    try:
        parser.feed(path.read_bytes())
        root = parser.close()
    except BoxError as error:
        raise BoxError(f"{path} {error}", code=error.code) from None
    except (ET.ParseError, LookupError, ValueError) as error:
        raise BoxError(f"{path} is not XML: {error}", code="box-file-xml") from error
    except OSError as error:
        raise BoxError(f"cannot read {path}: {error.strerror}", code="box-file-missing") from error
    if root.tag != "annotation":
        raise BoxError(
            f"{path} has the root <{root.tag}>; expected <annotation>, as in Flickr30k Entities and VOC",
            code="box-file-xml",
        )
    return root


def _value(box: ET.Element, key: str, source: str) -> float:
    found = box.findall(key)
    if not found:
        expected = "cx, cy, w, h, angle" if box.tag == "robndbox" else "xmin, ymin, xmax, ymax"
        raise BoxError(f"{source} lacks <{key}>; expected {expected} in <{box.tag}>", code="box-column-missing")
    if len(found) > 1:
        raise BoxError(f"{source} has <{key}> {len(found)} times; expected it once", code="box-column-twice")
    return number(found[0].text or "", f"{source}: {key}", parse=True)


def _corners(box: ET.Element, coordinates: XmlCoordinates, source: str) -> Corners:
    xmin, ymin, xmax, ymax = (_value(box, key, source) for key in ("xmin", "ymin", "xmax", "ymax"))
    inclusive = 0 if coordinates == "zero_based" else 1
    check_box((xmin, ymin, xmax + inclusive, ymax + inclusive), source)
    low, high = SHIFTS[coordinates]
    return xmin - low, ymin - low, xmax - high, ymax - high


def _rotated_corners(box: ET.Element, source: str) -> Corners:
    """roLabelImg's `<robndbox>`: centre, width and height in pixels counted from 0, angle in radians."""
    x, y, width, height, angle = (_value(box, key, source) for key in ("cx", "cy", "w", "h", "angle"))
    check_box((0, 0, width, height), source)
    return upright_corners((x, y), (width, height), angle)


def _rotation(item: ET.Element, source: str) -> float:
    """Degrees by which CVAT has turned the box about its centre, an attribute of the object; 0 where there is none."""
    for attribute in item.findall("attributes/attribute"):
        if (attribute.findtext("name") or "").strip() == "rotation":
            return number(attribute.findtext("value") or "", f"{source}: rotation", parse=True)
    return 0.0


def _size(root: ET.Element, key: str) -> int | None:
    text = (root.findtext(f"size/{key}") or "").strip()
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else None
