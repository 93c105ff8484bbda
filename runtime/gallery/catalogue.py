"""`gallery.sqlite`: which images a gallery holds, where their numbers lie, and what these must hash to."""

from __future__ import annotations

import hashlib
import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qpert.runtime.errors import GalleryError, UnavailableError
from qpert.runtime.gallery.columns import Column
from qpert.runtime.gallery.spec import GallerySpec
from qpert.runtime.sqlite import Connection

CATALOGUE_NAME = "gallery.sqlite"
SCHEMA_VERSION = 3
FIRST_SCHEMA = 1
"""Without `image.sets`: one query set for each image. Read as it is; a writer adds the column."""
FIELDS_SCHEMA = 3
"""The first with `field`. A catalogue without it has no metadata; a writer adds the table."""
WAIT_SECONDS = 30.0
"""How long a reader waits for a writer's commit (milliseconds long, unless the disk is busy)."""

SCHEMA = """
CREATE TABLE meta (schema_version INTEGER NOT NULL, generation INTEGER NOT NULL, spec TEXT NOT NULL);
CREATE TABLE image (
    row INTEGER PRIMARY KEY, name TEXT NOT NULL, path TEXT NOT NULL, bytes INTEGER NOT NULL, mtime INTEGER NOT NULL,
    sha256 TEXT NOT NULL, boxes TEXT, shard INTEGER, slot INTEGER, live INTEGER NOT NULL DEFAULT 1,
    sets INTEGER NOT NULL DEFAULT 1);
CREATE UNIQUE INDEX live_name ON image (name) WHERE live;
CREATE INDEX image_shard ON image (shard);
CREATE TABLE text (row INTEGER PRIMARY KEY, image INTEGER NOT NULL, text TEXT NOT NULL);
CREATE INDEX text_image ON text (image);
CREATE TABLE shard (id INTEGER PRIMARY KEY, file TEXT NOT NULL, records INTEGER NOT NULL, sha256 TEXT NOT NULL);
CREATE TABLE block (
    name TEXT NOT NULL, first INTEGER NOT NULL, rows INTEGER NOT NULL, sha256 TEXT NOT NULL, PRIMARY KEY (name, first));
"""
FIELD_SCHEMA = """
CREATE TABLE field (image INTEGER NOT NULL, key TEXT NOT NULL, type TEXT NOT NULL, value NOT NULL,
    PRIMARY KEY (image, key)) WITHOUT ROWID;
CREATE INDEX field_value ON field (key, type, value);
"""
"""Metadata: a row for each key of an image. `value` has no affinity, so numbers are compared as numbers, exactly."""


@dataclass(frozen=True)
class ImageRecord:
    """A row of `image`. `row` counts every image ever added since the last compaction, dead ones too. `sets`: how many
    query sets it has; those of all images, dead ones too, lie side by side in row order."""

    row: int
    name: str
    path: str
    bytes: int
    mtime: int
    sha256: str
    boxes: str | None
    shard: int | None
    slot: int | None
    live: int = 1
    sets: int = 1


def path_to_column(path: str) -> str | bytes:
    """A path as SQLite keeps it: text where it is text, and the bytes that the system has where they are none."""
    stored = os.fsencode(path)
    try:
        return stored.decode("utf-8")
    except UnicodeDecodeError:
        return stored


def path_from_column(stored: str | bytes) -> str:
    """The inverse of `path_to_column`, in whatever locale this process runs."""
    return os.fsdecode(stored.encode("utf-8") if isinstance(stored, str) else stored)


IMAGE_COLUMNS = ", ".join(ImageRecord.__dataclass_fields__)


@dataclass(frozen=True)
class Block:
    """`rows` rows of a column, starting at `first`, and their SHA-256."""

    name: str
    first: int
    rows: int
    sha256: str


@dataclass(frozen=True)
class Shard:
    """A file of image features, relative to the gallery."""

    id: int
    file: str
    records: int
    sha256: str


def vector_columns(spec: GallerySpec) -> tuple[Column, ...]:
    """The columns with a row for each query set."""
    vectors = (spec.queries, spec.width)
    return (
        Column("query_embeds", "<f4", vectors),
        Column("codes", "|u1", vectors),
        Column("code_stats", "<f4", (3,)),
    )


def text_column(spec: GallerySpec) -> Column:
    return Column("text_embeds", "<f4", (spec.width,))


