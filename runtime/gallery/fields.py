"""The table `field` of a catalogue: the metadata of images, and which images a filter is true of."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from qpert.runtime.filters.metadata import Metadata, Value
from qpert.runtime.filters.sql import where_sql
from qpert.runtime.filters.tree import Condition, holds, type_of
from qpert.runtime.gallery.catalogue import Catalogue


def insert_fields(connection: sqlite3.Connection, images: Iterable[tuple[int, Metadata]]) -> None:
    """(image row, metadata) each."""
    connection.executemany(
        "INSERT INTO field VALUES (?, ?, ?, ?)",
        [(row, key, type_of(value), value) for row, metadata in images for key, value in metadata.items()],
    )


def replace_fields(connection: sqlite3.Connection, row: int, metadata: Metadata) -> None:
    connection.execute("DELETE FROM field WHERE image = ?", (row,))
    insert_fields(connection, [(row, metadata)])


def read_fields(catalogue: Catalogue, row: int | None = None) -> dict[int, dict[str, Value]]:
    """The metadata of all images that have any, dead ones too, or of one image, by row."""
    found: dict[int, dict[str, Value]] = {}
    if catalogue.has_fields:
        where, values = ("", ()) if row is None else ("WHERE image = ?", (row,))
        query = f"SELECT image, key, type, value FROM field {where}"
        for row, key, kind, value in catalogue.connection.execute(query, values):
            found.setdefault(row, {})[key] = bool(value) if kind == "boolean" else value
    return found


def rows_where(catalogue: Catalogue, condition: Condition) -> npt.NDArray[np.int64]:
    """int64 [m]: the rows of images, dead ones too, of which a condition is true."""
    if not catalogue.has_fields:
        return np.arange(catalogue.count("image") if holds(condition, {}) else 0, dtype=np.int64)
    where, values = where_sql(condition)
    rows = catalogue.connection.execute(f"SELECT row FROM image WHERE {where} ORDER BY row", values).fetchall()
    return np.array(rows, np.int64).reshape(-1)
