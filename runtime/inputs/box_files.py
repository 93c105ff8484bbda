"""Box files of detectors and data sets: JSONL, CSV, COCO JSON, Flickr30k-Entities and VOC XML.

A file knows image names and coordinates but (mostly) no image sizes, so reading has two steps: `read_box_file` checks
everything that can be checked without the image, and `BoxTable.for_image` clips to the size that the image really has.
"""

from __future__ import annotations

import csv
import io
import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, get_args

from qpert.runtime.errors import BoxError, QpertWarning
from qpert.runtime.inputs.box_coco import CROWD, read_coco
from qpert.runtime.inputs.box_table import BoxRow, BoxTable
from qpert.runtime.inputs.box_values import Notes, image_name, json_of, number, object_of, repeated, score, text_of
from qpert.runtime.inputs.box_xml import XmlCoordinates, read_xml_files, xml_files
from qpert.runtime.inputs.boxes import check_box

__all__ = ["COLUMNS", "XmlCoordinates", "read_box_file"]

COLUMNS = ("image", "x1", "y1", "x2", "y2")
"""What a JSONL line or CSV row must have; `score` and `label` are optional and anything else is left alone."""

TURNS = ("rotation", "angle")
"""Other columns that change what the corners mean. Their unit and centre differ between tools, so none is read."""


def read_box_file(
    path: str | Path, *, xml_coordinates: XmlCoordinates = "one_based_inclusive", skip_bad_boxes: bool = False
) -> BoxTable:
    """All boxes of a file, or of a folder of XML files. The extension decides the format.

    - `.jsonl`: an object a line with image, x1, y1, x2, y2 and perhaps score, label. `.csv`: the same as columns, with
      a header. Pixels, 0-based, half-open.
    - `.json`: COCO results (`[{"image_id", "bbox": [x, y, w, h], "score", "category_id"}]`) or COCO instances
      (`{"images", "annotations", "categories"}`; LVIS's too). Pixels, 0-based. Crowd regions and annotations with an
      empty `bbox` are left out; boxes that CVAT has rotated become the smallest upright boxes around them.
    - `.xml`, or a folder of them: Flickr30k Entities or VOC. `xml_coordinates` says how corners are counted; objects
      without a box (scene, nobndbox) are left out, `<robndbox>` and CVAT's rotation are read as above, and a file that
      declares a DOCTYPE is refused.

    What is left out or changed is counted and named in a `QpertWarning`, and so is a file without any box. With
    `skip_bad_boxes` that includes boxes that cannot be used: empty, inverted or not finite, without coordinates, or
    (when `for_image` knows the image) outside the image.

    Raises `BoxError`, naming file and line (or entry), for what cannot be read, missing or repeated columns, text where
    a number belongs, NaN, and inverted or empty boxes.
    """
    path = Path(path)
    notes = Notes(skip_bad_boxes)
    rows = tuple(_rows(path, xml_coordinates, notes))
    notes.warn(str(path), stacklevel=2)
    if not rows:
        warnings.warn(f"{path} holds no boxes", QpertWarning, stacklevel=2)
    return BoxTable(rows, str(path), skip_bad_boxes=skip_bad_boxes)


def _rows(path: Path, coordinates: XmlCoordinates, notes: Notes) -> Iterator[BoxRow]:
    suffix = path.suffix.lower()
    if coordinates not in get_args(XmlCoordinates):
        choices = ", ".join(get_args(XmlCoordinates))
        raise BoxError(f"xml_coordinates is {coordinates!r}; expected one of {choices}", code="box-coordinates")
    if path.is_dir() or suffix == ".xml":
        return read_xml_files(xml_files(path), coordinates, notes)
    if not path.is_file():
        raise BoxError(f"{path} does not exist; expected a box file or a folder of XML files", code="box-file-missing")
    readers = {".jsonl": _read_jsonl, ".csv": _read_csv, ".json": read_coco}
    if suffix not in readers:
        raise BoxError(
            f"{path} has the extension {path.suffix!r}; expected .jsonl, .csv, .json (COCO), .xml or a folder",
            code="box-file-extension",
        )
    return readers[suffix](path, notes)


def _read_jsonl(path: Path, notes: Notes) -> Iterator[BoxRow]:
    for place, line in enumerate(text_of(path).split("\n"), start=1):
        if line.strip(" \t\r"):
            source = f"{path}:{place}"
            values = object_of(json_of(line, source), source)
            yield from notes.row(partial(_row, values, source, notes))


def _read_csv(path: Path, notes: Notes) -> Iterator[BoxRow]:
    reader = csv.DictReader(io.StringIO(text_of(path), newline=""), strict=True, skipinitialspace=True)
    try:
        header = [name.strip() for name in reader.fieldnames or []]
        reader.fieldnames = header
        _check_header(header, f"{path}:1")
        for cells in reader:
            source = f"{path}:{reader.line_num}"
            if None in cells or None in cells.values():
                raise BoxError(f"{source} does not have {len(header)} cells, as its header does", code="box-file-cells")
            values = {key: value for key, value in cells.items() if value != ""}
            yield from notes.row(partial(_row, values, source, notes, parse=True))
    except csv.Error as error:
        raise BoxError(f"{path}:{reader.line_num} is not CSV: {error}", code="box-file-csv") from error


def _check_header(header: list[str], source: str) -> None:
    if missing := [column for column in COLUMNS if column not in header]:
        raise BoxError(
            f"{source} has the columns {', '.join(header) or '(none)'} and lacks {', '.join(missing)}; "
            "expected a header with image,x1,y1,x2,y2[,score,label]",
            code="box-file-header",
        )
    if twice := [column for column in repeated(header) if column]:
        raise BoxError(
            f"{source} has the column {', '.join(twice)} more than once; expected each column once",
            code="box-column-twice",
        )


def _row(values: Mapping[str, Any], source: str, notes: Notes, *, parse: bool = False) -> BoxRow | None:
    """A JSONL object or CSV row; `parse`: the numbers are written as text."""
    if missing := [column for column in COLUMNS if column not in values]:
        raise BoxError(
            f"{source} lacks {', '.join(missing)}; expected image, x1, y1, x2, y2 and perhaps score, label",
            code="box-column-missing",
        )
    name = image_name(values["image"], source)
    if values.get("iscrowd") not in (None, False, 0, "0"):
        notes.add(CROWD, source)
        return None
    x1, y1, x2, y2 = (number(values[key], f"{source}: {key}", parse=parse) for key in COLUMNS[1:])
    check_box((x1, y1, x2, y2), f"{source}: box")
    for turn in TURNS:
        if turn in values and number(values[turn], f"{source}: {turn}", parse=isinstance(values[turn], str)):
            notes.add(f"have a {turn}, which is not read here: they are taken as upright boxes", source)
    label = values.get("label")
    return BoxRow(
        image=name,
        xyxy=(x1, y1, x2, y2),
        source=source,
        score=score(values.get("score"), source, parse=parse),
        names=() if label is None else (str(label),),
    )
