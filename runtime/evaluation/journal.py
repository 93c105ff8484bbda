"""What an evaluation has computed so far, so that it survives Ctrl-C, `kill -9` and a full disk.

One SQLite file of records: (kind, number) → a float32 array with the key of what it was computed for and a checksum.
A record that is damaged, or has another key, counts as missing and is computed again.
"""

from __future__ import annotations

import hashlib
import sqlite3
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Protocol

import numpy as np
import numpy.typing as npt

from qpert.runtime.errors import InputError, UnavailableError
from qpert.runtime.sqlite import Connection

COMMIT_SECONDS = 0.5
"""The most work that a kill may lose. A commit waits for the disk (milliseconds), so not every record gets one."""

Floats = npt.NDArray[np.float32]


class Journal(Protocol):
    """Where results are looked up before they are computed, and kept afterwards."""

    def get(self, kind: str, number: int, key: bytes) -> Floats | None:
        """The flat float32 array stored under (kind, number) with exactly this `key`, or None."""
        ...

    def put(self, kind: str, number: int, key: bytes, values: Floats) -> None: ...


class NullJournal:
    """A journal that keeps nothing, for work that takes seconds."""

    def get(self, kind: str, number: int, key: bytes) -> Floats | None:
        return None

    def put(self, kind: str, number: int, key: bytes, values: Floats) -> None:
        return


class DiskJournal:
    """A journal in a file. A context manager; one process at a time (the system lifts the lock when a process dies).

    Raises InputError if another process has it open or the file is not a journal, UnavailableError for a full disk.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._last_commit = time.monotonic()
        self._connection = sqlite3.connect(path, isolation_level=None, timeout=0, factory=Connection)
        try:
            self._connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._connection.execute("PRAGMA synchronous = FULL")
            self._connection.execute("BEGIN EXCLUSIVE")
            self._connection.execute(
                "CREATE TABLE IF NOT EXISTS records (kind TEXT, number INTEGER, key BLOB, data BLOB, checksum BLOB,"
                " PRIMARY KEY (kind, number)) WITHOUT ROWID"
            )
            self._connection.execute("COMMIT")
            self._connection.execute("BEGIN")
        except sqlite3.Error as error:
            self._connection.close()
            raise self._explained(error) from error

    def get(self, kind: str, number: int, key: bytes) -> Floats | None:
        query = "SELECT key, data, checksum FROM records WHERE kind = ? AND number = ?"
        try:
            found = self._connection.execute(query, (kind, number)).fetchone()
        except sqlite3.Error as error:
            raise self._explained(error) from error
        if found is None or found[0] != key or found[2] != _checksum(key, found[1]):
            return None
        return np.frombuffer(found[1], "<f4").astype(np.float32)

    def put(self, kind: str, number: int, key: bytes, values: Floats) -> None:
        data = np.ascontiguousarray(values, "<f4").tobytes()
        statement = "INSERT OR REPLACE INTO records VALUES (?, ?, ?, ?, ?)"
        try:
            self._connection.execute(statement, (kind, number, key, data, _checksum(key, data)))
            if time.monotonic() - self._last_commit >= COMMIT_SECONDS:
                self.commit()
        except sqlite3.Error as error:
            raise self._explained(error) from error

    def commit(self) -> None:
        """Make everything put so far survive a crash."""
        self._connection.execute("COMMIT")
        self._connection.execute("BEGIN")
        self._last_commit = time.monotonic()

    def close(self) -> None:
        with suppress(sqlite3.Error):  # a full disk was reported by `put`
            if self._connection.in_transaction:
                self._connection.execute("COMMIT")
        self._connection.close()

    def _explained(self, error: sqlite3.Error) -> InputError | UnavailableError:
        text = str(error)
        if "locked" in text:
            return InputError(
                f"another process is evaluating in {self.path.parent}; wait for it, or give this one its own --work",
                code="work-in-use",
            )
        if "full" in text or "I/O" in text:
            return UnavailableError(
                f"{self.path} cannot be written ({text}); free some space and run the same command again: it "
                "resumes from the last commit",
                code="journal-write",
            )
        return InputError(
            f"{self.path} is not an evaluation journal ({text}); delete {self.path.parent} and start over",
            code="journal-unreadable",
        )

    def __enter__(self) -> DiskJournal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def key_of(*arrays: npt.NDArray[np.generic]) -> bytes:
    """A digest of arrays: what a record was computed for."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.digest()[:16]


def _checksum(key: bytes, data: bytes) -> bytes:
    return hashlib.blake2b(key + data, digest_size=8).digest()
