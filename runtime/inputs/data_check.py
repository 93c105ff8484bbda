"""Is a folder the layout that `qpert eval` reads, and what is missing? Nothing is downloaded or changed."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qpert.runtime.errors import InputError, QpertError, QpertWarning
from qpert.runtime.inputs.datasets import ANNOTATION_NAMES, has_entities, read_annotation, read_dataset
from qpert.runtime.inputs.names import named_file
from qpert.runtime.inputs.published_data import PUBLISHED, PublishedData, Source

State = Literal["there", "incomplete", "missing"]
SHOWN = 3
"""Missing files that are named."""


@dataclass(frozen=True)
class Part:
    """One part of a data set. `found` of `wanted` pictures; `remark`: what is wrong, or worth knowing."""

    name: str
    state: State
    found: int
    wanted: int | None
    remark: str
    source: Source

    def to_dict(self, split: str) -> dict[str, Any]:
        return {
            "part": self.name,
            "state": self.state,
            "found": self.found,
            "wanted": self.wanted,
            "remark": self.remark,
            "what": self.source.what,
            "published": self.source.url.format(split=split),
            "terms": self.source.terms,
            "layout": self.source.layout.format(split=split),
        }


@dataclass(frozen=True)
class CheckedData:
    """One data set as found. `problem`: what the reader of `qpert eval` says to it, with its error code."""

    data: PublishedData
    root: Path
    split: str
    parts: tuple[Part, ...]
    problem: str | None
    problem_code: str | None

    @property
    def complete(self) -> bool:
        """Whether `qpert eval --dataset root` reads it, with Entities boxes for every picture."""
        return self.problem is None and all(part.state == "there" for part in self.parts)

    def to_dict(self) -> dict[str, Any]:
        return {
            "dataset": self.data.name,
            "title": self.data.title,
            "root": str(self.root),
            "split": self.split,
            "complete": self.complete,
            "parts": [part.to_dict(self.split) for part in self.parts],
            "problem": self.problem,
            "code": self.problem_code,
        }


def check_data_folder(folder: str | Path, split: str = "test", names: Sequence[str] = ()) -> list[CheckedData]:
    """What is there of the data sets called `names`; of those that the folder seems to hold where none is named.

    The folder is a data set's own, or holds one folder a data set (`flickr30k`, `coco`). A folder that shows neither is
    checked as the place for both.

    Raises:
        InputError: the folder does not exist.
    """
    root = Path(folder)
    if not root.is_dir():
        raise InputError(
            f"{root} is not a folder; expected the folder of a data set, or the one above it", code="data-folder"
        )
    wanted = [data for data in PUBLISHED if not names or data.name in names]
    homes = {data.name: _home(root, data) for data in wanted}
    seen = [data for data in wanted if homes[data.name] is not None]
    chosen = wanted if names or not seen else seen
    return [_check(homes[data.name] or root / data.name, split, data) for data in chosen]


def _home(root: Path, data: PublishedData) -> Path | None:
    """The folder in which a data set is, or has begun to be."""
    for place in (root, root / data.name):
        own = [place / data.images, place / data.entities, *place.glob(f"{data.entities}*.json")]
        named = [place / "annotations" / name.format(split=split) for name in ANNOTATION_NAMES for split in data.splits]
        if any(path.exists() for path in own) or any(_is_of(path, data) for path in named):
            return place
    return root / data.name if (root / data.name).is_dir() else None


def _is_of(annotation: Path, data: PublishedData) -> bool:
    """Whether an annotation is of this data set, by the first picture that it names."""
    if not annotation.is_file():
        return False
    try:
        names, _, _ = read_annotation(annotation)
    except InputError:
        return data.name in annotation.name
    return names[0].startswith(data.prefixes)


def _check(root: Path, split: str, data: PublishedData) -> CheckedData:
    annotation, names = _annotation(root, split, data)
    parts = (annotation, _pictures(root, data, names), _boxes(root, split, data, names))
    problem = _reader_says(root, split) if all(part.state != "missing" for part in parts) else None
    message, code = (None, None) if problem is None else (str(problem), problem.code)
    return CheckedData(data, root, split, parts, message, code)


def _annotation(root: Path, split: str, data: PublishedData) -> tuple[Part, tuple[str, ...]]:
    """The annotation, and the pictures that it names."""
    files = [root / "annotations" / name.format(split=split) for name in ANNOTATION_NAMES]
    there = next((file for file in files if file.is_file()), None)
    if there is None:
        return Part("annotations", "missing", 0, 1, f"no {files[0]}", data.annotations), ()
    try:
        names, captions, _ = read_annotation(there)
    except InputError as error:
        return Part("annotations", "incomplete", 0, 1, str(error), data.annotations), ()
    pictures, texts = data.splits[split]
    whole = len(names) == pictures and texts in (None, len(captions))
    remark = f"{there}: {len(names):,} pictures, {len(captions):,} captions"
    if not whole:
        remark += f"; the published {split} split has {pictures:,}, so the paper's figures are not comparable"
    return Part("annotations", "there", 1, 1, remark, data.annotations), names


def _pictures(root: Path, data: PublishedData, names: tuple[str, ...]) -> Part:
    if not names:
        folder = root / data.images
        count = sum(1 for path in folder.iterdir() if path.is_file()) if folder.is_dir() else 0
        remark = f"{folder}: which pictures are needed, the annotations say"
        return Part("pictures", "incomplete" if count else "missing", count, None, remark, data.pictures)
    missing = [name for name in names if not named_file(root, name).is_file()]
    state: State = "missing" if len(missing) == len(names) else "incomplete" if missing else "there"
    remark = f"not there: {_some(missing)}" if missing else f"{root / data.images}"
    return Part("pictures", state, len(names) - len(missing), len(names), remark, data.pictures)


def _boxes(root: Path, split: str, data: PublishedData, names: tuple[str, ...]) -> Part:
    """Entities, counted by the reader itself where it can read them."""
    if not has_entities(root):
        remark = f"no {root / data.entities}; without it, `qpert eval --boxes none` and box files remain"
        return Part("entities", "missing", 0, len(names) or None, remark, data.boxes)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", QpertWarning)
            boxes = read_dataset(root, split).boxes
    except QpertError as error:
        return Part("entities", "incomplete", 0, len(names) or None, str(error), data.boxes)
    with_boxes = {row.image for row in boxes.rows} if boxes is not None else set()
    bare = [name for name in names if name not in with_boxes]
    state: State = "missing" if len(bare) == len(names) else "there"
    remark = f"pictures without a box: {len(bare)} ({_some(bare)})" if bare else "a box for every picture"
    return Part("entities", state, len(names) - len(bare), len(names), remark, data.boxes)


def _reader_says(root: Path, split: str) -> QpertError | None:
    """The error of `read_dataset`, which `qpert eval` reads with."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", QpertWarning)
            read_dataset(root, split)
    except QpertError as error:
        return error
    return None


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (" …" if len(names) > SHOWN else "")
