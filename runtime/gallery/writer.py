"""Changing a gallery: appending, deleting, repairing, compacting. One writer at a time.

Every change is one catalogue transaction that comes last: bytes first, forced to the disk, then the commit.
"""

from __future__ import annotations

import errno
import shutil
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qpert.runtime.bundle.folder import HashMemory
from qpert.runtime.errors import GalleryError, UnavailableError
from qpert.runtime.filters.metadata import Metadata
from qpert.runtime.gallery.catalogue import (
    CATALOGUE_NAME,
    Block,
    Catalogue,
    ImageRecord,
    Shard,
    blocks_digest,
    create_catalogue,
    damaged_block,
    has_catalogue,
    insert_blocks,
    insert_images,
    insert_shards,
    insert_texts,
    open_catalogue,
    text_column,
    vector_columns,
)
from qpert.runtime.gallery.columns import Column
from qpert.runtime.gallery.compaction import compact
from qpert.runtime.gallery.fields import insert_fields, replace_fields
from qpert.runtime.gallery.lock import LOCK_NAME, OWNER_NAME, writer_lock
from qpert.runtime.gallery.scan import encode_codes
from qpert.runtime.gallery.shards import FEATURE_FOLDER, check_shard, kept_arrays, write_shard
from qpert.runtime.gallery.spec import FeatureMode, GallerySpec
from qpert.runtime.retrieval.encoder import Encoder
from qpert.runtime.retrieval.features import ImageFeatures


@dataclass(frozen=True, eq=False)
class NewImage:
    """What the catalogue records about an image that is being added; see `ImageRecord`."""

    name: str
    path: str
    bytes: int
    mtime: int
    sha256: str
    boxes: str | None
    captions: tuple[str, ...] = ()
    metadata: Metadata = field(default_factory=dict)


