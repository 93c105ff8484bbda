"""A Qdrant server, by URL: a collection with MAX_SIM multivectors in float16, searched exactly.

Scores of float16 vectors are off by up to 2⁻¹¹: each number of a vector is rounded by that share of itself, and vectors
have unit length.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from qpert.runtime.errors import GalleryError, UnavailableError
from qpert.runtime.filters.tree import Condition
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

KEY_VARIABLE = "QDRANT_API_KEY"
SECONDS = 60
FORBIDDEN = (401, 403)


class QdrantStore(Closing):
    """A collection of a server. `client`: one that is open already, such as Qdrant's local mode."""

    def __init__(self, address: StoreAddress, client: Any = None) -> None:
        module = load("qdrant_client", "a store in Qdrant", "qdrant")
        self.address, self.models = address, module.models
        self._errors = load("qdrant_client.http.exceptions", "a store in Qdrant", "qdrant")
        self._key = os.environ.get(KEY_VARIABLE) or None
        if client is None:
            with warnings.catch_warnings():  # of a key over plain HTTP: the address says whether that is wanted
                warnings.simplefilter("ignore")
                client = module.QdrantClient(
                    url=address.location, api_key=self._key, timeout=SECONDS, check_compatibility=False
                )
        self.client = client
        self.spec()

    @property
    def name(self) -> str:
        return self.address.shown

    def spec(self) -> StoreSpec | None:
        with self._translated():
            if not self.client.collection_exists(self.address.name):
                return None
            found = self.client.retrieve(self.address.name, [SPEC_ID], with_payload=True)
        payload = found[0].payload or {} if found else {}
        if not found and self._has_points():
            raise GalleryError(
                f"the collection {self.name} holds points of another program; choose another collection",
                code="store-foreign",
            )
        return StoreSpec.from_json(payload.get(SPEC_KEY, ""), self) if found else None

    def create(self, spec: StoreSpec) -> None:
        models = self.models
        with self._translated():
            if not self.client.collection_exists(self.address.name):
                vector = models.VectorParams(
                    size=spec.gallery.width,
                    distance=models.Distance.DOT,
                    multivector_config=models.MultiVectorConfig(comparator=models.MultiVectorComparator.MAX_SIM),
                    hnsw_config=models.HnswConfigDiff(m=0),  # no graph: searches are exact
                    datatype=models.Datatype.FLOAT16,
                )
                self.client.create_collection(self.address.name, vectors_config={VECTOR: vector})
            self._write([models.PointStruct(id=SPEC_ID, vector={}, payload={SPEC_KEY: spec.to_json()})])

    def upsert(self, images: Sequence[StoredImage]) -> None:
        with self._translated():
            for part in portions([storable(image) for image in images]):
                self._write([self._point(image) for image in part])

    def relabel(self, images: Sequence[StoredImage]) -> None:
        with self._translated():
            for image in images:
                self.client.overwrite_payload(self.address.name, payload_of(image), points=[image.id], wait=True)

    def delete(self, names: Sequence[str]) -> int:
        there = list(self.get([id_of(name) for name in names]))
        if there:
            with self._translated():
                self.client.delete(self.address.name, self.models.PointIdsList(points=there), wait=True)
        return len(there)

    def search(self, text_embed: Floats, count: int, where: Condition | None = None) -> list[Scored]:
        with self._translated():
            found = self.client.query_points(
                self.address.name,
                query=[text_embed.tolist()],
                using=VECTOR,
                limit=count,
                query_filter=self._filter(where),
                search_params=self.models.SearchParams(exact=True),
                with_payload=True,
            )
        return in_order([Scored(image_of(point.payload), float(point.score)) for point in found.points])

    def count(self, where: Condition | None = None) -> int:
        with self._translated():
            return int(self.client.count(self.address.name, count_filter=self._filter(where), exact=True).count)

    def get(self, ids: Sequence[int], *, vectors: bool = False) -> dict[int, StoredImage]:
        found: dict[int, StoredImage] = {}
        for start in range(0, len(ids), POINTS_AT_ONCE):
            part = [int(one) for one in ids[start : start + POINTS_AT_ONCE]]
            with self._translated():
                points = self.client.retrieve(self.address.name, part, with_payload=True, with_vectors=vectors)
            found |= {point.id: image_of(point.payload, point.vector) for point in points}
        return found

    def scan(self, *, vectors: bool = False) -> Iterator[StoredImage]:
        offset: Any = None
        while True:
            with self._translated():
                points, offset = self.client.scroll(
                    self.address.name,
                    scroll_filter=self._filter(None),
                    limit=POINTS_AT_ONCE,
                    offset=offset,
                    with_vectors=vectors,
                )
            for point in points:
                yield image_of(point.payload, point.vector)
            if offset is None:
                return

    def close(self) -> None:
        self.client.close()

    def _point(self, image: StoredImage) -> Any:
        vector = {VECTOR: image.embeddings.tolist()}
        return self.models.PointStruct(id=image.id, vector=vector, payload=payload_of(image))

    def _write(self, points: list[Any]) -> None:
        """Applied, and in the server's log, before this returns."""
        self.client.upsert(self.address.name, points, wait=True)

    def _filter(self, where: Condition | None) -> Any:
        return self.models.Filter.model_validate(images_filter(where))

    def _has_points(self) -> bool:
        with self._translated():
            return bool(self.client.count(self.address.name, exact=True).count)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Errors of the client become ours."""
        try:
            yield
        except self._errors.UnexpectedResponse as error:
            status, said = error.status_code, self._hidden((error.content or b"").decode("utf-8", "replace"))
            hint = f"check {KEY_VARIABLE}" if status in FORBIDDEN else "its log says more"
            raise GalleryError(
                f"Qdrant at {self.name} answered {status} ({said[:300]}); {hint}", code="store-failed"
            ) from None
        except (self._errors.ResponseHandlingException, OSError) as error:
            raise UnavailableError(
                f"Qdrant at {self.name} does not answer ({self._hidden(str(error))[:300]}); check that it runs, and "
                "the address",
                code="store-unreachable",
            ) from None

    def _hidden(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text

    def __str__(self) -> str:
        return self.name