class Catalogue:
    """One connection. Use `create_catalogue` and `open_catalogue`."""

    def __init__(self, folder: Path, connection: sqlite3.Connection) -> None:
        self.folder = folder
        self.connection = connection

    def close(self) -> None:
        self.connection.close()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Everything inside is committed together, durably, or not at all."""
        self.connection.execute("BEGIN IMMEDIATE")
        try:
            yield self.connection
            self.connection.execute("COMMIT")
        except BaseException:
            if self.connection.in_transaction:
                self.connection.execute("ROLLBACK")
            raise

    @contextmanager
    def snapshot(self) -> Iterator[sqlite3.Connection]:
        """Everything read inside is of one moment."""
        self.connection.execute("BEGIN")
        try:
            yield self.connection
        finally:
            if self.connection.in_transaction:
                self.connection.execute("ROLLBACK")

    @property
    def schema_version(self) -> int:
        return int(self.connection.execute("SELECT schema_version FROM meta").fetchone()[0])

    @property
    def generation(self) -> int:
        return int(self.connection.execute("SELECT generation FROM meta").fetchone()[0])

    @property
    def spec(self) -> GallerySpec:
        return GallerySpec.from_json(self.connection.execute("SELECT spec FROM meta").fetchone()[0])

    def count(self, table: str) -> int:
        """One past the last row number of `image` or `text`."""
        return int(self.connection.execute(f"SELECT coalesce(max(row) + 1, 0) FROM {table}").fetchone()[0])

    def images(self, *, live: bool = True) -> list[ImageRecord]:
        where = "WHERE live" if live else ""
        rows = self.connection.execute(f"SELECT {self._image_columns} FROM image {where} ORDER BY row")
        return [image_record(row) for row in rows]

    def image(self, name: str) -> ImageRecord | None:
        found = f"SELECT {self._image_columns} FROM image WHERE name = ? AND live"
        row = self.connection.execute(found, (name,)).fetchone()
        return None if row is None else image_record(row)

    def sets(self) -> npt.NDArray[np.int64]:
        """int64 [rows]: the query sets of every image, dead ones too, in row order."""
        if self.schema_version == FIRST_SCHEMA:
            return np.ones(self.count("image"), np.int64)
        rows = self.connection.execute("SELECT sets FROM image ORDER BY row").fetchall()
        return np.array(rows, np.int64).reshape(-1)

    def upgrade(self) -> None:
        """Give a catalogue of an earlier schema the column and the table that it lacks. For writers."""
        version = self.schema_version
        if version == SCHEMA_VERSION:
            return
        with self.transaction() as connection:
            if version == FIRST_SCHEMA:
                connection.execute("ALTER TABLE image ADD COLUMN sets INTEGER NOT NULL DEFAULT 1")
            run_script(connection, FIELD_SCHEMA)
            connection.execute("UPDATE meta SET schema_version = ?", (SCHEMA_VERSION,))

    @property
    def _image_columns(self) -> str:
        """What `image_record` reads; the first schema knew no `sets`."""
        return IMAGE_COLUMNS.replace(", sets", ", 1") if self.schema_version == FIRST_SCHEMA else IMAGE_COLUMNS

    def captions(self, row: int) -> tuple[str, ...]:
        found = self.connection.execute("SELECT text FROM text WHERE image = ? ORDER BY row", (row,))
        return tuple(text for (text,) in found)

    @property
    def has_fields(self) -> bool:
        """Whether it has the table of metadata; an earlier schema has none."""
        return self.schema_version >= FIELDS_SCHEMA

    def texts(self) -> list[tuple[int, int, str]]:
        """(row, image row, text) of the captions of live images, in order."""
        return self.connection.execute(
            "SELECT text.row, text.image, text.text FROM text JOIN image ON image.row = text.image "
            "WHERE image.live ORDER BY text.row"
        ).fetchall()

    def shards(self) -> list[Shard]:
        return [
            Shard(*row) for row in self.connection.execute("SELECT id, file, records, sha256 FROM shard ORDER BY id")
        ]

    def blocks(self, column: str) -> list[Block]:
        rows = self.connection.execute(
            "SELECT name, first, rows, sha256 FROM block WHERE name = ? ORDER BY first", (column,)
        )
        return [Block(*row) for row in rows]


def blocks_digest(blocks: Sequence[Block]) -> str:
    """One hash for a column's committed state."""
    return hashlib.sha256("\n".join(f"{b.first} {b.rows} {b.sha256}" for b in blocks).encode()).hexdigest()


def create_catalogue(folder: Path, spec: GallerySpec) -> Catalogue:
    catalogue = Catalogue(folder, _connect(folder / CATALOGUE_NAME, writable=True))
    with catalogue.transaction() as connection:
        run_script(connection, SCHEMA)
        run_script(connection, FIELD_SCHEMA)
        connection.execute("INSERT INTO meta VALUES (?, 1, ?)", (SCHEMA_VERSION, spec.to_json()))
    return catalogue


def run_script(connection: sqlite3.Connection, script: str) -> None:
    """Statements within the transaction that is open (`executescript` would commit it)."""
    for statement in script.strip().rstrip(";").split(";\n"):
        connection.execute(statement)


