"""SQLite connections that are safe to have open when the process forks."""

from __future__ import annotations

import os
import sqlite3
from typing import Any

from qpert.runtime.errors import InputError
from qpert.runtime.forks import keep_in_children


class Connection(sqlite3.Connection):
    """A connection that a forked child neither uses nor closes; pass it to `sqlite3.connect` as the `factory`.

    A child that closed it would roll back the transaction that its parent is in the middle of, in the parent's file.
    Source: "How To Corrupt An SQLite Database File", section 2.6, sqlite.org.
    """

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._process = os.getpid()
        keep_in_children(self)

    @property
    def is_inherited(self) -> bool:
        """Whether it was opened by the process that this one was forked from."""
        return self._process != os.getpid()

    @property
    def in_transaction(self) -> bool:
        """Whether this process has a transaction open."""
        return not self.is_inherited and super().in_transaction

    def execute(self, *arguments: Any) -> sqlite3.Cursor:
        """As in sqlite3. Raises InputError in a forked child."""
        self._require_own()
        return super().execute(*arguments)

    def executemany(self, *arguments: Any) -> sqlite3.Cursor:
        """As in sqlite3. Raises InputError in a forked child."""
        self._require_own()
        return super().executemany(*arguments)

    def close(self) -> None:
        """Close it; in a forked child, do nothing."""
        if not self.is_inherited:
            super().close()

    def _require_own(self) -> None:
        if self.is_inherited:
            raise InputError(
                f"process {os.getpid()} was forked while process {self._process} had this file open for writing; open "
                "it again in this process, once the other has closed it",
                code="forked-database",
            )
