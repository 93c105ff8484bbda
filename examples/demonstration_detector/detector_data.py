"""The detector's training set: generated scenes as arrays, in shards on disk."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from qpert.runtime.progress import Progress
from qpert.runtime.scenes import Scene, draw_scene, sample_scene
from qpert.runtime.scenes.objects import KINDS
from qpert.runtime.scenes.writer import JPEG_QUALITY

SHARD = 1000
"""Pictures in a shard."""
MOST_OBJECTS = 12
"""Objects that a scene may have: four groups of three."""
LABELS = tuple(KINDS)
"""Class names, in the order of the class numbers."""


@dataclass(frozen=True, eq=False)
class TrainingSet:
    """M pictures. All arrays are in memory.

    pixels: uint8 [M, S, S, 3]. boxes: float32 [M, 12, 4], centre x, centre y, width and height in shares of the
    picture, padded with 0. kinds: int64 [M, 12], class numbers, padded with −1.
    """

    pixels: npt.NDArray[np.uint8]
    boxes: npt.NDArray[np.float32]
    kinds: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.pixels)

    def batch(self, rows: Sequence[int], mirrored: Sequence[bool]) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """Pixels, float32 [B, 3, S, S] in 0…1, and the labels that transformers' loss takes; some pictures mirrored."""
        pixels, labels = [], []
        for row, turned in zip(rows, mirrored, strict=True):
            picture, count = self.pixels[row], int((self.kinds[row] >= 0).sum())
            boxes = self.boxes[row, :count].copy()
            if turned:
                picture = picture[:, ::-1]
                boxes[:, 0] = 1 - boxes[:, 0]
            pixels.append(picture)
            kinds = torch.from_numpy(self.kinds[row, :count].copy())
            labels.append({"class_labels": kinds, "boxes": torch.from_numpy(boxes)})
        return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255, labels


def prepare(folder: Path, count: int, *, side: int, seed: int, progress: Progress) -> None:
    """Draw the shards that `folder` lacks. They depend on seed, side and their number only."""
    folder.mkdir(parents=True, exist_ok=True)
    said = {"seed": seed, "shard": SHARD, "side": side}
    settings = folder / "settings.json"
    if settings.exists() and json.loads(settings.read_text()) != said:
        raise SystemExit(f"{folder} holds pictures of other settings than {said}; use another --work folder")
    settings.write_text(json.dumps(said))
    missing = [number for number in range(-(-count // SHARD)) if not _shard(folder, number).exists()]
    with progress.stage(f"drawing {len(missing) * SHARD} training scenes", len(missing)) as advance:
        for number in missing:
            _write_shard(folder, number, side, seed)
            advance(1)


def load(folder: Path, count: int) -> TrainingSet:
    """The first `count` pictures of a folder that `prepare` filled."""
    shards = [np.load(_shard(folder, number)) for number in range(-(-count // SHARD))]
    return TrainingSet(**{name: np.concatenate([shard[name] for shard in shards])[:count] for name in shards[0]})


def training_scene(seed: int, index: int) -> Scene:
    """No split of `qpert.runtime.scenes.generate` (train, val, test) has a scene of such a name."""
    return sample_scene(f"detector/{seed}/{index}")


def truth(scene: Scene) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Boxes float32 [12, 4] and kinds int64 [12] as in `TrainingSet`: the full extent of every object."""
    boxes, kinds = np.zeros((MOST_OBJECTS, 4), np.float32), np.full(MOST_OBJECTS, -1, np.int64)
    width, height = scene.size
    for index, item in enumerate(scene.objects):
        x1, y1, x2, y2 = item.box
        boxes[index] = (x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height
        kinds[index] = LABELS.index(item.kind)
    return boxes, kinds


def as_written(scene: Scene) -> Image.Image:
    """The picture after JPEG, as the demonstration's data sets hold it."""
    stream = io.BytesIO()
    draw_scene(scene).save(stream, "JPEG", quality=JPEG_QUALITY)
    return Image.open(stream).convert("RGB")


def _shard(folder: Path, number: int) -> Path:
    return folder / f"scenes-{number:04d}.npz"


def _write_shard(folder: Path, number: int, side: int, seed: int) -> None:
    scenes = [training_scene(seed, index) for index in range(number * SHARD, (number + 1) * SHARD)]
    squares = [as_written(scene).resize((side, side), Image.Resampling.BILINEAR) for scene in scenes]
    boxes, kinds = zip(*map(truth, scenes), strict=True)
    temporary = folder / f".{number}.npz"
    np.savez(temporary, pixels=np.stack([np.asarray(s) for s in squares]), boxes=np.stack(boxes), kinds=np.stack(kinds))
    temporary.replace(_shard(folder, number))
