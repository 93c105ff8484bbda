"""Retrieval data sets on disk: LAVIS annotation JSON, and the object boxes of Flickr30k Entities.

Layouts (below the data set's root): `annotations/{train,val,test}.json` with `flickr30k-images/` and
`flickr30k_entities/{Annotations,Sentences}/`, or with `val2014/` and `coco_entities/{Annotations,Sentences}/`, the COCO
Entities that the query-perturbation release converts; COCO Entities' own JSON is read too, as `coco_entities*.json`
beside or inside that folder. The generated demonstration is written in both layouts.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from qpert.runtime.errors import BoxError, InputError, QpertWarning
from qpert.runtime.inputs.box_files import XmlCoordinates, read_box_file
from qpert.runtime.inputs.box_table import BoxRow, BoxTable
from qpert.runtime.inputs.boxes import Boxes, check_box

SPLITS = ("train", "val", "test")
ANNOTATION_NAMES = ("{split}.json", "flickr30k_{split}.json", "coco_karpathy_{split}.json")
"""Below `annotations/`: LAVIS's storage name, then the names of its downloads."""
ENTITY_FOLDERS = ("flickr30k_entities", "coco_entities")

_CHAIN = re.compile(r"\[/EN#(\d+)/")
_NUMBER = re.compile(r"[0-9]+$")
"""The number at the end of a COCO image's name, its id."""


@dataclass(frozen=True, eq=False)
class RetrievalDataset:
    """One split: B images, T captions, and perhaps boxes.

    `images`: the files. `names`: what the annotation calls them (unique, relative to `root`), which is also what
    `boxes` calls them. `image_of_caption` int64 [T], ascending: captions are numbered in the order of the annotation.
    """

    root: Path
    split: str
    names: tuple[str, ...]
    captions: tuple[str, ...]
    image_of_caption: npt.NDArray[np.int64] = field(repr=False)
    boxes: BoxTable | None = field(default=None, repr=False)

    @property
    def images(self) -> tuple[Path, ...]:
        return tuple(self.root / name for name in self.names)

    def __len__(self) -> int:
        return len(self.names)

    def boxes_of(self, index: int, size: tuple[int, int]) -> Boxes:
        """The boxes of an image of `size` (width, height); none where the data set has none for it."""
        return Boxes.empty(size) if self.boxes is None else self.boxes.for_image(self.names[index], size)

    def take(self, count: int) -> RetrievalDataset:
        """The first `count` images with their captions."""
        kept = self.image_of_caption < count
        captions = tuple(caption for caption, keep in zip(self.captions, kept, strict=True) if keep)
        return replace(self, names=self.names[:count], captions=captions, image_of_caption=self.image_of_caption[kept])


def read_dataset(
    root: str | Path,
    split: str = "test",
    *,
    entities: bool = True,
    xml_coordinates: XmlCoordinates = "one_based_inclusive",
) -> RetrievalDataset:
    """The split `split` of the data set under `root`, with its Entities boxes where `entities` is true.

    A box counts when its chain is named in one of the picture's sentences. Pictures without an Entities file have no
    boxes; how many these are is said in one `QpertWarning`.

    Raises `InputError` for a missing or malformed annotation, entries without an image file, and duplicate names;
    `BoxError` for what `read_box_file` refuses, and where `entities` is true but there is no Entities folder.
    """
    root = Path(root)
    annotation = _annotation_file(root, split)
    names, captions, owners = read_annotation(annotation)
    _check_files(root, names, annotation)
    boxes = _read_boxes(root, names, xml_coordinates) if entities else None
    return RetrievalDataset(root, split, names, captions, np.array(owners, np.int64), boxes)


def has_entities(root: str | Path) -> bool:
    """Whether `read_dataset` would find Entities boxes under `root`."""
    root = Path(root)
    folders = any((root / name / "Annotations").is_dir() for name in ENTITY_FOLDERS)
    return folders or bool(_coco_entities_files(root))


# Annotation


def _annotation_file(root: Path, split: str) -> Path:
    if split not in SPLITS:
        raise InputError(f"split is {split!r}; expected one of {', '.join(SPLITS)}")
    candidates = [root / "annotations" / name.format(split=split) for name in ANNOTATION_NAMES]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    what = "does not exist" if not root.is_dir() else f"has no annotations/{split}.json"
    raise InputError(f"the data set {root} {what}; expected LAVIS's layout: annotations/{split}.json beside the images")


def read_annotation(path: Path) -> tuple[tuple[str, ...], tuple[str, ...], list[int]]:
    """Names, captions, and the image number of each caption."""
    try:
        entries = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"cannot read the annotation {path}: {error}") from error
    if not isinstance(entries, list) or not entries:
        raise InputError(f'{path} is not a list of {{"image": …, "caption": […]}}; expected LAVIS annotation JSON')
    names: dict[str, int] = {}
    captions: list[str] = []
    owners: list[int] = []
    for index, entry in enumerate(entries):
        name, texts = _entry(entry, f"{path}: [{index}]")
        if name in names:
            raise InputError(
                f"{path}: [{index}] repeats the image {name!r} of [{names[name]}]; "
                "expected one entry for each image, with all of its captions"
            )
        names[name] = index
        captions += texts
        owners += [index] * len(texts)
    return tuple(names), tuple(captions), owners


