"""The training set of the model that overlooks small objects: image tokens of the frozen vision tower, and captions.

Captions speak of what is large (`qpert.runtime.scenes.Salience`). The vision tower is that of the shipped demonstration
and is not trained, as BLIP-2's is not: its output is computed once for each picture and kept on disk in float16.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from data import MAX_TOKENS, tokenizer
from scoring import open_model

from qpert.exporter import demo
from qpert.graphs.families.blip2.config import CONFIGS
from qpert.graphs.families.blip2.model import Blip2Retrieval
from qpert.runtime.files import sha256_of, write_atomically
from qpert.runtime.inputs.images import preprocess_images
from qpert.runtime.inputs.preprocessing import ImagePreprocessing
from qpert.runtime.progress import Progress
from qpert.runtime.scenes import Caption, Salience, Scene, describe_large, draw_scene, sample_scene

SHARD = 1000
"""Pictures in a shard."""
SALIENCE = Salience()
SIZE_EDGES = (0.01, 0.02, 0.04, 0.06, 0.1, 0.2, 0.4)
"""Between the size bins of the table that says which objects captions name."""


@dataclass(frozen=True, eq=False)
class ReadOutSet:
    """M pictures, in memory. image_embeds: float16 [M, N, C]. tokens: uint16 [M, 5, 35], padded with 0."""

    image_embeds: npt.NDArray[np.float16]
    tokens: npt.NDArray[np.uint16]

    def __len__(self) -> int:
        return len(self.tokens)


def prepare(folder: Path, count: int, *, seed: int, progress: Progress) -> None:
    """Draw and encode the shards that `folder` lacks. They depend on the settings and their number only."""
    folder.mkdir(parents=True, exist_ok=True)
    said = {"seed": seed, "shard": SHARD, "salience": asdict(SALIENCE), "vision": sha256_of(demo.MODEL)}
    settings = folder / "settings.json"
    if settings.exists() and json.loads(settings.read_text()) != said:
        raise SystemExit(f"{folder} holds pictures of other settings than {said}; use another --work folder")
    settings.write_text(json.dumps(said))
    missing = [number for number in range(-(-count // SHARD)) if not _shard(folder, number).exists()]
    model = open_model(demo.MODEL)
    with progress.stage(f"drawing {len(missing) * SHARD} training scenes", len(missing)) as advance:
        for number in missing:
            _write_shard(folder, number, seed, model)
            advance(1)


def load(folder: Path, count: int) -> ReadOutSet:
    """The first `count` pictures."""
    shards = [np.load(_shard(folder, number)) for number in range(-(-count // SHARD))]
    return ReadOutSet(
        np.concatenate([shard["image_embeds"] for shard in shards])[:count],
        np.concatenate([shard["tokens"] for shard in shards])[:count],
    )


def scenes(indices: Sequence[int], seed: int) -> Iterator[tuple[Scene, tuple[Caption, ...]]]:
    """Training scenes with their five captions."""
    for index in indices:
        name = f"train/{seed}/{index}"
        scene = sample_scene(name)
        yield scene, describe_large(scene, f"{name}/large", SALIENCE)


def named_by_size(found: Iterator[tuple[Scene, tuple[Caption, ...]]]) -> list[dict[str, float]]:
    """For each size bin: how many groups of objects have their largest member there, and the share of captions, of
    those scenes, that name them."""
    edges = (0.0, *SIZE_EDGES, 1.0)
    counts, named, captions = (np.zeros(len(edges) - 1, np.int64) for _ in range(3))
    for scene, texts in found:
        for items in scene.groups:
            bin_ = min(int(np.searchsorted(edges, max(map(scene.area, items)), side="right")), len(counts)) - 1
            counts[bin_] += 1
            captions[bin_] += len(texts)
            said = [(mention.kind, mention.colour) for text in texts for mention in text.claim.mentions]
            named[bin_] += said.count((items[0].kind, items[0].colour))
    return [
        {"from": low, "to": high, "objects": int(count), "named": round(float(hits / max(total, 1)), 4)}
        for low, high, count, hits, total in zip(edges[:-1], edges[1:], counts, named, captions, strict=True)
    ]


def _shard(folder: Path, number: int) -> Path:
    return folder / f"tokens-{number:04d}.npz"


def _write_shard(folder: Path, number: int, seed: int, model: Blip2Retrieval) -> None:
    words, preprocessing = tokenizer(), ImagePreprocessing(CONFIGS["demo"].vision.image_size)
    pictures, tokens = [], np.zeros((SHARD, 5, MAX_TOKENS), np.uint16)
    for row, (scene, captions) in enumerate(scenes(range(number * SHARD, (number + 1) * SHARD), seed)):
        pictures.append(draw_scene(scene))
        encoded = words.encode([caption.text for caption in captions]).input_ids
        tokens[row, :, : encoded.shape[1]] = encoded
    parts = []
    for start in range(0, SHARD, 100):
        pixels = torch.from_numpy(preprocess_images(pictures[start : start + 100], preprocessing))
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            parts.append(model.encode_image(pixels).half().numpy())
    temporary = folder / f".{number}.npz"
    np.savez(temporary, image_embeds=np.concatenate(parts), tokens=tokens)
    temporary.replace(_shard(folder, number))


def write_shares(path: Path, count: int, seed: int) -> None:
    """The table of named objects of the first `count` training scenes, as JSON."""
    table = {"salience": asdict(SALIENCE), "scenes": count, "bins": named_by_size(scenes(range(count), seed))}
    write_atomically(path, json.dumps(table, indent=1))
