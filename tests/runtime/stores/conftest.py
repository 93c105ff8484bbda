"""The engines, each real: the gallery, PostgreSQL with pgvector, embedded Qdrant, and Qdrant's client in local mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from running_postgres import Postgres, is_available, running_postgres

from qpert.runtime.stores.address import parse_address
from qpert.runtime.stores.protocol import VectorStore

ENGINES = ("gallery", "postgresql", "qdrant-edge", "qdrant-local")


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    pytest.importorskip("psycopg", reason="needs the extra [postgres]")
    if not is_available():
        pytest.skip("no PostgreSQL with pgvector here; `make postgres-env` gets one")
    with running_postgres() as server:
        yield server


@pytest.fixture(scope="session")
def open_engine(request: pytest.FixtureRequest) -> Callable[[str, Path, str], VectorStore]:
    """`open_engine(engine, folder, name)`: a store of that name, the same one when it is asked for again. No Qdrant
    server can be had from a package registry: its client runs in local mode, with the calls that a server gets."""

    def open_one(engine: str, folder: Path, name: str) -> VectorStore:
        if engine == "gallery":
            from qpert.runtime.stores.gallery import GalleryStore

            return GalleryStore(parse_address(str(folder / name)))
        if engine == "postgresql":
            from qpert.runtime.stores.postgres import PostgresStore

            server = request.getfixturevalue("postgres")
            return PostgresStore(parse_address(f"{server.url}?gallery={name}"))
        if engine == "qdrant-edge":
            pytest.importorskip("qdrant_edge", reason="needs the extra [qdrant]")
            from qpert.runtime.stores.qdrant_edge import EdgeStore

            return EdgeStore(parse_address(f"qdrant-edge:{folder / name}"))
        qdrant_client = pytest.importorskip("qdrant_client", reason="needs the extra [qdrant]")
        from qpert.runtime.stores.qdrant import QdrantStore

        client = qdrant_client.QdrantClient(path=str(folder / name))
        return QdrantStore(parse_address(f"qdrant://local/{name}"), client)

    return open_one
