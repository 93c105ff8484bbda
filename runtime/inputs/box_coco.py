"""COCO JSON: detection results, and instances as COCO, LVIS and annotation tools (CVAT) write them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from qpert.runtime.errors import BoxError
from qpert.runtime.inputs.box_table import BoxRow
from qpert.runtime.inputs.box_values import (
    TURNED,
    Notes,
    entry_of,
    identifier,
    image_name,
    json_of,
    number,
    object_of,
    score,
    stated_size,
    text_of,
    turned,
)
from qpert.runtime.inputs.boxes import check_box

Entries = Mapping[str, Mapping[str, Any]]
"""Images or categories by id; `7` and `"7"` are one id."""

CROWD = "are crowd regions (iscrowd), which are no single objects, and are left out"
NO_BOX = "are annotations without a box (an empty bbox), and are left out"


def read_coco(path: Path, notes: Notes) -> Iterator[BoxRow]:
    """The boxes of a COCO file. As pycocotools does, crowd regions are not counted as objects."""
    document = json_of(text_of(path), str(path))
    if isinstance(document, list):
        for index, entry in enumerate(document):
            source = f"{path}: [{index}]"
            values = object_of(entry, source)
            image = image_name(_image_id(values, source), source)
            yield from notes.row(partial(_row, values, source, notes, image=image, size=None, categories=None))
    elif isinstance(document, dict) and isinstance(document.get("annotations"), list):
        yield from _instances(document, path, notes)
    else:
        raise BoxError(
            f"{path} is neither COCO results (a list of objects with image_id and bbox) nor COCO instances "
            "(an object with images, annotations and categories)",
            code="box-file-coco",
        )


def _instances(document: Mapping[str, Any], path: Path, notes: Notes) -> Iterator[BoxRow]:
    images = _by_id(document, "images", path)
    categories = _by_id(document, "categories", path) if "categories" in document else None
    for index, entry in enumerate(document["annotations"]):
        source = f"{path}: annotations[{index}]"
        values = object_of(entry, source)
        image = images.get(str(_image_id(values, source)))
        if image is None:
            raise BoxError(
                f"{source} is of image_id {values['image_id']!r}, which is not among the file's images",
                code="box-image-unknown",
            )
        name = _file_name(image, f"{source}: its image")
        size = stated_size(image.get("width"), image.get("height"))
        yield from notes.row(partial(_row, values, source, notes, image=name, size=size, categories=categories))


def _file_name(image: Mapping[str, Any], source: str) -> str:
    """`file_name`, or the path of LVIS's `coco_url` (val2017/000000397133.jpg)."""
    url = image.get("coco_url")
    if "file_name" not in image and isinstance(url, str):
        return image_name(unquote(urlsplit(url).path).strip("/"), source)
    return image_name(entry_of(image, "file_name", source), source)


def _row(
    values: Mapping[str, Any],
    source: str,
    notes: Notes,
    *,
    image: str,
    size: tuple[int, int] | None,
    categories: Entries | None,
) -> BoxRow | None:
    if values.get("iscrowd"):
        notes.add(CROWD, source)
        return None
    bbox = entry_of(values, "bbox", source, code="box-bbox")
    if bbox is None or bbox == []:
        notes.add(NO_BOX, source)
        return None
    if not isinstance(bbox, list) or len(bbox) != 4:
        raise BoxError(f"{source}: bbox is {bbox!r}; expected [x, y, width, height]", code="box-bbox")
    x, y, width, height = (number(v, f"{source}: bbox[{i}]") for i, v in enumerate(bbox))
    if not (width > 0 and height > 0):
        raise BoxError(
            f"{source}: bbox is {bbox!r}, an empty box; expected [x, y, width, height] with both above 0",
            code="box-empty",
        )
    corners = (x, y, x + width, y + height)
    if degrees := _rotation(values, source):
        notes.add(TURNED, source)
        corners = turned(corners, degrees)
    check_box(corners, f"{source}: box")
    names = _names(values.get("category_id"), categories, source)
    return BoxRow(image, corners, source, score(values.get("score"), source), names, size)


def _rotation(values: Mapping[str, Any], source: str) -> float:
    """Degrees by which CVAT has turned the box about its centre (`attributes.rotation`); 0 where it says nothing."""
    attributes = values.get("attributes")
    given = attributes.get("rotation") if isinstance(attributes, dict) else None
    return 0.0 if given is None else number(given, f"{source}: rotation", parse=isinstance(given, str))


def _names(category: Any, categories: Entries | None, source: str) -> tuple[str, ...]:
    if category is None:
        return ()
    key = str(identifier(category, f"{source}: category_id"))
    if categories is None:
        return (key,)
    if key not in categories:
        raise BoxError(
            f"{source}: category_id is {category!r}, which is not among the file's categories",
            code="box-category-unknown",
        )
    return (str(categories[key].get("name", key)),)


def _image_id(values: Mapping[str, Any], source: str) -> int | str:
    return identifier(entry_of(values, "image_id", source), f"{source}: image_id")


def _by_id(document: Mapping[str, Any], key: str, path: Path) -> Entries:
    entries = document.get(key)
    if not isinstance(entries, list):
        raise BoxError(
            f"{path} has no list {key!r}; expected COCO instances: images, annotations and categories",
            code="box-file-coco",
        )
    found: dict[str, Mapping[str, Any]] = {}
    for index, entry in enumerate(entries):
        source = f"{path}: {key}[{index}]"
        own = str(identifier(entry_of(object_of(entry, source), "id", source), f"{source}: id"))
        if found.setdefault(own, entry) != entry:
            raise BoxError(
                f"{source} has the id {own} of another of the {key}; ids have to be unique", code="box-id-twice"
            )
    return found
