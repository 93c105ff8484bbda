"""Files of image features: safetensors, some dozens of images each, written once."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qpert.runtime.bundle.folder import HashMemory
from qpert.runtime.errors import GalleryError
from qpert.runtime.files import sha256_of, sync_folder, write_atomically
from qpert.runtime.gallery.catalogue import Shard, remedy
from qpert.runtime.retrieval.features import ImageFeatures

FEATURE_FOLDER = "features"
OPEN_FILES = 32
Arrays = dict[str, npt.NDArray[Any]]


def write_shard(folder: Path, number: int, generation: int, features: Arrays) -> Shard:
    """Write `features/<number>.safetensors`, durably, under its name at once or not at all. [n, …] each."""
    from safetensors.numpy import save

    target = folder / FEATURE_FOLDER
    if not target.is_dir():
        target.mkdir()
        sync_folder(folder)
    file = f"{FEATURE_FOLDER}/{generation:03d}-{number:06d}.safetensors"
    data = save({name: np.ascontiguousarray(array) for name, array in features.items()})
    write_atomically(folder / file, data)
    records = len(next(iter(features.values())))
    return Shard(number, file, records, hashlib.sha256(data).hexdigest())


def kept_arrays(features: ImageFeatures) -> Arrays:
    """What a shard holds: everything but the query embeddings, which have a file of their own."""
    arrays = {
        "image_embeds": features.image_embeds,
        "object_masks": features.object_masks,
        "box_weights": features.box_weights,
    }
    return {name: array for name, array in arrays.items() if array is not None and array.size}


class ShardReader:
    """Reads records of shards; a shard's hash is checked when it is first opened, unless that was done before."""

    def __init__(self, folder: Path, shards: Sequence[Shard]) -> None:
        self.folder = folder
        self.shards = {shard.id: shard for shard in shards}
        self._memory = HashMemory.load()
        self._open: OrderedDict[int, Any] = OrderedDict()

    def close(self) -> None:
        self._open.clear()
        self._memory.save()

    def __reduce__(self) -> tuple[type[ShardReader], tuple[Path, list[Shard]]]:
        return ShardReader, (self.folder.absolute(), list(self.shards.values()))

    def records(self, shard: int, slots: Sequence[int]) -> Arrays:
        """Some records of one shard, in that order."""
        file = self._file(shard)
        found = {}
        for name in file.keys():  # noqa: SIM118, not a dict
            part = file.get_slice(name)
            found[name] = np.concatenate([part[slot : slot + 1] for slot in slots])
        return found

    def _file(self, number: int) -> Any:
        from safetensors import safe_open

        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        shard = self.shards[number]
        check_shard(self.folder, shard, self._memory)
        self._open[number] = safe_open(self.folder / shard.file, framework="numpy")
        if len(self._open) > OPEN_FILES:
            self._open.popitem(last=False)
        return self._open[number]


def check_shard(folder: Path, shard: Shard, memory: HashMemory) -> None:
    """Raises GalleryError where a shard is missing or not what was written."""
    path = folder / shard.file
    if not path.is_file():
        raise GalleryError(f"{path} is missing; {remedy(folder)}", code="gallery-shard-missing")
    if memory.knows(path, shard.sha256):
        return
    found = sha256_of(path)
    if found != shard.sha256:
        raise GalleryError(
            f"{path} was altered: its SHA-256 is {found}, {shard.sha256} was written; {remedy(folder)}",
            code="gallery-shard-altered",
        )
    memory.remember(path, shard.sha256)
