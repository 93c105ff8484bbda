"""A store by its address."""

from __future__ import annotations

from qpert.runtime.errors import GalleryError
from qpert.runtime.stores.address import StoreAddress, parse_address
from qpert.runtime.stores.protocol import StoreSpec, VectorStore


def open_store(address: str | StoreAddress) -> VectorStore:
    """Connect to a store, which may have to be made (`index_store` does). A context manager.

    Raises:
        InputError: the address is none (`store-address`).
        UnavailableError: the driver is not installed (`missing-extra`), or the engine cannot be reached.
        GalleryError: something else is there.
    """
    found = parse_address(address) if isinstance(address, str) else address
    if found.kind == "postgresql":
        from qpert.runtime.stores.postgres import PostgresStore

        return PostgresStore(found)
    if found.kind == "qdrant":
        from qpert.runtime.stores.qdrant import QdrantStore

        return QdrantStore(found)
    if found.kind == "qdrant-edge":
        from qpert.runtime.stores.qdrant_edge import EdgeStore

        return EdgeStore(found)
    from qpert.runtime.stores.gallery import GalleryStore

    return GalleryStore(found)


def made_spec(store: VectorStore) -> StoreSpec:
    """What a store was made with. Raises GalleryError where it was not made."""
    spec = store.spec()
    if spec is None:
        raise GalleryError(
            f"there is no gallery of qpert at {store.name}; make one with `qpert index BUNDLE IMAGES --store …`",
            code="gallery-missing",
        )
    return spec
