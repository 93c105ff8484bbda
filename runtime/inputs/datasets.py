"""Retrieval data sets on disk: LAVIS annotation JSON, and the object boxes of Flickr30k Entities.

Layouts (below the data set's root): `annotations/{train,val,test}.json` with `flickr30k-images/` and
`flickr30k_entities/{Annotations,Sentences}/`, or with `val2014/` and `coco_entities/{Annotations,Sentences}/`, the COCO
Entities that the query-perturbation release converts; COCO Entities' own JSON is read too, as `coco_entities*.json`
next to or inside that folder. The generated demonstration is written in both layouts.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from qpert.runtime.errors import BoxError, InputError, QpertWarning
from qpert.runtime.inputs.box_files import XmlCoordinates
from qpert.runtime.inputs.box_table import BoxRow, BoxTable
from qpert.runtime.inputs.box_values import Notes, json_of, number, text_of, unique_object
from qpert.runtime.inputs.box_xml import read_xml, xml_files
from qpert.runtime.inputs.boxes import Boxes, check_box
from qpert.runtime.inputs.names import NameIndex, is_litter, named_file

SPLITS = ("train", "val", "test")
ANNOTATION_NAMES = ("{split}.json", "flickr30k_{split}.json", "coco_karpathy_{split}.json")
"""Below `annotations/`: LAVIS's storage name, then the names of its downloads."""
ENTITY_FOLDERS = ("flickr30k_entities", "coco_entities")

_CHAIN = re.compile(r"\[/EN#(\d+)/")


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
        return tuple(named_file(self.root, name) for name in self.names)

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
    skip_bad_boxes: bool = False,
) -> RetrievalDataset:
    """The split `split` of the data set under `root`, with its Entities boxes where `entities` is true.

    A box counts when its chain is named in one of the picture's sentences. Pictures without an Entities file have no
    boxes; one `QpertWarning` says how many these are. With `skip_bad_boxes`, boxes that cannot be used are left out
    with a warning.

    Raises `InputError` for a missing or malformed annotation, entries without an image file, and duplicate names;
    `BoxError` for what `read_box_file` refuses, and where `entities` is true but there is no Entities folder.
    """
    root = Path(root)
    annotation = _annotation_file(root, split)
    names, captions, owners = read_annotation(annotation)
    _check_files(root, names, annotation)
    notes = Notes(skip_bad_boxes)
    boxes = _read_boxes(root, names, xml_coordinates, notes) if entities else None
    notes.warn(boxes.source if boxes else "", stacklevel=2)
    return RetrievalDataset(root, split, names, captions, np.array(owners, np.int64), boxes)


def has_entities(root: str | Path) -> bool:
    """Whether `read_dataset` would find Entities boxes under `root`."""
    root = Path(root)
    return _entities_folder(root) is not None or bool(_coco_entities_files(root))


# Annotation


def _annotation_file(root: Path, split: str) -> Path:
    if split not in SPLITS:
        raise InputError(f"split is {split!r}; expected one of {', '.join(SPLITS)}", code="split")
    candidates = [root / "annotations" / name.format(split=split) for name in ANNOTATION_NAMES]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    what = "does not exist" if not root.is_dir() else f"has no annotations/{split}.json"
    raise InputError(
        f"the data set {root} {what}; expected LAVIS's layout: annotations/{split}.json next to the images",
        code="dataset-layout",
    )


def read_annotation(path: Path) -> tuple[tuple[str, ...], tuple[str, ...], list[int]]:
    """Names, captions, and the image number of each caption, which ascends.

    LAVIS writes two layouts. Evaluation splits have one entry for each image, with all of its captions as a list;
    training splits have one entry for each caption, a string, so that an image comes in several entries.
    """
    entries = _annotation_entries(path)
    captions: dict[str, list[str]] = {}
    first: dict[str, tuple[int, bool]] = {}
    for index, entry in enumerate(entries):
        name, texts = _entry(entry, f"{path}: [{index}]")
        whole = not isinstance(entry["caption"], str)
        before, before_whole = first.setdefault(name, (index, whole))
        if before != index and (whole or before_whole):
            raise InputError(
                f"{path}: [{index}] repeats the image {name!r} of [{before}]; expected one entry for each image, with "
                "all of its captions in a list, or one entry for each caption, a string",
                code="annotation-image-twice",
            )
        captions.setdefault(name, []).extend(texts)
    owners = [number for number, texts in enumerate(captions.values()) for _ in texts]
    return tuple(captions), tuple(text for texts in captions.values() for text in texts), owners


def _annotation_entries(path: Path) -> list[Any]:
    try:
        entries = json.loads(path.read_bytes().decode("utf-8-sig"), object_pairs_hook=unique_object)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"cannot read the annotation {path}: {error}", code="annotation-file") from error
    if not isinstance(entries, list) or not entries:
        raise InputError(
            f'{path} is not a list of {{"image": …, "caption": […]}}; expected LAVIS annotation JSON',
            code="annotation-file",
        )
    return entries


def _entry(entry: Any, source: str) -> tuple[str, list[str]]:
    if not isinstance(entry, dict) or not isinstance(entry.get("image"), str):
        raise InputError(
            f'{source} is not {{"image": "…", "caption": […]}}; it has no image name', code="annotation-entry"
        )
    name, texts = entry["image"], entry.get("caption")
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or "\0" in name:
        raise InputError(
            f"{source}: image is {name!r}; expected a path relative to the data set's root, inside it",
            code="annotation-image",
        )
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise InputError(
            f"{source}: caption of {name!r} is {texts!r}; expected a list of texts, at least one, none empty",
            code="annotation-caption",
        )
    return name, texts


