"""Box files of detectors and data sets: JSONL, CSV, COCO JSON, Flickr30k-Entities and VOC XML.

A file knows image names and coordinates but (mostly) no image sizes, so reading has two steps: `read_box_file` checks
everything that can be checked without the image, and `BoxTable.for_image` clips to the size that the image really has.
"""

from __future__ import annotations

import csv
import io
import json
import math
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from qpert.runtime.errors import BoxError, QpertWarning
from qpert.runtime.inputs.box_table import BoxRow, BoxTable, image_stem
from qpert.runtime.inputs.boxes import check_box

XmlCoordinates = Literal["one_based_inclusive", "one_based_shift_all", "zero_based"]
"""How corners in an XML file are read.

`one_based_inclusive`: pixels counted from 1, both corners inside the box, as Flickr30k Entities and VOC define them:
(xmin-1, ymin-1, xmax, ymax). `one_based_shift_all`: 1 subtracted from all four, as the authors' release reads them; a
box loses its last row and column. `zero_based`: as they stand, for boxes that were 0-based before they became XML.
"""

COLUMNS = ("image", "x1", "y1", "x2", "y2")
"""What a JSONL line or CSV row must have; `score` and `label` are optional and anything else is left alone."""


def read_box_file(path: str | Path, *, xml_coordinates: XmlCoordinates = "one_based_inclusive") -> BoxTable:
    """All boxes of a file, or of a folder of XML files. The extension decides the format.

    - `.jsonl`: an object a line with image, x1, y1, x2, y2 and perhaps score, label. `.csv`: the same as columns, with
      a header. Pixels, 0-based, half-open.
    - `.json`: COCO results (`[{"image_id", "bbox": [x, y, w, h], "score", "category_id"}]`) or COCO instances
      (`{"images", "annotations", "categories"}`). Pixels, 0-based.
    - `.xml`, or a folder of them: Flickr30k Entities or VOC. `xml_coordinates` says how corners are counted; objects
      without a box (scene, nobndbox) are left out, and a file that declares a DOCTYPE is refused.

    Raises `BoxError`, naming file and line (or entry), for what cannot be read, missing columns, text where a number
    belongs, NaN, and inverted or empty boxes.
    """
    path = Path(path)
    if xml_coordinates not in get_args(XmlCoordinates):
        choices = ", ".join(get_args(XmlCoordinates))
        raise BoxError(f"xml_coordinates is {xml_coordinates!r}; expected one of {choices}")
    if path.is_dir() or path.suffix.lower() == ".xml":
        return _read_xml_files(path, xml_coordinates)
    if not path.is_file():
        raise BoxError(f"{path} does not exist; expected a box file or a folder of XML files")
    readers = {".jsonl": _read_jsonl, ".csv": _read_csv, ".json": _read_coco}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise BoxError(
            f"{path} has the extension {path.suffix!r}; expected .jsonl, .csv, .json (COCO), .xml or a folder"
        )
    return BoxTable(tuple(reader(path)), str(path))


# JSONL and CSV


def _read_jsonl(path: Path) -> Iterator[BoxRow]:
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if line.strip():
            source = f"{path}:{number}"
            yield _row(_object(_json(line, source), source), source)


def _read_csv(path: Path) -> Iterator[BoxRow]:
    reader = csv.DictReader(io.StringIO(_text(path), newline=""), strict=True, skipinitialspace=True)
    try:
        header = reader.fieldnames or []
        if missing := [column for column in COLUMNS if column not in header]:
            raise BoxError(
                f"{path}:1 has the columns {', '.join(header) or '(none)'} and lacks {', '.join(missing)}; "
                "expected a header with image,x1,y1,x2,y2[,score,label]"
            )
        for cells in reader:
            source = f"{path}:{reader.line_num}"
            if None in cells or None in cells.values():
                raise BoxError(f"{source} has a number of cells other than the header's {len(header)}")
            yield _row({key: value for key, value in cells.items() if value != ""}, source, parse=True)
    except csv.Error as error:
        raise BoxError(f"{path}:{reader.line_num} is not CSV: {error}") from error


def _row(values: Mapping[str, Any], source: str, *, parse: bool = False) -> BoxRow:
    """A JSONL object or CSV row; `parse`: the numbers are written as text."""
    if missing := [column for column in COLUMNS if column not in values]:
        raise BoxError(f"{source} lacks {', '.join(missing)}; expected image, x1, y1, x2, y2 and perhaps score, label")
    x1, y1, x2, y2 = (_number_in(values[key], f"{source}: {key}", parse=parse) for key in COLUMNS[1:])
    label = values.get("label")
    return _checked(
        BoxRow(
            image=_image_name(values["image"], source),
            xyxy=(x1, y1, x2, y2),
            source=source,
            score=_score(values.get("score"), source, parse=parse),
            names=() if label is None else (str(label),),
        )
    )


