"""Published figures to compare a run with, if its data set is recognised as one of the paper's.

`published.json` contains the numbers and the setting of each row. Flickr-FG and COCO-FG have the same pictures with
other captions, so a data set is recognised by its size, one of its pictures and that picture's caption.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import PurePosixPath
from typing import Any

from qpert.runtime.inputs.datasets import RetrievalDataset
from qpert.runtime.inputs.text import clean_caption


@dataclass(frozen=True)
class PublishedRow:
    """One row: recalls in percent by direction and metric name, as in `eval --json`; unpublished ones are absent."""

    source: str
    label: str
    setting: str
    where: str
    t2i: dict[str, float]
    i2t: dict[str, float]
    small: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Published:
    """Everything published on one data set, with settings."""

    title: str
    about: str
    bins: str
    rows: tuple[PublishedRow, ...]


@cache
def _document() -> dict[str, Any]:
    text = files("qpert.runtime.evaluation").joinpath("published.json").read_text(encoding="utf-8")
    document: dict[str, Any] = json.loads(text)
    return document


def published_for(dataset: RetrievalDataset, family: str) -> Published | None:
    """The figures for a data set of the paper and the family it was measured with.

    None for another family, or for any other data set, including part of one or other captions.
    """
    document = _document()
    if family != document["family"]:
        return None
    for name, facts in document["datasets"].items():
        if _is(dataset, facts):
            rows = [row for row in document["rows"] if row["dataset"] == name]
            made = tuple(PublishedRow(**{key: row[key] for key in row if key != "dataset"}) for row in rows)
            return Published(facts["title"], document["about"], facts["bins"], made)
    return None


def _is(dataset: RetrievalDataset, facts: dict[str, Any]) -> bool:
    if len(dataset) != facts["images"] or len(dataset.captions) not in facts["texts"]:
        return False
    places = [place for place, name in enumerate(dataset.names) if PurePosixPath(name).name == facts["image"]]
    captions = {
        clean_caption(caption)
        for caption, owner in zip(dataset.captions, dataset.image_of_caption, strict=True)
        if owner in places
    }
    return clean_caption(facts["caption"]) in captions