def _check_files(root: Path, names: Sequence[str], annotation: Path) -> None:
    missing = [name for name in names if not named_file(root, name).is_file()]
    if missing:
        shown = ", ".join(missing[:3]) + (" …" if len(missing) > 3 else "")
        raise InputError(
            f"{annotation}: {len(missing)} of {len(names)} images are not under {root}: {shown}; "
            "download the images there, or take their entries out",
            code="dataset-images",
        )


# Entities


def _read_boxes(root: Path, names: Sequence[str], coordinates: XmlCoordinates, notes: Notes) -> BoxTable:
    folder = _entities_folder(root)
    if folder is not None:
        return _read_entities(folder, names, coordinates, notes)
    for file in _coco_entities_files(root):
        return _read_coco_entities(file, names, notes)
    raise BoxError(
        f"{root} has neither {' nor '.join(f'{name}/Annotations' for name in ENTITY_FOLDERS)}; "
        "add the Entities annotations, or choose other boxes or none",
        code="entities-missing",
    )


def _entities_folder(root: Path) -> Path | None:
    return next((root / name for name in ENTITY_FOLDERS if (root / name / "Annotations").is_dir()), None)


def _coco_entities_files(root: Path) -> list[Path]:
    found = [*root.glob("coco_entities*.json"), *root.glob("coco_entities/*.json")]
    return sorted(file for file in found if not is_litter(file.name))


def _read_entities(folder: Path, names: Sequence[str], coordinates: XmlCoordinates, notes: Notes) -> BoxTable:
    """The boxes of all images, under the images' own names."""
    files = {file.stem: file for file in xml_files(folder / "Annotations")}
    rows: list[BoxRow] = []
    for name, stem in _own_names(names, files, folder / "Annotations").items():
        rows += _named_rows(files[stem], folder / "Sentences" / f"{stem}.txt", name, coordinates, notes)
    return BoxTable(tuple(rows), str(folder), exact=True, skip_bad_boxes=notes.skip_bad_boxes)


def _own_names(names: Sequence[str], annotated: Iterable[str], source: Path) -> dict[str, str]:
    """What an annotation calls each image of which it knows; one warning counts the others."""
    index = NameIndex(annotated, "annotation")
    found: dict[str, str] = {}
    images: dict[str, str] = {}
    for name in names:
        _, hits = index.find(name)
        if len(hits) > 1:
            raise BoxError(
                f"{source}: which entry is that of {name} is ambiguous: it matches {', '.join(hits[:5])}",
                code="box-image-ambiguous",
            )
        for own in hits:
            if first := images.get(own):
                raise BoxError(
                    f"the images {first} and {name} are both {own!r} in {source}; rename one", code="box-image-twice"
                )
            found[name], images[own] = own, name
    missing = [name for name in names if name not in found]
    if missing:
        message = f"{len(missing)} of {len(names)} images are not in {source}, so they have no boxes: "
        warnings.warn(message + ", ".join(missing[:3]), QpertWarning, stacklevel=5)
    return found


def _named_rows(file: Path, sentences: Path, name: str, coordinates: XmlCoordinates, notes: Notes) -> Iterator[BoxRow]:
    """The boxes of one file whose chain a sentence names; all of them where the picture has no sentences file."""
    chains = set(_CHAIN.findall(_sentences(sentences))) - {"0"} if sentences.is_file() else None
    for row in read_xml(file, coordinates, notes):
        if chains is None or chains & set(row.names):
            yield replace(row, image=name)


def _read_coco_entities(path: Path, names: Sequence[str], notes: Notes) -> BoxTable:
    """COCO Entities JSON: `{image id: {caption: {"detections": {class: [[detection id, [x1, y1, x2, y2]]]}}}}`, pixels
    counted from 0. The boxes of an image are those of all its captions, each detection once."""
    document = json_of(text_of(path), str(path))
    if not isinstance(document, dict):
        raise BoxError(
            f"{path} is a {type(document).__name__}; expected COCO Entities: an object by image id",
            code="coco-entities",
        )
    rows: list[BoxRow] = []
    for name, own in _own_names(names, document, path).items():
        rows += _coco_rows(document[own], name, f"{path}: {name}", notes)
    return BoxTable(tuple(rows), str(path), exact=True, skip_bad_boxes=notes.skip_bad_boxes)


def _coco_rows(captions: Any, name: str, source: str, notes: Notes) -> Iterator[BoxRow]:
    """The boxes of one image."""
    found: dict[tuple[str, str], Any] = {}
    try:
        for caption in captions.values():
            for label, detections in caption["detections"].items():
                for detection, box in detections:
                    found.setdefault((str(label), str(detection)), box)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BoxError(
            f"{source} is not as COCO Entities has it ({error!r}); "
            'expected {caption: {"detections": {class: [[id, [x1, y1, x2, y2]]]}}}',
            code="coco-entities",
        ) from None
    for (label, _), box in found.items():
        yield from notes.row(partial(_coco_row, box, label, name, source))


def _coco_row(box: Any, label: str, name: str, source: str) -> BoxRow:
    where = f"{source}: {label!r}"
    if not isinstance(box, list) or len(box) != 4:
        count = len(box) if isinstance(box, list) else "no"
        raise BoxError(f"{source}: the box of {label!r} has {count} numbers; expected x1, y1, x2, y2", code="box-bbox")
    x1, y1, x2, y2 = (number(value, where) for value in box)
    check_box((x1, y1, x2, y2), where)
    return BoxRow(name, (x1, y1, x2, y2), source, None, (label,))


def _sentences(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig", errors="replace")
    except OSError as error:
        raise BoxError(f"cannot read {path}: {error.strerror}", code="box-file-missing") from error