class GalleryWriter:
    """The one writer of a gallery. Use `open_writer`."""

    def __init__(self, folder: Path, catalogue: Catalogue) -> None:
        self.folder = folder
        self.catalogue = catalogue
        self.spec = catalogue.spec
        self._memory = HashMemory.load()
        self._trusted = [column for column in self._columns if self._is_known(column)]

    def append(self, images: Sequence[NewImage], features: ImageFeatures, text_embeds: npt.NDArray[np.float32]) -> None:
        """Add images with their features, and their captions' embeddings [m, E] in order; durable on return.

        Images of the same names are replaced: their old rows are dead from then on.
        """
        row, text_row = self.catalogue.count("image"), self.catalogue.count("text")
        generation = self.catalogue.generation
        sets, first_set = features.query_sets, int(self.catalogue.sets().sum())
        codes = encode_codes(sets.vectors)
        arrays: dict[str, npt.NDArray[Any]] = {
            "query_embeds": sets.vectors,
            "codes": codes.codes,
            "code_stats": codes.stats,
        }
        blocks = [
            self._write(column, first_set, arrays[column.name], generation) for column in vector_columns(self.spec)
        ]
        if len(text_embeds):
            blocks.append(self._write(text_column(self.spec), text_row, text_embeds, generation))
        shard = None
        if self.spec.features == "stored":
            number = max((known.id for known in self.catalogue.shards()), default=0) + 1
            shard = write_shard(self.folder, number, generation, kept_arrays(features))
        with self.catalogue.transaction() as connection:
            connection.executemany("UPDATE image SET live = 0 WHERE name = ? AND live", [(i.name,) for i in images])
            insert_images(connection, _records(images, sets.counts.tolist(), row, shard))
            texts = [(row + place, text) for place, image in enumerate(images) for text in image.captions]
            insert_texts(connection, [(text_row + i, *text) for i, text in enumerate(texts)])
            insert_fields(connection, [(row + place, image.metadata) for place, image in enumerate(images)])
            insert_shards(connection, [] if shard is None else [shard])
            insert_blocks(connection, blocks)
        if shard is not None:
            self._memory.remember(self.folder / shard.file, shard.sha256)

    def set_metadata(self, metadata: Mapping[str, Metadata]) -> None:
        """Give images that are there other metadata, by name; all of them, or on an error none."""
        with self.catalogue.transaction() as connection:
            for name, values in metadata.items():
                record = self.catalogue.image(name)
                if record is not None:
                    replace_fields(connection, record.row, values)

    def delete(self, names: Sequence[str]) -> None:
        """Take images out; their space is given back by `compact`. Raises GalleryError, and does nothing, for unknown
        names."""
        unknown = [name for name in names if self.catalogue.image(name) is None]
        if unknown:
            raise GalleryError(
                f"the gallery {self.folder} has no image named {', '.join(map(repr, unknown[:5]))}; "
                "nothing was deleted",
                code="gallery-image-unknown",
            )
        with self.catalogue.transaction() as connection:
            connection.executemany("UPDATE image SET live = 0 WHERE name = ? AND live", [(name,) for name in names])

    def repair(self) -> list[str]:
        """Take out what is damaged, so that indexing encodes it again; returns the names of the images concerned."""
        shards = [shard for shard in self.catalogue.shards() if not self._is_whole(shard)]
        blocks = [found for column in vector_columns(self.spec) for found in self._damaged_blocks(column)]
        texts = list(self._damaged_blocks(text_column(self.spec)))
        owners = np.repeat(np.arange(self.catalogue.count("image")), self.catalogue.sets())  # the image of each set
        rows = {int(row) for block, _ in blocks for row in owners[block.first : block.first + block.rows]}
        rows |= {
            image
            for row, image, _ in self.catalogue.texts()
            if any(block.first <= row < block.first + block.rows for block, _ in texts)
        }
        bad = {shard.id for shard in shards}
        concerned = [record for record in self.catalogue.images() if record.row in rows or record.shard in bad]
        with self.catalogue.transaction() as connection:
            connection.executemany("UPDATE image SET live = 0 WHERE row = ?", [(record.row,) for record in concerned])
            connection.executemany("UPDATE image SET shard = NULL WHERE shard = ?", [(number,) for number in bad])
            connection.executemany("DELETE FROM shard WHERE id = ?", [(number,) for number in bad])
            connection.executemany(  # no live image has numbers there any more: the bytes only have to stay as they are
                "UPDATE block SET sha256 = ? WHERE name = ? AND first = ?",
                [(digest, block.name, block.first) for block, digest in (*blocks, *texts)],
            )
        self._remove_orphans()
        return [record.name for record in concerned]

    def compact(self) -> int:
        """Give back the space of dead images; returns how many. Rows are numbered anew, in the same order."""
        for column in self._columns:
            if not self._is_known(column) and (bad := next(self._damaged_blocks(column), None)):
                raise damaged_block(self._path(column), bad[0])
        dead = compact(self.catalogue)
        self._remove_orphans()
        return dead

    def remember(self) -> None:
        """Note the hashes of what this process has written, so that the first reader need not compute them.

        Only of files whose earlier rows were known to be right: nobody has looked at the others yet.
        """
        for column in self._trusted:
            path = self._path(column)
            if path.is_file():
                self._memory.remember(path, blocks_digest(self.catalogue.blocks(column.name)))
        self._memory.save()

    @property
    def _columns(self) -> tuple[Column, ...]:
        return (*vector_columns(self.spec), text_column(self.spec))

    def _path(self, column: Column) -> Path:
        return column.file(self.folder, self.catalogue.generation)

    def _is_known(self, column: Column) -> bool:
        blocks = self.catalogue.blocks(column.name)
        return not blocks or (
            self._path(column).is_file() and self._memory.knows(self._path(column), blocks_digest(blocks))
        )

    def _write(self, column: Column, row: int, array: npt.NDArray[Any], generation: int) -> Block:
        path = column.file(self.folder, generation)
        if row:
            column.check_length(path, row)
        return Block(column.name, row, len(array), column.append(path, row, array))

    def _damaged_blocks(self, column: Column) -> Iterator[tuple[Block, str]]:
        """Blocks that are not what was written, with what they hash to now."""
        for block in self.catalogue.blocks(column.name):
            column.check_length(self._path(column), block.first + block.rows)
            found = column.digest(self._path(column), block.first, block.rows)
            if found != block.sha256:
                yield block, found

    def _is_whole(self, shard: Shard) -> bool:
        try:
            check_shard(self.folder, shard, HashMemory({}))
        except GalleryError:
            return False
        return True

    def _remove_orphans(self) -> None:
        """Delete what a crash or a compaction left: files that the catalogue does not speak of."""
        known = {shard.file for shard in self.catalogue.shards()}
        for path in (self.folder / FEATURE_FOLDER).glob("*"):
            if f"{FEATURE_FOLDER}/{path.name}" not in known:
                path.unlink()
        for column in self._columns:
            for path in self.folder.glob(f"{column.name}.*"):
                if path != self._path(column):
                    path.unlink()


