"""qpert's own gallery as a vector store: a folder, without an engine.

`qpert index --out` writes the same folder, with features and captions besides; those a store does not handle: images
that are put in here have none. Scores are exact, of float32 vectors.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import TypeVar

import numpy as np

from qpert.runtime.errors import GalleryError
from qpert.runtime.filters.tree import Condition
from qpert.runtime.gallery.catalogue import Catalogue, create_catalogue, has_catalogue, open_catalogue
from qpert.runtime.gallery.fresh import FreshGallery
from qpert.runtime.gallery.lock import writer_lock
from qpert.runtime.gallery.reader import StoredGallery
from qpert.runtime.gallery.writer import NewImage, check_folder, open_writer
from qpert.runtime.retrieval.features import ImageFeatures
from qpert.runtime.retrieval.query_sets import QuerySets
from qpert.runtime.stores.address import StoreAddress
from qpert.runtime.stores.indexing import stored_of, vectors_of
from qpert.runtime.stores.protocol import Closing, Floats, Scored, StoredImage, StoreSpec, id_of, in_order, storable

T = TypeVar("T")
FEATURES_TABLE = "CREATE TABLE IF NOT EXISTS features_in (folder TEXT)"


class GalleryStore(Closing):
    """The gallery in a folder; made by `create`. Other processes may read and change it too, one writer at a time."""

    def __init__(self, address: StoreAddress) -> None:
        self.address, self.folder = address, address.folder
        self._fresh = FreshGallery(self.folder, StoredGallery.open_vectors)
        self._writing = threading.Lock()
        self._rows: tuple[StoredGallery, dict[int, int]] | None = None
        if not has_catalogue(self.folder):
            check_folder(self.folder)

    @property
    def name(self) -> str:
        return self.address.shown

    def spec(self) -> StoreSpec | None:
        if not has_catalogue(self.folder):
            return None
        with closing(open_catalogue(self.folder)) as catalogue:
            made = catalogue.spec
            own = str(self.folder.absolute()) if made.features == "stored" else None
            return StoreSpec(made, own or features_folder(catalogue))

    def create(self, spec: StoreSpec) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._writing, writer_lock(self.folder):
            made = has_catalogue(self.folder)
            opened = open_catalogue(self.folder, writable=True) if made else create_catalogue(self.folder, spec.gallery)
            with closing(opened) as catalogue, catalogue.transaction() as connection:
                connection.execute(FEATURES_TABLE)
                connection.execute("DELETE FROM features_in")
                connection.execute("INSERT INTO features_in VALUES (?)", (spec.features_in,))

    def upsert(self, images: Sequence[StoredImage]) -> None:
        """Raises GalleryError (`gallery-keeps-features`) where the gallery has features of its images, which a store
        does not pass on."""
        new = [new_image(storable(one)) for one in images]
        if not new:
            return
        with self._writing, open_writer(self.folder) as writer:
            made = writer.spec
            if made.features == "stored":
                raise GalleryError(
                    f"the gallery {self.name} keeps the features of its images, and a store is given vectors alone; "
                    "add images with `qpert index --out`, or make a gallery with --features recomputed",
                    code="gallery-keeps-features",
                )
            vectors = np.concatenate([one.embeddings for one in images]).reshape(-1, made.queries, made.width)
            sets = QuerySets(vectors, np.array([one.sets for one in images], np.int64))
            none = np.empty((len(images), 0, 0), np.float32)
            writer.append(new, ImageFeatures(sets, none), np.empty((0, made.width), np.float32))
            writer.remember()

    def relabel(self, images: Sequence[StoredImage]) -> None:
        if images:
            with self._writing, open_writer(self.folder) as writer:
                writer.set_metadata({one.name: one.metadata for one in images})

    def delete(self, names: Sequence[str]) -> int:
        with self._writing, open_writer(self.folder) as writer:
            there = [name for name in dict.fromkeys(names) if writer.catalogue.image(name) is not None]
            writer.delete(there)
        return len(there)

    def search(self, text_embed: Floats, count: int, where: Condition | None = None) -> list[Scored]:
        def find(gallery: StoredGallery) -> list[Scored]:
            if not len(gallery):
                return []
            found = gallery.nearest(text_embed[None], count, where=where)
            pairs = zip(found.rows[0], found.scores[0], strict=True)
            return in_order([Scored(stored_of(gallery, int(row)), float(score)) for row, score in pairs])

        return self._read(find)

    def count(self, where: Condition | None = None) -> int:
        return self._read(lambda gallery: len(gallery) if where is None else len(gallery.rows_where(where)))

    def get(self, ids: Sequence[int], *, vectors: bool = False) -> dict[int, StoredImage]:
        def read(gallery: StoredGallery) -> dict[int, StoredImage]:
            rows = self._rows_by_id(gallery)
            there = [one for one in map(int, ids) if one in rows]
            return {one: image_at(gallery, rows[one], vectors=vectors) for one in there}

        return self._read(read)

    def scan(self, *, vectors: bool = False) -> Iterator[StoredImage]:
        """Of the moment at which it begins."""
        gallery = self._read(lambda found: found)
        for _, row in sorted(self._rows_by_id(gallery).items()):
            yield image_at(gallery, row, vectors=vectors)

    def close(self) -> None:
        self._fresh.forget()
        self._rows = None

    def _read(self, read: Callable[[StoredGallery], T]) -> T:
        """What `read` gives of the gallery as it is now; once more where somebody compacts it meanwhile."""
        try:
            return read(self._fresh.current())
        except GalleryError as error:
            if error.code != "gallery-compacted":
                raise
            self._fresh.forget()
            return read(self._fresh.current())

    def _rows_by_id(self, gallery: StoredGallery) -> dict[int, int]:
        if self._rows is None or self._rows[0] is not gallery:
            self._rows = gallery, {id_of(name): row for row, name in enumerate(gallery.images)}
        return self._rows[1]

    def __str__(self) -> str:
        return self.name


def features_folder(catalogue: Catalogue) -> str | None:
    """What `create` has noted; galleries that `qpert index --out` has made have no such table."""
    table = "SELECT count(*) FROM sqlite_master WHERE name = 'features_in'"
    if not catalogue.connection.execute(table).fetchone()[0]:
        return None
    row = catalogue.connection.execute("SELECT folder FROM features_in").fetchone()
    return None if row is None else row[0]


def image_at(gallery: StoredGallery, row: int, *, vectors: bool) -> StoredImage:
    image = stored_of(gallery, row)
    if not vectors:
        return image
    return StoredImage(**{**vars(image), "vectors": np.array(vectors_of(gallery.sets_of([row]))[1])})


def new_image(image: StoredImage) -> NewImage:
    file = (image.name, image.path, image.bytes, image.mtime, image.sha256)
    return NewImage(*file, image.boxes, metadata=image.metadata)