def has_catalogue(folder: Path) -> bool:
    """Whether a catalogue was committed here (a crash at the very start leaves an empty file)."""
    path = folder / CATALOGUE_NAME
    if not path.is_file():
        return False
    try:
        with closing(_connect(path, writable=os.access(folder, os.W_OK))) as connection:
            return bool(connection.execute("SELECT count(*) FROM sqlite_master WHERE name = 'meta'").fetchone()[0])
    except sqlite3.OperationalError as error:  # a full disk, a lock: not the file's fault
        if "unable to open" in str(error):
            raise UnavailableError(
                f"the gallery {folder} cannot be opened: {path} may not be read; ask its owner, or copy the gallery",
                code="gallery-unreadable",
            ) from error
        raise
    except sqlite3.DatabaseError as error:
        raise _damaged(folder, error) from error


def open_catalogue(folder: Path, *, writable: bool = False) -> Catalogue:
    """Raises GalleryError: no gallery, damaged, or of a newer schema."""
    if not folder.is_dir() or not has_catalogue(folder):
        raise GalleryError(
            f"{folder} is not a gallery; expected a folder made by `qpert index`", code="gallery-missing"
        )
    # A reader needs write access too where it can have it: a crashed writer's journal has to be rolled back first.
    catalogue = Catalogue(folder, _connect(folder / CATALOGUE_NAME, writable=writable or os.access(folder, os.W_OK)))
    try:
        version = catalogue.schema_version
    except (sqlite3.DatabaseError, TypeError) as error:
        catalogue.close()
        raise _damaged(folder, error) from error
    if version not in range(FIRST_SCHEMA, SCHEMA_VERSION + 1):
        catalogue.close()
        raise GalleryError(
            f"the gallery {folder} has schema version {version}, this qpert reads up to {SCHEMA_VERSION}; "
            "use the qpert that made it, or index the images again",
            code="gallery-schema",
        )
    if writable:
        catalogue.upgrade()
    return catalogue


def damaged_block(path: Path, block: Block) -> GalleryError:
    return GalleryError(
        f"{path} was altered: rows {block.first} to {block.first + block.rows - 1} are not what was written; "
        f"{remedy(path.parent)}",
        code="gallery-rows-altered",
    )


def remedy(folder: Path) -> str:
    """What an error advises."""
    return (
        f"restore it from a copy, or run `qpert index … --out {folder} --repair`, which encodes the images concerned "
        "again"
    )


def _damaged(folder: Path, error: Exception) -> GalleryError:
    return GalleryError(
        f"{folder / CATALOGUE_NAME} is damaged ({error}); restore it from a copy, or index the "
        "images into a new folder",
        code="gallery-catalogue-damaged",
    )


def _connect(path: Path, *, writable: bool) -> sqlite3.Connection:
    """Rollback journal, forced to the disk at every commit: it needs no shared memory, and readers may be read-only."""
    mode = "rwc" if writable else "ro"
    connection = sqlite3.connect(
        f"{path.resolve().as_uri()}?mode={mode}",
        uri=True,
        timeout=WAIT_SECONDS,
        isolation_level=None,
        check_same_thread=False,
        factory=Connection,
    )
    try:
        connection.execute("PRAGMA synchronous = EXTRA")
    except BaseException:
        connection.close()
        raise
    return connection


def insert_images(connection: sqlite3.Connection, records: Iterable[ImageRecord]) -> None:
    marks = ", ".join("?" for _ in ImageRecord.__dataclass_fields__)
    connection.executemany(
        f"INSERT INTO image ({IMAGE_COLUMNS}) VALUES ({marks})",
        [tuple((vars(record) | {"path": path_to_column(record.path)}).values()) for record in records],
    )


def image_record(row: Sequence[Any]) -> ImageRecord:
    """What `insert_images` stored, by IMAGE_COLUMNS."""
    values = dict(zip(ImageRecord.__dataclass_fields__, row, strict=True))
    return ImageRecord(**(values | {"path": path_from_column(values["path"])}))


def insert_texts(connection: sqlite3.Connection, texts: Iterable[tuple[int, int, str]]) -> None:
    """(row, image row, text) each."""
    connection.executemany("INSERT INTO text VALUES (?, ?, ?)", texts)


def insert_shards(connection: sqlite3.Connection, shards: Iterable[Shard]) -> None:
    connection.executemany("INSERT INTO shard VALUES (?, ?, ?, ?)", [tuple(vars(shard).values()) for shard in shards])


def insert_blocks(connection: sqlite3.Connection, blocks: Iterable[Block]) -> None:
    connection.executemany("INSERT INTO block VALUES (?, ?, ?, ?)", [tuple(vars(block).values()) for block in blocks])