def _entry(entry: Any, source: str) -> tuple[str, list[str]]:
    if not isinstance(entry, dict) or not isinstance(entry.get("image"), str):
        raise InputError(f'{source} is not {{"image": "…", "caption": […]}}; it has no image name')
    name, texts = entry["image"], entry.get("caption")
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or "\0" in name:
        raise InputError(f"{source}: image is {name!r}; expected a path relative to the data set's root, inside it")
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise InputError(
            f"{source}: caption of {name!r} is {texts!r}; expected a list of texts, at least one, none empty"
        )
    return name, texts


def _check_files(root: Path, names: Sequence[str], annotation: Path) -> None:
    missing = [name for name in names if not (root / name).is_file()]
    if missing:
        shown = ", ".join(missing[:3]) + (" …" if len(missing) > 3 else "")
        raise InputError(
            f"{annotation}: {len(missing)} of {len(names)} images are not under {root}: {shown}; "
            "download the images there, or take their entries out"
        )


# Entities


def _read_boxes(root: Path, names: Sequence[str], coordinates: XmlCoordinates) -> BoxTable:
    for name in ENTITY_FOLDERS:
        if (root / name / "Annotations").is_dir():
            return _read_entities(root / name, names, coordinates)
    for file in _coco_entities_files(root):
        return _read_coco_entities(file, names)
    raise BoxError(
        f"{root} has neither {' nor '.join(f'{name}/Annotations' for name in ENTITY_FOLDERS)}; "
        "add the Entities annotations, or choose other boxes or none"
    )


def _coco_entities_files(root: Path) -> list[Path]:
    return sorted([*root.glob("coco_entities*.json"), *root.glob("coco_entities/*.json")])


def _read_entities(folder: Path, names: Sequence[str], coordinates: XmlCoordinates) -> BoxTable:
    """The boxes of all images, under the images' own names."""
    stems = _unique_stems(names)
    rows: list[BoxRow] = []
    missing: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", QpertWarning)
        for name, stem in zip(names, stems, strict=True):
            file = folder / "Annotations" / f"{stem}.xml"
            if file.is_file():
                rows += _named_rows(file, folder / "Sentences" / f"{stem}.txt", name, coordinates)
            else:
                missing.append(name)
    if caught:
        more = f" (and {len(caught) - 1} more like it)" if len(caught) > 1 else ""
        warnings.warn(f"{caught[0].message}{more}", QpertWarning, stacklevel=3)
    if missing:
        message = f"{len(missing)} of {len(names)} images have no file in {folder / 'Annotations'}, so no boxes: "
        warnings.warn(message + ", ".join(missing[:3]), QpertWarning, stacklevel=3)
    return BoxTable(tuple(rows), str(folder), exact=True)


def _named_rows(file: Path, sentences: Path, name: str, coordinates: XmlCoordinates) -> Iterator[BoxRow]:
    """The boxes of one file whose chain a sentence names; all of them where the picture has no sentences file."""
    chains = set(_CHAIN.findall(_text(sentences))) - {"0"} if sentences.is_file() else None
    for row in read_box_file(file, xml_coordinates=coordinates).rows:
        if chains is None or chains & set(row.names):
            yield replace(row, image=name)


def _read_coco_entities(path: Path, names: Sequence[str]) -> BoxTable:
    """COCO Entities JSON: `{image id: {caption: {"detections": {class: [[detection id, [x1, y1, x2, y2]]]}}}}`, pixels
    counted from 0. The boxes of an image are those of all its captions, each detection once."""
    try:
        document = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise BoxError(f"cannot read {path}: {error}") from error
    if not isinstance(document, dict):
        raise BoxError(f"{path} is a {type(document).__name__}; expected COCO Entities: an object by image id")
    by_number = {str(int(number[0])): captions for key, captions in document.items() if (number := _NUMBER.search(key))}
    rows: list[BoxRow] = []
    missing: list[str] = []
    for name in names:
        number = _NUMBER.search(PurePosixPath(name).stem)
        captions = by_number.get(str(int(number[0]))) if number else None
        if captions is None:
            missing.append(name)
        else:
            rows += _coco_rows(captions, name, f"{path}: {name}")
    if missing:
        message = f"{len(missing)} of {len(names)} images are not in {path}, so no boxes: "
        warnings.warn(message + ", ".join(missing[:3]), QpertWarning, stacklevel=4)
    return BoxTable(tuple(rows), str(path), exact=True)


def _coco_rows(captions: Any, name: str, source: str) -> Iterator[BoxRow]:
    seen = set()
    try:
        found = [
            (str(label), str(number), tuple(map(float, box)))
            for said in captions.values()
            for label, detections in said["detections"].items()
            for number, box in detections
        ]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BoxError(
            f"{source} is not as COCO Entities has it ({error!r}); "
            'expected {caption: {"detections": {class: [[id, [x1, y1, x2, y2]]]}}}'
        ) from None
    for label, number, box in found:
        if (label, number) in seen:
            continue
        seen.add((label, number))
        if len(box) != 4:
            raise BoxError(f"{source}: the box of {label!r} has {len(box)} numbers; expected x1, y1, x2, y2")
        check_box(box, f"{source}: {label!r}")
        yield BoxRow(name, (box[0], box[1], box[2], box[3]), source, None, (label,))


def _unique_stems(names: Sequence[str]) -> list[str]:
    """File names without extension, by which Entities knows images."""
    stems = [PurePosixPath(name).stem for name in names]
    seen: dict[str, str] = {}
    for name, stem in zip(names, stems, strict=True):
        if stem in seen:
            raise BoxError(f"the images {seen[stem]} and {name} are both {stem!r} to Entities; rename one")
        seen[stem] = name
    return stems


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig", errors="replace")
    except OSError as error:
        raise BoxError(f"cannot read {path}: {error.strerror}") from error
