"""Small retrieval data sets on disk, with Entities, for tests of the evaluation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (60, 40)
WORDS = ("red", "green", "blue", "yellow", "small", "large", "dog", "cat", "boat", "ball", "tree", "car", "bird")


def captions_for(image: int, count: int) -> list[str]:
    """Different captions of two to seven words."""
    random = np.random.default_rng([image, 1])
    return [
        " ".join(["a", *random.choice(WORDS, 1 + (image + number) % 6), "of", "water"][: 2 + (image + number) % 6])
        + f" near {'bcdfghjk'[image % 8]}{'lmnpqrst'[number % 8]}"
        for number in range(count)
    ]


def write_set(
    root: Path, images: int = 6, captions: int = 2, *, sides: Sequence[int] | None = None, split: str = "test"
) -> Path:
    """`images` different pictures of 60×40 pixels, each with one Entities box: a square of `sides[i]` pixels at the
    upper left corner (default: from small to large)."""
    for part in ("annotations", "flickr30k-images", "flickr30k_entities/Annotations", "flickr30k_entities/Sentences"):
        (root / part).mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    entries = []
    for image in range(images):
        stem = f"{image:04d}"
        level = random.integers(0, 256, (4, 6, 3), dtype=np.uint8)
        Image.fromarray(level).resize(SIZE, Image.Resampling.NEAREST).save(root / "flickr30k-images" / f"{stem}.png")
        side = sides[image] if sides else 4 + 36 * image // max(1, images - 1)
        write_entities(root, stem, side)
        entries.append({"image": f"flickr30k-images/{stem}.png", "caption": captions_for(image, captions)})
    write_annotation(root, entries, split)
    return root


def write_entities(root: Path, stem: str, side: int, size: str | None = None) -> None:
    """One box (1, 1, side, side), counted from 1, both corners inside; beside it a scene without a box."""
    size = f"<size><width>{SIZE[0]}</width><height>{SIZE[1]}</height></size>" if size is None else size
    corners = f"<xmin>1</xmin><ymin>1</ymin><xmax>{side}</xmax><ymax>{side}</ymax>"
    (root / "flickr30k_entities" / "Annotations" / f"{stem}.xml").write_text(
        f"<annotation><filename>{stem}.png</filename>{size}"
        "<object><name>3</name><scene>1</scene><nobndbox>1</nobndbox></object>"
        f"<object><name>7</name><name>8</name><bndbox>{corners}</bndbox></object></annotation>"
    )
    (root / "flickr30k_entities" / "Sentences" / f"{stem}.txt").write_text(
        "[/EN#8/other It] in [/EN#3/scene sight] .\n"
    )


def write_annotation(root: Path, entries: list, split: str = "test") -> None:
    (root / "annotations" / f"{split}.json").write_text(json.dumps(entries))


def read_annotation(root: Path, split: str = "test") -> list:
    return json.loads((root / "annotations" / f"{split}.json").read_text())