# COCO


def _read_coco(path: Path) -> Iterator[BoxRow]:
    document = _json(_text(path), str(path))
    if isinstance(document, list):
        for index, entry in enumerate(document):
            source = f"{path}: [{index}]"
            values = _object(entry, source)
            image = _image_name(_get(values, "image_id", source), source)
            yield _coco_row(values, source, image=image, size=None, categories=None)
    elif isinstance(document, dict) and isinstance(document.get("annotations"), list):
        yield from _coco_instances(document, path)
    else:
        raise BoxError(
            f"{path} is neither COCO results (a list of objects with image_id and bbox) nor COCO instances "
            "(an object with images, annotations and categories)"
        )


def _coco_instances(document: Mapping[str, Any], path: Path) -> Iterator[BoxRow]:
    images = _by_id(document, "images", path)
    categories = _by_id(document, "categories", path) if "categories" in document else None
    for index, entry in enumerate(document["annotations"]):
        source = f"{path}: annotations[{index}]"
        values = _object(entry, source)
        image = images.get(_get(values, "image_id", source))
        if image is None:
            raise BoxError(f"{source} is of image_id {values['image_id']!r}, which is not among the file's images")
        name = _image_name(_get(image, "file_name", f"{source}: its image"), source)
        yield _coco_row(
            values, source, image=name, size=_stated(image.get("width"), image.get("height")), categories=categories
        )


def _coco_row(
    values: Mapping[str, Any],
    source: str,
    *,
    image: str,
    size: tuple[int, int] | None,
    categories: Mapping[Any, Mapping[str, Any]] | None,
) -> BoxRow:
    bbox = _get(values, "bbox", source)
    if not isinstance(bbox, list) or len(bbox) != 4:
        raise BoxError(f"{source}: bbox is {bbox!r}; expected [x, y, width, height]")
    x, y, width, height = (_number_in(v, f"{source}: bbox[{i}]") for i, v in enumerate(bbox))
    if not (width > 0 and height > 0):
        raise BoxError(f"{source}: bbox is {bbox!r}, an empty box; expected [x, y, width, height] with both above 0")
    score = _score(values.get("score"), source)
    names = _coco_names(values.get("category_id"), categories, source)
    return _checked(BoxRow(image, (x, y, x + width, y + height), source, score, names, size))


def _coco_names(category: Any, categories: Mapping[Any, Mapping[str, Any]] | None, source: str) -> tuple[str, ...]:
    if category is None:
        return ()
    if categories is None:
        return (str(category),)
    if not isinstance(category, int | str) or category not in categories:
        raise BoxError(f"{source}: category_id is {category!r}, which is not among the file's categories")
    return (str(categories[category].get("name", category)),)


def _by_id(document: Mapping[str, Any], key: str, path: Path) -> Mapping[Any, Mapping[str, Any]]:
    entries = document.get(key)
    if not isinstance(entries, list):
        raise BoxError(f"{path} has no list {key!r}; expected COCO instances: images, annotations and categories")
    found = {}
    for index, entry in enumerate(entries):
        source = f"{path}: {key}[{index}]"
        found[_identifier(_get(_object(entry, source), "id", source), f"{source}: id")] = entry
    return found


# XML


class _NoDoctype(ET.TreeBuilder):
    """Refuses a DOCTYPE, and with it every entity declaration (expansion attacks, external files)."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise BoxError("declares a DOCTYPE, which box files do not need; remove it")


def _read_xml_files(path: Path, coordinates: XmlCoordinates) -> BoxTable:
    """One file or a folder's; says once, for all of them, what looks like the wrong base and what is left out."""
    files = sorted(path.glob("*.xml")) if path.is_dir() else [path]
    if not files:
        raise BoxError(f"the folder {path} has no .xml file; expected Flickr30k-Entities or VOC annotations")
    rows = [row for file in files for row in _read_xml(file, coordinates)]
    below = [row for row in rows if min(row.xyxy[:2]) < 0]
    if below and coordinates != "zero_based":
        _warn(
            f"{below[0].source}: {len(below)} of {len(rows)} boxes start at 0 or below, in pixels counted from 1; "
            "if they are counted from 0, read the file with xml_coordinates='zero_based'"
        )
    kept = [row for row in rows if row.xyxy[0] < row.xyxy[2] and row.xyxy[1] < row.xyxy[3]]
    if len(kept) < len(rows):
        _warn(
            f"{path}: {len(rows) - len(kept)} boxes of one pixel's width or height are empty once 1 is subtracted "
            "from all four corners (one_based_shift_all): left out"
        )
    return BoxTable(tuple(kept), str(path))


