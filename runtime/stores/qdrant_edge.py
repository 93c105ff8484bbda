"""Qdrant within the process (`qdrant-edge-py`): a shard in a folder, with the points of `qdrant_points`.

One process at a time has it open, for reading too. Every change is flushed to the disk before it is answered.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from qpert.runtime.errors import GalleryError, UnavailableError
from qpert.runtime.filters.qdrant import Filter
from qpert.runtime.filters.tree import Condition
from qpert.runtime.gallery.lock import writer_lock
from qpert.runtime.stores.address import StoreAddress
from qpert.runtime.stores.extras import load
from qpert.runtime.stores.protocol import Closing, Floats, Scored, StoredImage, StoreSpec, id_of, in_order, storable
from qpert.runtime.stores.qdrant_points import (
    POINTS_AT_ONCE,
    SPEC_ID,
    SPEC_KEY,
    VECTOR,
    image_of,
    images_filter,
    payload_of,
    portions,
)

SHARD = "shard"


class EdgeStore(Closing):
    """The shard in a folder; made by `create`."""

    def __init__(self, address: StoreAddress) -> None:
        self.edge = load("qdrant_edge", "a store in an embedded Qdrant", "qdrant")
        self.address, self._lock, self._stack = address, threading.RLock(), ExitStack()
        self.shard: Any = None
        folder = address.folder
        if folder.exists() and not (folder.is_dir() and (not any(folder.iterdir()) or (folder / SHARD).is_dir())):
            raise GalleryError(
                f"{folder} is there and no store of qdrant-edge; choose another folder", code="store-foreign"
            )
        if (folder / SHARD).is_dir():
            self._hold()
            try:
                with self._translated():
                    self.shard = self.edge.EdgeShard.load(str(folder / SHARD))
            except BaseException:
                self._stack.close()
                raise

    @property
    def name(self) -> str:
        return self.address.shown

    def spec(self) -> StoreSpec | None:
        if self.shard is None:
            return None
        with self._translated():
            found = self.shard.retrieve([SPEC_ID], with_payload=True, with_vector=False)
        return StoreSpec.from_json((found[0].payload or {}).get(SPEC_KEY, ""), self) if found else None

    def create(self, spec: StoreSpec) -> None:
        edge = self.edge
        if self.shard is None:
            self.address.folder.mkdir(parents=True, exist_ok=True)
            self._hold()
            params = edge.EdgeVectorParams(
                size=spec.gallery.width,
                distance=edge.Distance.Dot,
                multivector_config=edge.MultiVectorConfig(edge.MultiVectorComparator.MaxSim),
                datatype=edge.VectorStorageDatatype.Float16,
                hnsw_config=edge.HnswIndexConfig(m=0, ef_construct=100, full_scan_threshold=10),
            )
            with self._translated():
                self.shard = edge.EdgeShard.create(
                    str(self.address.folder / SHARD), edge.EdgeConfig(vectors={VECTOR: params})
                )
        self._change(edge.UpdateOperation.upsert_points([edge.Point(SPEC_ID, {}, {SPEC_KEY: spec.to_json()})]))

    def upsert(self, images: Sequence[StoredImage]) -> None:
        for part in portions([storable(image) for image in images]):
            points = [self._point(image) for image in part]
            self._change(self.edge.UpdateOperation.upsert_points(points))

    def relabel(self, images: Sequence[StoredImage]) -> None:
        self._change(*(self.edge.UpdateOperation.overwrite_payload([one.id], payload_of(one)) for one in images))

    def delete(self, names: Sequence[str]) -> int:
        there = list(self.get([id_of(name) for name in names]))
        if there:
            self._change(self.edge.UpdateOperation.delete_points(there))
        return len(there)

    def search(self, text_embed: Floats, count: int, where: Condition | None = None) -> list[Scored]:
        edge = self.edge
        request = edge.QueryRequest(
            limit=count,
            query=edge.Query.Nearest([text_embed.tolist()], using=VECTOR),
            filter=self._filter(images_filter(where)),
            params=edge.SearchParams(exact=True),
            with_payload=True,
        )
        with self._translated():
            found = self.shard.query(request)
        return in_order([Scored(image_of(point.payload), float(point.score)) for point in found])

    def count(self, where: Condition | None = None) -> int:
        with self._translated():
            return int(self.shard.count(self.edge.CountRequest(exact=True, filter=self._filter(images_filter(where)))))

    def get(self, ids: Sequence[int], *, vectors: bool = False) -> dict[int, StoredImage]:
        with self._translated():
            points = self.shard.retrieve([int(one) for one in ids], with_payload=True, with_vector=vectors)
        return {point.id: image_of(point.payload, point.vector) for point in points}

    def scan(self, *, vectors: bool = False) -> Iterator[StoredImage]:
        offset: Any = None
        while True:
            request = self.edge.ScrollRequest(
                offset=offset,
                limit=POINTS_AT_ONCE,
                filter=self._filter(images_filter(None)),
                with_payload=True,
                with_vector=vectors,
            )
            with self._translated():
                points, offset = self.shard.scroll(request)
            for point in points:
                yield image_of(point.payload, point.vector)
            if offset is None:
                return

    def close(self) -> None:
        with self._lock:
            if self.shard is not None:
                self.shard.close()
                self.shard = None
            self._stack.close()

    def _hold(self) -> None:
        try:
            self._stack.enter_context(writer_lock(Path(self.address.location)))
        except GalleryError as error:
            raise UnavailableError(
                f"the store {self.name} is open in another process; an embedded Qdrant can be used by one at a time: "
                "close it there, or run a Qdrant server",
                code="store-unreachable",
            ) from error

    def _change(self, *operations: Any) -> None:
        with self._lock, self._translated():
            for operation in operations:
                self.shard.update(operation)
            self.shard.flush()

    def _point(self, image: StoredImage) -> Any:
        return self.edge.Point(image.id, {VECTOR: image.embeddings.tolist()}, payload_of(image))

    def _filter(self, found: Filter) -> Any:
        """The JSON of a filter as this library's objects."""
        edge = self.edge
        if "has_id" in found:
            return edge.HasIdCondition(set(found["has_id"]))
        if "is_empty" in found:
            return edge.IsEmptyCondition(found["is_empty"]["key"])
        if "match" in found:
            value = found["match"]["value"]  # qdrant-edge 0.9 takes Python's True for 1, and NumPy's for true
            value = np.bool_(value) if isinstance(value, bool) else value
            return edge.FieldCondition(found["key"], match=edge.MatchValue(value))
        if "range" in found:
            bounds = {name: float(value) for name, value in found["range"].items()}
            return edge.FieldCondition(found["key"], range=edge.RangeFloat(**bounds))
        return edge.Filter(**{word: [self._filter(part) for part in parts] for word, parts in found.items()})

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Errors of the library become ours."""
        try:
            yield
        except Exception as error:
            if isinstance(error, TypeError | AttributeError | AssertionError):  # ours: a bug keeps its traceback
                raise
            raise GalleryError(
                f"the store {self.name} failed ({str(error)[:300]}); if its disk is sound, index the images into a new "
                "one",
                code="store-failed",
            ) from error

    def __str__(self) -> str:
        return self.name