@contextmanager
def open_writer(
    folder: Path, encoder: Encoder | None = None, features: FeatureMode | None = None
) -> Iterator[GalleryWriter]:
    """The gallery's writer, for as long as the block lasts. With an encoder a new gallery is made where there is none,
    and an existing one has to be of that encoder and keep `features`; without one, it has to exist.

    Raises:
        GalleryError: another process writes; not a gallery; damaged; made with another bundle or other settings.
        UnavailableError: the disk is full.
    """
    with disk_errors(folder):
        if encoder is None and not has_catalogue(folder):
            raise GalleryError(
                f"{folder} is not a gallery; expected a folder made by `qpert index`", code="gallery-missing"
            )
        check_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with writer_lock(folder):
            catalogue = _opened(folder, encoder, features)
            try:
                writer = GalleryWriter(folder, catalogue)
                writer._remove_orphans()
                yield writer
            finally:
                catalogue.close()


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Says that a disk is full, or that the gallery may not be written; what was committed before is safe."""
    try:
        yield
    except (OSError, sqlite3.OperationalError) as error:
        if is_forbidden(error):
            raise UnavailableError(
                f"the gallery {folder} cannot be written ({error}); what was committed before is safe: ask its owner, "
                "or choose another --out",
                code="gallery-read-only",
            ) from error
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not full and "disk is full" not in str(error):
            raise
        place = next(path for path in (folder, *folder.resolve().parents) if path.exists())
        raise UnavailableError(
            f"no space left for the gallery {folder} ({shutil.disk_usage(place).free / 1e6:.0f} MB free); nothing that "
            "was reported as done is lost: free some space and run the same command again, or use "
            "--features recomputed",
            code="gallery-disk-full",
        ) from error


def is_forbidden(error: OSError | sqlite3.OperationalError) -> bool:
    """Whether this process may not write there, or nobody may."""
    if isinstance(error, OSError):
        return error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
    return any(words in str(error) for words in ("readonly database", "unable to open database"))


def check_folder(folder: Path) -> None:
    """Raises GalleryError for what can neither be a gallery nor become one."""
    if folder.exists() and not folder.is_dir():
        raise GalleryError(f"{folder} is a file; expected a folder for the gallery", code="gallery-path")
    if not folder.is_dir() or has_catalogue(folder):
        return
    ours = (CATALOGUE_NAME, f"{CATALOGUE_NAME}-journal", LOCK_NAME, f"{LOCK_NAME}-journal", OWNER_NAME)
    strangers = sorted(path.name for path in folder.iterdir() if path.name not in ours)
    if strangers:
        raise GalleryError(
            f"{folder} exists and is not a gallery (it holds {', '.join(strangers[:3])}); choose another --out",
            code="gallery-path",
        )


def _opened(folder: Path, encoder: Encoder | None, features: FeatureMode | None) -> Catalogue:
    """The catalogue, new or found to be the encoder's."""
    if encoder is not None and not has_catalogue(folder):
        return create_catalogue(folder, GallerySpec.of(encoder, features))
    catalogue = open_catalogue(folder, writable=True)
    try:
        if encoder is not None:
            _check_spec(catalogue, encoder, features)
    except BaseException:
        catalogue.close()
        raise
    return catalogue


def _check_spec(catalogue: Catalogue, encoder: Encoder, features: FeatureMode | None) -> None:
    made = catalogue.spec
    made.require(encoder, catalogue.folder)
    if features is not None and made.features != features:
        raise GalleryError(
            f"the gallery {catalogue.folder} was made with {made.features} features, now {features} are asked "
            f"for; pass --features {made.features}, or choose another --out",
            code="gallery-feature-mode",
        )


def _records(images: Sequence[NewImage], sets: Sequence[int], first: int, shard: Shard | None) -> Iterator[ImageRecord]:
    number = None if shard is None else shard.id
    for place, (i, count) in enumerate(zip(images, sets, strict=True)):
        slot = None if shard is None else place
        file = (i.name, i.path, i.bytes, i.mtime, i.sha256, i.boxes)
        yield ImageRecord(first + place, *file, number, slot, sets=count)