def _warn(message: str) -> None:
    warnings.warn(message, QpertWarning, stacklevel=4)  # the caller of read_box_file


def _read_xml(path: Path, coordinates: XmlCoordinates) -> Iterator[BoxRow]:
    root = _xml_root(path)
    image = (root.findtext("filename") or "").strip()
    image = image if image_stem(image) == path.stem else path.stem  # annotation tools leave stale file names behind
    size = _stated(*(_xml_size(root, key) for key in ("width", "height")))
    for number, item in enumerate(root.findall("object"), start=1):
        source = f"{path}: object {number}"
        names = tuple((name.text or "").strip() for name in item.findall("name"))
        for box in item.findall("bndbox"):
            yield BoxRow(image, _xml_corners(box, coordinates, source), source, None, names, size)


def _xml_root(path: Path) -> ET.Element:
    parser = ET.XMLParser(target=_NoDoctype())
    try:
        parser.feed(path.read_bytes())
        root = parser.close()
    except BoxError as error:
        raise BoxError(f"{path} {error}") from None
    except (ET.ParseError, LookupError, ValueError) as error:
        raise BoxError(f"{path} is not XML: {error}") from error
    except OSError as error:
        raise BoxError(f"cannot read {path}: {error.strerror}") from error
    if root.tag != "annotation":
        raise BoxError(f"{path} has the root <{root.tag}>; expected <annotation>, as in Flickr30k Entities and VOC")
    return root


def _xml_corners(box: ET.Element, coordinates: XmlCoordinates, source: str) -> tuple[float, float, float, float]:
    values = []
    for key in ("xmin", "ymin", "xmax", "ymax"):
        text = box.findtext(key)
        if text is None:
            raise BoxError(f"{source} lacks <{key}>; expected xmin, ymin, xmax, ymax in <bndbox>")
        values.append(_number_in(text, f"{source}: {key}", parse=True))
    xmin, ymin, xmax, ymax = values
    inclusive = 0 if coordinates == "zero_based" else 1
    check_box((xmin, ymin, xmax + inclusive, ymax + inclusive), source)
    low, high = {"one_based_inclusive": (1, 0), "one_based_shift_all": (1, 1), "zero_based": (0, 0)}[coordinates]
    return xmin - low, ymin - low, xmax - high, ymax - high


def _xml_size(root: ET.Element, key: str) -> int | None:
    text = (root.findtext(f"size/{key}") or "").strip()
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else None


# Values


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BoxError(f"{path} is not UTF-8 text: {error}") from error
    except OSError as error:
        raise BoxError(f"cannot read {path}: {error.strerror}") from error


def _json(text: str, source: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BoxError(f"{source} is not JSON: {error}") from error


def _object(value: Any, source: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise BoxError(f"{source} is a {type(value).__name__}; expected a JSON object")
    return value


def _get(values: Mapping[str, Any], key: str, source: str) -> Any:
    if key not in values:
        raise BoxError(f"{source} lacks {key!r}; it has {', '.join(map(str, values)) or 'nothing'}")
    value = values[key]
    return _identifier(value, f"{source}: {key}") if key == "image_id" else value


def _identifier(value: Any, source: str) -> int | str:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise BoxError(f"{source} is {value!r}; expected a whole number or a string")
    return value


def _image_name(value: Any, source: str) -> str:
    name = str(_identifier(value, f"{source}: the image's name")).strip()
    if not name:
        raise BoxError(f"{source}: the image's name is empty")
    return name


def _number_in(value: Any, source: str, *, parse: bool = False) -> float:
    try:
        if isinstance(value, bool) or not isinstance(value, str if parse else (int, float)):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise BoxError(f"{source} is {value!r}; expected a number") from None
    if not math.isfinite(number):
        raise BoxError(f"{source} is {number}; expected a finite number")
    return number


def _score(value: Any, source: str, *, parse: bool = False) -> float | None:
    return None if value is None else _number_in(value, f"{source}: score", parse=parse)


def _stated(width: Any, height: Any) -> tuple[int, int] | None:
    """A size that a file states; 0 is how annotation tools write that they do not know."""
    return (width, height) if isinstance(width, int) and isinstance(height, int) and min(width, height) > 0 else None


def _checked(row: BoxRow) -> BoxRow:
    check_box(row.xyxy, f"{row.source}: box")
    return row
