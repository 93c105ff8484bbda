"""What a vector engine has to do to hold images, and what it stores of each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from types import TracebackType
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from qpert.runtime.errors import GalleryError, InputError
from qpert.runtime.filters.metadata import Metadata, metadata_json
from qpert.runtime.filters.tree import Condition
from qpert.runtime.gallery.spec import GallerySpec

Floats = npt.NDArray[np.float32]
STORE_SCHEMA = 1


@dataclass(frozen=True)
class StoreSpec:
    """What a store was made with: the bundle, the settings and the sizes of `gallery`; and the folder of the gallery
    that has its images' features, where there is one."""

    gallery: GallerySpec
    features_in: str | None = None

    def to_json(self) -> str:
        return json.dumps(
            {"schema_version": STORE_SCHEMA, "spec": asdict(self.gallery), "features_in": self.features_in}
        )

    @classmethod
    def from_json(cls, text: str, store: object) -> StoreSpec:
        """Raises GalleryError for what another program, or a newer qpert, has written there."""
        try:
            values = json.loads(text)
            version = values["schema_version"]
            if version == STORE_SCHEMA:
                return cls(GallerySpec(**values["spec"]), values["features_in"])
        except (ValueError, KeyError, TypeError) as error:
            raise GalleryError(
                f"the store {store} holds something else than a gallery of qpert; choose another place",
                code="store-foreign",
            ) from error
        raise GalleryError(
            f"the store {store} has schema version {version}, this qpert reads up to {STORE_SCHEMA}; use the qpert "
            "that made it, or index the images into another store",
            code="store-schema",
        )


@dataclass(frozen=True, eq=False)
class StoredImage:
    """One image. `path`, `bytes`, `mtime` (nanoseconds) and `sha256` are its file's when it was indexed; `boxes` as in
    `gallery.box_json`. `sets`: how many query sets it has, side by side in `vectors` float32 [sets·Q, E], which are
    None where nobody asked for them."""

    name: str
    path: str
    bytes: int
    mtime: int
    sha256: str
    boxes: str | None
    metadata: Metadata
    sets: int = 1
    vectors: Floats | None = None

    @property
    def id(self) -> int:
        return id_of(self.name)

    @property
    def embeddings(self) -> Floats:
        """`vectors` of an image that was read, or is to be written, with them. Raises ValueError without."""
        if self.vectors is None:
            raise ValueError(f"the vectors of {self.name} were not read; ask the store for them")
        return self.vectors

    def facts(self) -> dict[str, Any]:
        """All but the vectors, for JSON."""
        return {key: value for key, value in vars(self).items() if key != "vectors"} | {"metadata": dict(self.metadata)}

    @classmethod
    def of(cls, facts: Mapping[str, Any], vectors: Floats | None = None) -> StoredImage:
        return cls(**facts, vectors=vectors)

    def relabelled(self, metadata: Metadata) -> StoredImage:
        return replace(self, metadata=metadata)

    def same_as(self, other: StoredImage) -> bool:
        """Whether the file, the boxes and the metadata are the same; where it lies does not count."""
        mine, theirs = [(i.bytes, i.sha256, i.boxes, metadata_json(i.metadata)) for i in (self, other)]
        return mine == theirs


@dataclass(frozen=True, eq=False)
class Scored:
    """An image that a search found, and its ITC score."""

    image: StoredImage
    score: float


def id_of(name: str) -> int:
    """What an image is called in engines that want a number: 63 bits of its name's SHA-256, never 0. Rows of a
    `StoreGallery` are these."""
    return (int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1) or 1


class VectorStore(Protocol):
    """An engine that is open. A context manager. Methods may be called by several threads.

    Errors of the engine are raised as UnavailableError (it cannot be reached: `store-unreachable`) or GalleryError
    (`store-failed`), without passwords.
    """

    @property
    def name(self) -> str:
        """The address for people."""
        ...

    def spec(self) -> StoreSpec | None:
        """What it was made with; None where nothing was made yet."""
        ...

    def create(self, spec: StoreSpec) -> None:
        """Make what the engine needs, and record `spec`; where a store is there already, record `spec` alone."""
        ...

    def upsert(self, images: Sequence[StoredImage]) -> None:
        """Add images with their vectors, in place of those of the same names; all are durable on return."""
        ...

    def relabel(self, images: Sequence[StoredImage]) -> None:
        """Take over the metadata of images that are there; their vectors stay."""
        ...

    def delete(self, names: Sequence[str]) -> int:
        """Take images out; how many were there. Durable on return."""
        ...

    def search(self, text_embed: Floats, count: int, where: Condition | None = None) -> list[Scored]:
        """The best `count` images of which `where` is true, by the maximum over their vectors of the product with
        `text_embed` float32 [E], best first, equal ones by `id`. Exact: every such image is looked at."""
        ...

    def count(self, where: Condition | None = None) -> int:
        """How many images there are of which `where` is true."""
        ...

    def get(self, ids: Sequence[int], *, vectors: bool = False) -> dict[int, StoredImage]:
        """Those images that are there, by id."""
        ...

    def scan(self, *, vectors: bool = False) -> Iterator[StoredImage]:
        """All images, in the order of their ids."""
        ...

    def close(self) -> None: ...

    def __enter__(self) -> VectorStore: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


S = TypeVar("S", bound="Closing")


class Closing:
    """`with` for stores."""

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self: S) -> S:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def in_order(found: Sequence[Scored]) -> list[Scored]:
    """Best first, equal ones by id."""
    return sorted(found, key=lambda one: (-one.score, one.image.id))


def storable(image: StoredImage) -> StoredImage:
    """Raises InputError where a name or path is no text: engines keep Unicode."""
    for text in (image.name, image.path):
        if not text.isprintable() and any(letter == "\0" or 0xD800 <= ord(letter) < 0xE000 for letter in text):
            raise InputError(
                f"the image {image.name!a} lies at {image.path!a}, which is no text in UTF-8, and a store keeps text "
                "alone; rename it, or use a gallery (--out)",
                code="store-name",
            )
    return image
