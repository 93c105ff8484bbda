"""A gallery that others may change while it is open here: read again when it has changed, and only then."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from qpert.runtime.gallery.catalogue import CATALOGUE_NAME
from qpert.runtime.gallery.reader import StoredGallery

SQLITE_COUNTER = slice(24, 28)
"""Of a database's header: changes with every commit. Source: "Database File Format", section 1.3.7, sqlite.org."""


class FreshGallery:
    """`opened` opens the folder's gallery. Methods may be called by any thread."""

    def __init__(self, folder: Path, opened: Callable[[Path], StoredGallery]) -> None:
        self.folder, self._opened = folder, opened
        self._lock = threading.Lock()
        self._last: tuple[object, StoredGallery] | None = None

    def current(self) -> StoredGallery:
        """The gallery as it was last committed, by whichever process. Raises GalleryError."""
        with self._lock:
            stamp = self._stamp()
            if self._last is None or self._last[0] != stamp:
                self._last = stamp, self._opened(self.folder)
            return self._last[1]

    def forget(self) -> None:
        """Read everything again at the next use."""
        with self._lock:
            self._last = None

    def _stamp(self) -> object:
        path = self.folder / CATALOGUE_NAME
        with path.open("rb") as stream:
            header = stream.read(100)
        state = path.stat()
        return state.st_mtime_ns, state.st_size, header[SQLITE_COUNTER]
