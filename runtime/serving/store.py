"""A vector store behind a running service, with the methods of `LiveGallery`."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from qpert.runtime.detection.source import BoxSource
from qpert.runtime.errors import GalleryError, InputError, QpertError
from qpert.runtime.files import write_atomically
from qpert.runtime.filters.tree import Condition
from qpert.runtime.gallery.entries import ImageEntry
from qpert.runtime.gallery.search import Searchable, TextGallery
from qpert.runtime.gallery.spec import GallerySpec
from qpert.runtime.retrieval.encoder import Encoder
from qpert.runtime.serving.gallery import (
    KEPT_FILE,
    SWEEP_SECONDS,
    AddRequest,
    Change,
    DeleteRequest,
    GalleryImage,
    Upload,
)
from qpert.runtime.stores.indexing import index_store
from qpert.runtime.stores.protocol import StoredImage, StoreSpec, VectorStore, id_of
from qpert.runtime.stores.searching import StoreGallery, boxes_of

LOOKED_AT = 100
"""Pictures whose metadata are looked at to name what filters can be about."""


class ServedStore:
    """Use `open`. The store is searched as it is at that moment; other processes may change it."""

    def __init__(
        self,
        store: VectorStore,
        encoder: Encoder,
        pictures: Path | None,
        features: Path | None,
        detector: BoxSource | None = None,
    ) -> None:
        self.store, self.encoder, self.detector = store, encoder, detector
        self.pictures = None if pictures is None else pictures.absolute()
        if store.spec() is None:
            store.create(StoreSpec(GallerySpec.of(encoder, "recomputed" if encoder.reranks else "none")))
        self._gallery = StoreGallery.open(store, encoder, features)

    @property
    def name(self) -> str:
        return self.store.name

    def searchable(self) -> Searchable:
        return self._gallery

    def captions(self, where: Condition | None = None) -> TextGallery:
        """A store has none."""
        return TextGallery((), np.empty((0, self._gallery.made.width), np.float32))

    def count(self) -> int:
        return self.store.count()

    def names(self, offset: int, limit: int) -> list[str]:
        """In the order of their ids."""
        return [one.name for one in islice(self.store.scan(), offset, offset + limit)]

    def fields(self) -> Sequence[str]:
        """Those of the first pictures: a store is not read through for that."""
        return sorted({key for one in islice(self.store.scan(), LOOKED_AT) for key in one.metadata})

    def image(self, name: str) -> GalleryImage | None:
        found = self._found(name)
        return None if found is None else GalleryImage(Path(found.path), boxes_of(found), (), found.metadata)

    def forget(self) -> None:
        """Nothing is kept that could be old."""

    def trouble(self) -> str | None:
        """Why it cannot be searched now, or None."""
        try:
            self.store.count()
        except QpertError as error:
            return str(error)
        return None

    def change(self, requests: Sequence[AddRequest | DeleteRequest]) -> list[Change | Exception]:
        """Carry out requests in order; what is returned as done is durable."""
        results: list[Change | Exception] = []
        for request in requests:
            try:
                results.append(self._delete(request) if isinstance(request, DeleteRequest) else self._add(request))
            except Exception as error:  # noqa: BLE001, handed to whoever waits for it
                results.append(error)
        return results

    def sweep(self) -> None:
        """Delete kept files that a crash has left; not young ones, which another process may be indexing."""
        if self.pictures is None or not self.pictures.is_dir():
            return
        oldest = time.time() - SWEEP_SECONDS
        left = {path for path in self.pictures.iterdir() if KEPT_FILE.fullmatch(path.name)}
        left = {path for path in left if path.stat().st_mtime < oldest}
        for path in left - {Path(one.path) for one in self.store.scan()} if left else ():
            path.unlink(missing_ok=True)

    def close(self) -> None:
        self.store.close()

    def _add(self, request: AddRequest) -> Change:
        if any(upload.captions for upload in request.uploads):
            raise InputError(
                "captions are given, and a vector store keeps none; leave them out, or serve a --gallery",
                code="store-captions",
            )
        before = [self._found(upload.name) for upload in request.uploads]
        entries = [self._kept(upload) for upload in request.uploads]
        try:
            done = index_store(self.store, self.encoder, entries, boxes=self.detector, replace=request.replace)
        except BaseException:
            known = {one.path for one in before if one is not None}
            self._remove([entry.path for entry in entries if str(entry.path) not in known])
            raise
        there = {str(entry.path) for entry in entries}
        self._remove([Path(one.path) for one in before if one is not None and one.path not in there])
        return Change(done.added, done.replaced + done.relabelled, done.unchanged, images=done.images)

    def _delete(self, request: DeleteRequest) -> Change:
        found = self._found(request.name)
        if found is None or not self.store.delete([request.name]):
            raise GalleryError(
                f"the store {self.name} has no image named {request.name!a}; nothing was deleted",
                code="gallery-image-unknown",
            )
        self._remove([Path(found.path)])
        return Change(deleted=1, images=self.store.count())

    def _found(self, name: str) -> StoredImage | None:
        return self.store.get([id_of(name)]).get(id_of(name))

    def _kept(self, upload: Upload) -> ImageEntry:
        """The picture in a file of its own, which no other name shares, on the disk before it is indexed."""
        if self.pictures is None:
            raise GalleryError(
                "this service keeps no pictures, and re-ranking reads them again; start it with --pictures DIR",
                code="serve-without-pictures",
            )
        self.pictures.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256(upload.name.encode() + b"\0" + upload.data).hexdigest()
        path = self.pictures / f"{digest}.picture"
        if not path.is_file():
            write_atomically(path, upload.data)
        return ImageEntry(upload.name, path, upload.boxes, metadata=upload.metadata)

    def _remove(self, paths: Sequence[Path]) -> None:
        for path in paths:
            if path.parent == self.pictures and KEPT_FILE.fullmatch(path.name):
                path.unlink(missing_ok=True)
