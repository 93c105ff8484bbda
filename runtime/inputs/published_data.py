"""What the data sets of the paper consist of, where each part is published, and where it belongs on the disk.

Nothing is downloaded: the pictures are given out under terms of their own, which only the user can accept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """One part: what it is, where it is published, under which terms, and how it is laid out."""

    what: str
    url: str
    terms: str
    layout: str


@dataclass(frozen=True)
class PublishedData:
    """One data set. `splits`: pictures and captions of each published split; captions None where copies differ.

    `images`, `entities`: its folders below the root. `prefixes`: how names of pictures in its annotations begin.
    """

    name: str
    title: str
    images: str
    entities: str
    prefixes: tuple[str, ...]
    splits: Mapping[str, tuple[int, int | None]]
    pictures: Source
    annotations: Source
    boxes: Source


LAVIS_DATA = "https://storage.googleapis.com/sfr-vision-language-research/datasets"

FLICKR30K = PublishedData(
    "flickr30k",
    "Flickr30K",
    "flickr30k-images",
    "flickr30k_entities",
    ("flickr30k-images/", "flickr30k_images/"),
    {"train": (29_000, 145_000), "val": (1_014, 5_070), "test": (1_000, 5_000)},
    Source(
        "31,783 photographs",
        "https://shannon.cs.illinois.edu/DenotationGraph/",
        "for non-commercial research and education, on request",
        "flickr30k-images/<number>.jpg",
    ),
    Source(
        "LAVIS's annotation of the Karpathy splits",
        f"{LAVIS_DATA}/flickr30k_{{split}}.json",
        "LAVIS: BSD-3-Clause",
        "annotations/flickr30k_{split}.json, or annotations/{split}.json",
    ),
    Source(
        "Flickr30k Entities: boxes and the phrases that name them",
        "https://github.com/BryanPlummer/flickr30k_entities",
        "for non-commercial research and education",
        "flickr30k_entities/Annotations/<number>.xml and flickr30k_entities/Sentences/<number>.txt",
    ),
)
COCO = PublishedData(
    "coco",
    "COCO",
    "val2014",
    "coco_entities",
    ("val2014/", "train2014/"),
    {"train": (113_287, None), "val": (5_000, None), "test": (5_000, 25_010)},
    Source(
        "40,504 photographs (val2014 holds the Karpathy val and test splits)",
        "http://images.cocodataset.org/zips/val2014.zip",
        "Flickr's terms of use; annotations CC BY 4.0",
        "val2014/COCO_val2014_<number>.jpg",
    ),
    Source(
        "LAVIS's annotation of the Karpathy splits",
        f"{LAVIS_DATA}/coco_karpathy_{{split}}.json",
        "LAVIS: BSD-3-Clause",
        "annotations/coco_karpathy_{split}.json, or annotations/{split}.json",
    ),
    Source(
        "COCO Entities: boxes of the objects that captions name",
        "https://github.com/aimagelab/show-control-and-tell",
        "see that repository",
        "coco_entities*.json in the data set's folder or in coco_entities/, as published; or coco_entities/Annotations "
        "and coco_entities/Sentences, as the query-perturbation release converts them",
    ),
)
PUBLISHED = (FLICKR30K, COCO)
