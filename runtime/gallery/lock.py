"""One writer at a time. The lock is SQLite's own, so the operating system releases it when a process dies."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from qpert.runtime.errors import GalleryError
from qpert.runtime.sqlite import Connection

LOCK_NAME = "writer.lock"
OWNER_NAME = "writer.pid"


@contextmanager
def writer_lock(folder: Path) -> Iterator[None]:
    """Hold the gallery's only write lock. Raises GalleryError at once if another process (or thread) has it."""
    lock = sqlite3.connect(folder / LOCK_NAME, timeout=0, isolation_level=None, factory=Connection)
    with closing(lock) as connection:
        try:
            connection.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError as error:
            if "locked" not in str(error):
                raise
            raise GalleryError(
                f"the gallery {folder} is being written by another process{_owner(folder)}; "
                "wait until it has finished (searching works meanwhile)",
                code="gallery-locked",
            ) from None
        with suppress(OSError):  # only for the message; a full disk is reported where data is written
            (folder / OWNER_NAME).write_text(str(os.getpid()))
        yield


def _owner(folder: Path) -> str:
    with suppress(OSError):
        return f" (process {(folder / OWNER_NAME).read_text()})"
    return ""
