"""Append-only files of fixed-size rows. Only the rows that the catalogue says are there count.

Rows are written past the committed end, forced to the disk, and then committed to the catalogue; what a crash leaves
past the end is overwritten by the next writer. Committed rows are never changed.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qpert.runtime.errors import GalleryError
from qpert.runtime.files import CHUNK, sync_folder


@dataclass(frozen=True)
class Column:
    """One file: rows of `shape` and `dtype`, little-endian, without a header."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        return int(np.dtype(self.dtype).itemsize * np.prod(self.shape))

    def file(self, folder: Path, generation: int) -> Path:
        return folder / f"{self.name}.{generation}"

    def append(self, path: Path, committed: int, rows: npt.NDArray[Any]) -> str:
        """Write `rows` after the `committed` ones and force them to the disk; returns their SHA-256."""
        data = np.ascontiguousarray(rows, self.dtype).tobytes()
        is_new = not path.exists()
        with path.open("wb" if is_new else "r+b") as stream:
            stream.truncate(committed * self.row_bytes)
            stream.seek(committed * self.row_bytes)
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        if is_new:
            sync_folder(path.parent)
        return hashlib.sha256(data).hexdigest()

    def map(self, path: Path, rows: int) -> npt.NDArray[Any]:
        """The first `rows` rows, read-only, mapped from the file."""
        if not rows:
            return np.empty((0, *self.shape), self.dtype)
        self.check_length(path, rows)
        return np.memmap(path, np.dtype(self.dtype), "r", shape=(rows, *self.shape))

    def check_length(self, path: Path, rows: int) -> None:
        found = path.stat().st_size if path.is_file() else 0
        if found < rows * self.row_bytes:
            raise GalleryError(
                f"{path} has {found} bytes, {rows * self.row_bytes} were committed; the gallery is damaged: restore "
                "the file, or index the images into a new gallery",
                code="gallery-column-short",
            )

    def digest(self, path: Path, first: int, rows: int) -> str:
        """SHA-256 of some rows, as they are on the disk."""
        digest, left = hashlib.sha256(), rows * self.row_bytes
        with path.open("rb") as stream:
            stream.seek(first * self.row_bytes)
            while left and (chunk := stream.read(min(CHUNK, left))):
                digest.update(chunk)
                left -= len(chunk)
        return digest.hexdigest()
