"""Whether an image's file is still the one that was indexed."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from qpert.runtime.errors import ImageError
from qpert.runtime.files import sha256_of
from qpert.runtime.gallery.entries import ImageEntry


class IndexedFile(Protocol):
    """An image and its file as it was indexed."""

    @property
    def name(self) -> str: ...

    @property
    def path(self) -> str: ...

    @property
    def bytes(self) -> int: ...

    @property
    def mtime(self) -> int: ...

    @property
    def sha256(self) -> str: ...


def check_unchanged(record: IndexedFile) -> None:
    """Raises ImageError where an image's file is not the one that was indexed."""
    path = Path(record.path)
    if not path.is_file():
        raise ImageError(
            f"{path}, from which the features of {record.name} are recomputed, is gone; put it back, delete it from "
            "the gallery, or index with --features stored",
            code="image-missing",
        )
    state = path.stat()
    if (state.st_size, state.st_mtime_ns) == (record.bytes, record.mtime):
        return
    if state.st_size != record.bytes or sha256_of(path) != record.sha256:
        raise ImageError(
            f"{path} has changed since it was indexed as {record.name}; index it again with --replace",
            code="image-changed",
        )


def file_differs(known: IndexedFile, entry: ImageEntry) -> bool:
    """Whether an image's file is another than the one that was indexed. Raises ImageError where it cannot be read."""
    try:
        state = entry.path.stat()
    except OSError as error:
        raise ImageError(
            f"{entry.path} cannot be read: {error.strerror}; check the path", code="image-missing"
        ) from error
    if state.st_size == known.bytes and state.st_mtime_ns == known.mtime:
        return False
    return state.st_size != known.bytes or sha256_of(entry.path) != known.sha256
