"""Writes generated scenes in the layout of the real data sets: LAVIS annotation JSON, pictures, Entities XML and text.

Sources of the layout: LAVIS `lavis/datasets/builders` (annotation JSON), the Flickr30k Entities README (XML, sentences)
and the query-perturbation release's README (COCO tree with converted COCO Entities).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from qpert.runtime.errors import InputError
from qpert.runtime.files import write_atomically
from qpert.runtime.progress import Progress, Silent
from qpert.runtime.scenes.captions import Caption, Phrase, describe, describe_smallest
from qpert.runtime.scenes.drawing import draw_scene
from qpert.runtime.scenes.objects import KINDS
from qpert.runtime.scenes.scene import Scene, sample_scene

Layout = Literal["flickr30k", "coco"]
CaptionKind = Literal["usual", "smallest"]
"""`usual`: five captions of one to four groups each; `smallest`: two that name the smallest group alone."""
SPLIT_SIZES = {"train": 5000, "val": 500, "test": 1000}
"""Default number of pictures in each split. Training draws its own, far more."""
JPEG_QUALITY = 90


@dataclass(frozen=True)
class Tree:
    """Folders of a layout for pictures and boxes, and the names of its pictures."""

    images: str
    entities: str
    name: str

    def file(self, split: str, index: int) -> str:
        return self.name.format(number=1 + list(SPLIT_SIZES).index(split) * 100_000_000 + index)


TREES: dict[str, Tree] = {
    "flickr30k": Tree("flickr30k-images", "flickr30k_entities", "{number:010d}.jpg"),
    "coco": Tree("val2014", "coco_entities", "COCO_val2014_{number:012d}.jpg"),
}


def generate(
    split: str, count: int, seed: int, *, captions: CaptionKind = "usual"
) -> Iterator[tuple[Scene, tuple[Caption, ...]]]:
    """Scenes with their captions, one after the other. A scene depends only on its split, the seed and its index: no
    scene of one split occurs in another, and a longer run starts with the shorter one."""
    if split not in SPLIT_SIZES:
        raise InputError(f"split is {split!r}; expected one of {', '.join(SPLIT_SIZES)}", code="split")
    for index in range(count):
        name = f"{split}/{seed}/{index}"
        scene = sample_scene(name)
        if captions == "smallest":
            yield scene, describe_smallest(scene, f"{name}/smallest")
        else:
            yield scene, describe(scene, f"{name}/captions")


def write_dataset(
    folder: Path,
    split: str,
    count: int | None = None,
    seed: int = 0,
    *,
    layout: Layout = "flickr30k",
    captions: CaptionKind = "usual",
    progress: Progress | None = None,
) -> Path:
    """Write one split under `folder` and return its annotation file, `annotations/<split>.json`.

    That file is written last: if it exists, the split is complete. Several splits may share a folder. `count` None uses
    `SPLIT_SIZES`.
    """
    if layout not in get_args(Layout):
        raise InputError(f"layout is {layout!r}; expected one of {', '.join(get_args(Layout))}", code="dataset-layout")
    tree, total = TREES[layout], SPLIT_SIZES.get(split, 0) if count is None else count
    for part in (tree.images, f"{tree.entities}/Annotations", f"{tree.entities}/Sentences", "annotations"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    entries = []
    with (progress or Silent()).stage(f"drawing {total} scenes ({split})", total) as advance:
        for index, (scene, texts) in enumerate(generate(split, total, seed, captions=captions)):
            name = tree.file(split, index)
            _write_picture(folder, tree, name, scene, texts)
            entries.append({"image": f"{tree.images}/{name}", "caption": [caption.text for caption in texts]})
            advance(1)
    annotation = folder / "annotations" / f"{split}.json"
    write_atomically(annotation, json.dumps(entries, indent=0))
    return annotation


def _write_picture(folder: Path, tree: Tree, name: str, scene: Scene, captions: tuple[Caption, ...]) -> None:
    draw_scene(scene).save(folder / tree.images / name, quality=JPEG_QUALITY)
    stem = Path(name).stem
    entities = folder / tree.entities
    (entities / "Annotations" / f"{stem}.xml").write_text(annotation_xml(scene, name), encoding="utf-8")
    sentences = "".join(f"{sentence(caption, scene)}\n" for caption in captions)
    (entities / "Sentences" / f"{stem}.txt").write_text(sentences, encoding="utf-8")


def sentence(caption: Caption, scene: Scene) -> str:
    """A line of `Sentences/*.txt`: phrases as `[/EN#chain/type words]`. "a picture of" names nothing that has a place
    (chain 0, notvisual)."""
    parts = []
    for piece in caption.pieces:
        if isinstance(piece, Phrase):
            kind = "scene" if piece.group < 0 else KINDS[scene.groups[piece.group][0].kind].entity
            parts.append(f"[/EN#{chain_of(piece.group, scene)}/{kind} {piece.words}]")
        else:
            parts.append(piece.replace("a picture", "[/EN#0/notvisual a picture]"))
    return " ".join(parts) + " ."


def chain_of(group: int, scene: Scene) -> int:
    """The chain id of a group (−1: the background). Ids differ between pictures, as in Entities."""
    base = 1 + sum(map(ord, scene.seed)) % 90 + 100 * scene.objects[0].place[0]
    return base + (0 if group < 0 else 1 + group)


def annotation_xml(scene: Scene, name: str) -> str:
    """`Annotations/<id>.xml`: corners counted from 1, both inside the box. The background is a scene without a box;
    each member of a group is an object of its own with the same name."""
    lines = ["<annotation>", f"\t<filename>{name}</filename>", "\t<size>"]
    lines += [f"\t\t<{key}>{value}</{key}>" for key, value in zip(("width", "height"), scene.size, strict=True)]
    lines += ["\t\t<depth>3</depth>", "\t</size>"]
    lines += [
        "\t<object>",
        f"\t\t<name>{chain_of(-1, scene)}</name>",
        "\t\t<scene>1</scene>",
        "\t\t<nobndbox>1</nobndbox>",
    ]
    lines.append("\t</object>")
    for item in scene.objects:
        x1, y1, x2, y2 = item.box
        corners = zip(("xmin", "ymin", "xmax", "ymax"), (x1 + 1, y1 + 1, x2, y2), strict=True)
        box = [f"\t\t\t<{key}>{value}</{key}>" for key, value in corners]
        lines += ["\t<object>", f"\t\t<name>{chain_of(item.group, scene)}</name>", "\t\t<bndbox>", *box]
        lines += ["\t\t</bndbox>", "\t</object>"]
    return "\n".join([*lines, "</annotation>", ""])
