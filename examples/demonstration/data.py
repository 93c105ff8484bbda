"""The training set: generated scenes as arrays, in shards on disk, with the facts that the auxiliary losses need."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from qpert.exporter.demo import VOCABULARY
from qpert.exporter.families.blip2.tokenizer import build_tokenizer
from qpert.graphs.families.blip2.config import CONFIGS
from qpert.runtime.inputs.images import resize
from qpert.runtime.inputs.text import Tokenizer, TokenizerSpec
from qpert.runtime.progress import Progress
from qpert.runtime.scenes import Scene, describe, draw_scene, object_map, sample_scene
from qpert.runtime.scenes.captions import TEXTURE_VISIBLE
from qpert.runtime.scenes.facts import Mention, cell_of, size_word_class
from qpert.runtime.scenes.objects import BACKGROUNDS, COLOURS, KINDS, TEXTURES

SHARD = 2500
"""Pictures in a shard."""
ROUNDS = 2
"""Times five captions that each training picture has."""
MAX_TOKENS = 35
LEAST_COVERED = 0.12
"""The share of a patch from which on it counts as showing an object."""

SIZES = ("tiny", "small", "medium", "big", "huge")
CELLS = ("upper left", "upper", "upper right", "left", "middle", "right", "lower left", "lower", "lower right")
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "kind": tuple(KINDS),
    "colour": tuple(COLOURS),
    "texture": tuple(TEXTURES),
    "size": SIZES,
    "cell": CELLS,
}
"""What the auxiliary head says of a patch that shows an object."""
PLACES = tuple(BACKGROUNDS)
COLOUR_BLOCK = len(KINDS) + len(TEXTURES) + len(SIZES) + len(CELLS)
CONCEPTS = len(COLOURS) * COLOUR_BLOCK + len(PLACES)
"""Things that a caption may say and a picture may show: a colour with a kind, texture, size or cell, and a place."""
MOST_CONCEPTS = 40


@dataclass(frozen=True, eq=False)
class TrainingSet:
    """M pictures. All arrays are in memory.

    pixels: uint8 [M, S, S, 3]. patches: uint8 [M, P, A + 1]: for each patch, 1 where it shows an object, then that
    object's attributes in the order of `ATTRIBUTES`. places: uint8 [M]. tokens: uint16 [M, C, 35], padded with 0.
    said: uint16 [M, C, 40], the concepts that each caption states, and shown: uint16 [M, 40], those of the picture;
    1 + the concept's number, padded with 0.
    """

    pixels: npt.NDArray[np.uint8]
    patches: npt.NDArray[np.uint8]
    places: npt.NDArray[np.uint8]
    tokens: npt.NDArray[np.uint16]
    said: npt.NDArray[np.uint16]
    shown: npt.NDArray[np.uint16]

    def __len__(self) -> int:
        return len(self.pixels)


def prepare(folder: Path, count: int, *, seed: int, workers: int, progress: Progress) -> None:
    """Draw the shards that `folder` lacks. They depend on the seed and their number only."""
    folder.mkdir(parents=True, exist_ok=True)
    said = {"seed": seed, "shard": SHARD, "rounds": ROUNDS, "image_size": CONFIGS["demo"].vision.image_size}
    settings = folder / "settings.json"
    if settings.exists() and json.loads(settings.read_text()) != said:
        raise SystemExit(f"{folder} holds pictures of other settings than {said}; use another --work folder")
    settings.write_text(json.dumps(said))
    missing = [number for number in range(-(-count // SHARD)) if not _shard(folder, number).exists()]
    stage = progress.stage(f"drawing {len(missing) * SHARD} training scenes", len(missing))
    with stage as advance, ProcessPoolExecutor(workers) as pool:
        for _ in pool.map(_write_shard, [folder] * len(missing), missing, [seed] * len(missing)):
            advance(1)


def load(folder: Path, count: int) -> TrainingSet:
    shards = [np.load(_shard(folder, number)) for number in range(-(-count // SHARD))]
    return TrainingSet(**{name: np.concatenate([shard[name] for shard in shards])[:count] for name in shards[0]})


def tokenizer() -> Tokenizer:
    size = CONFIGS["demo"].qformer.vocab_size
    return Tokenizer(build_tokenizer(VOCABULARY, vocab_size=size), TokenizerSpec("tokenizer.json", MAX_TOKENS, size))


def _shard(folder: Path, number: int) -> Path:
    return folder / f"scenes-{number:04d}.npz"


def _write_shard(folder: Path, number: int, seed: int) -> None:
    rows = list(_pictures(range(number * SHARD, (number + 1) * SHARD), seed))
    names = ("pixels", "patches", "places", "tokens", "said", "shown")
    arrays = {name: np.stack([row[index] for row in rows]) for index, name in enumerate(names)}
    temporary = folder / f".{number}.npz"
    np.savez(temporary, **arrays)
    temporary.replace(_shard(folder, number))


def _pictures(indices: range, seed: int) -> Iterator[tuple[npt.NDArray[np.generic], ...]]:
    words, vision = tokenizer(), CONFIGS["demo"].vision
    for index in indices:
        name = f"train/{seed}/{index}"
        scene = sample_scene(name)
        small = resize(draw_scene(scene), (vision.image_size,) * 2)
        captions = describe(scene, f"{name}/captions", rounds=ROUNDS)[: 5 * ROUNDS]
        texts = [caption.text for caption in captions]
        tokens = np.zeros((len(texts), MAX_TOKENS), np.uint16)
        encoded = words.encode(texts).input_ids
        tokens[:, : encoded.shape[1]] = encoded
        place = np.array(PLACES.index(scene.background), np.uint8)
        said = np.stack([_padded(_concepts(c.claim.mentions, c.claim.background)) for c in captions])
        shown = _padded(_concepts(_all_mentions(scene), scene.background))
        yield np.asarray(small), patch_labels(scene, vision.image_size, vision.grid), place, tokens, said, shown


def patch_labels(scene: Scene, image_size: int, grid: int) -> npt.NDArray[np.uint8]:
    """uint8 [P, A + 1]: see `TrainingSet.patches`. A patch shows the object that covers most of it."""
    seen = np.asarray(object_map(scene).resize((image_size,) * 2, Image.Resampling.NEAREST))
    cells = seen.reshape(grid, image_size // grid, grid, image_size // grid)
    shares = np.stack([(cells == index + 1).mean((1, 3)).ravel() for index in range(len(scene.objects))])  # [O, P]
    facts = np.array([_facts(scene, index) for index in range(len(scene.objects))], np.uint8)
    labels = facts[shares.argmax(0)]
    labels[shares.max(0) < LEAST_COVERED] = 0
    return labels


def _all_mentions(scene: Scene) -> list[Mention]:
    return [
        Mention(
            item.kind,
            item.colour,
            texture=item.texture if min(item.place[2:]) >= TEXTURE_VISIBLE else None,
            size=size_word_class(scene.area(item)) or "medium",
            cell=cell_of(scene, item),
        )
        for item in scene.objects
    ]


def _concepts(mentions: Sequence[Mention], place: str | None) -> list[int]:
    """Numbers from 0: for each colour a block of kinds, textures, sizes and cells, then the places."""
    blocks = (ATTRIBUTES["kind"], ATTRIBUTES["texture"], SIZES, CELLS)
    block_size = sum(map(len, blocks))
    found = set() if place is None else {CONCEPTS - len(PLACES) + PLACES.index(place)}
    for mention in mentions:
        start = ATTRIBUTES["colour"].index(mention.colour) * block_size
        for names, value in zip(blocks, (mention.kind, mention.texture, mention.size, mention.cell), strict=True):
            if value is not None:
                found.add(start + names.index(value))
            start += len(names)
    return sorted(found)


def _padded(numbers: list[int]) -> npt.NDArray[np.uint16]:
    row = np.zeros(MOST_CONCEPTS, np.uint16)
    row[: len(numbers)] = np.array(numbers[:MOST_CONCEPTS]) + 1
    return row


def _facts(scene: Scene, index: int) -> tuple[int, ...]:
    item = scene.objects[index]
    size = SIZES.index(size_word_class(scene.area(item)) or "medium")
    kind, colour, texture = _numbers()
    return 1, kind[item.kind], colour[item.colour], texture[item.texture], size, CELLS.index(cell_of(scene, item))


@lru_cache(maxsize=1)
def _numbers() -> tuple[dict[str, int], ...]:
    return tuple({name: index for index, name in enumerate(ATTRIBUTES[key])} for key in ("kind", "colour", "texture"))
