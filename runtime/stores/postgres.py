"""PostgreSQL with pgvector: a row for each image, and a row for each of its query vectors.

    <schema>.store      one row: what the store was made with
    <schema>.image      id, facts jsonb, metadata jsonb
    <schema>.embedding  image, place (0 to sets·Q − 1), embed vector(E), float32

The schema is `qpert`, or what the address's `?gallery=` says. Images may have different numbers of vectors; the score
is the maximum over an image's rows. No approximate index is made or used: every image's score is computed.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from qpert.runtime.errors import GalleryError, UnavailableError
from qpert.runtime.filters.postgres import where_postgres
from qpert.runtime.filters.tree import Condition
from qpert.runtime.stores.address import StoreAddress
from qpert.runtime.stores.extras import load
from qpert.runtime.stores.protocol import Closing, Floats, Scored, StoredImage, StoreSpec, id_of, storable

if TYPE_CHECKING:
    from psycopg import Connection
    from psycopg.sql import Composed

AT_ONCE = 500
"""Images read at once by `scan`."""
CONNECT_SECONDS = 15
TABLES = (
    "CREATE SCHEMA IF NOT EXISTS {schema}",
    "CREATE TABLE IF NOT EXISTS {schema}.store (one boolean PRIMARY KEY DEFAULT true CHECK (one), spec text NOT NULL)",
    "CREATE TABLE IF NOT EXISTS {schema}.image (id bigint PRIMARY KEY, facts jsonb NOT NULL, metadata jsonb NOT NULL)",
    "CREATE TABLE IF NOT EXISTS {schema}.embedding (image bigint NOT NULL REFERENCES {schema}.image ON DELETE CASCADE, "
    "place integer NOT NULL, embed vector({width}) NOT NULL, PRIMARY KEY (image, place))",
)
UPSERT = (
    "INSERT INTO {schema}.image VALUES (%s, %s::jsonb, %s::jsonb) "
    "ON CONFLICT (id) DO UPDATE SET facts = excluded.facts, metadata = excluded.metadata"
)
EXTENSION_SCHEMA = "SELECT nspname FROM pg_extension JOIN pg_namespace ON pg_namespace.oid = extnamespace \
WHERE extname = 'vector'"
SEARCH = """
SELECT image.id, image.facts, image.metadata, best.score FROM (
    SELECT image, max(-(embed <#> %s::vector)) AS score FROM {schema}.embedding {where}
    GROUP BY image ORDER BY score DESC, image LIMIT %s) AS best
JOIN {schema}.image ON image.id = best.image ORDER BY best.score DESC, image.id
"""
"""`<#>` is the negative inner product."""


class PostgresStore(Closing):
    """One connection, used by one thread at a time; opened again at the next call after it broke."""

    def __init__(self, address: StoreAddress) -> None:
        self.address, self._lock = address, threading.RLock()
        self._psycopg = load("psycopg", "a store in PostgreSQL", "postgres")
        self._connected: Connection[Any] | None = None
        with self._connection():
            pass

    @property
    def name(self) -> str:
        return self.address.shown

    def spec(self) -> StoreSpec | None:
        with self._connection() as connection:
            there = connection.execute("SELECT to_regclass(%s)", (f"{self.address.name}.store",)).fetchone()
            if there is None or there[0] is None:
                return None
            row = connection.execute(self._sql("SELECT spec FROM {schema}.store")).fetchone()
        return None if row is None else StoreSpec.from_json(row[0], self)

    def create(self, spec: StoreSpec) -> None:
        with self._connection() as connection, connection.transaction():
            if connection.execute(EXTENSION_SCHEMA).fetchone() is None:
                self._make_extension(connection)
            for statement in TABLES:
                connection.execute(self._sql(statement, width=self._literal(spec.gallery.width)))
            connection.execute(
                self._sql("INSERT INTO {schema}.store (spec) VALUES (%s) ON CONFLICT (one) DO UPDATE SET spec = %s"),
                (spec.to_json(), spec.to_json()),
            )

    def upsert(self, images: Sequence[StoredImage]) -> None:
        images = sorted(map(storable, images), key=lambda image: image.id)  # two writers wait, and never for each other
        with self._connection() as connection, connection.transaction(), connection.cursor() as cursor:
            cursor.executemany(self._sql(UPSERT), [(image.id, *documents(image)) for image in images])
            ids = [image.id for image in images]
            cursor.execute(self._sql("DELETE FROM {schema}.embedding WHERE image = ANY(%s)"), (ids,))
            with cursor.copy(self._sql("COPY {schema}.embedding (image, place, embed) FROM STDIN")) as copy:
                for image in images:
                    for place, vector in enumerate(image.embeddings):
                        copy.write_row((image.id, place, json.dumps(vector.tolist())))

    def relabel(self, images: Sequence[StoredImage]) -> None:
        with self._connection() as connection, connection.transaction(), connection.cursor() as cursor:
            cursor.executemany(
                self._sql("UPDATE {schema}.image SET metadata = %s::jsonb WHERE id = %s"),
                [(documents(image)[1], image.id) for image in sorted(images, key=lambda image: image.id)],
            )

    def delete(self, names: Sequence[str]) -> int:
        ids = [id_of(name) for name in names]
        with self._connection() as connection, connection.transaction():
            return connection.execute(self._sql("DELETE FROM {schema}.image WHERE id = ANY(%s)"), (ids,)).rowcount

    def search(self, text_embed: Floats, count: int, where: Condition | None = None) -> list[Scored]:
        chosen, values = self._where("WHERE image IN (SELECT id FROM {schema}.image WHERE {condition})", where)
        query = self._sql(SEARCH, where=chosen)
        with self._connection() as connection:
            rows = connection.execute(query, [json.dumps(text_embed.tolist()), *values, count]).fetchall()
        return [Scored(image_of(facts, metadata), float(np.float32(score))) for _, facts, metadata, score in rows]

    def count(self, where: Condition | None = None) -> int:
        chosen, values = self._where("WHERE {condition}", where)
        with self._connection() as connection:
            row = connection.execute(self._sql("SELECT count(*) FROM {schema}.image {where}", where=chosen), values)
            return int(row.fetchone()[0])  # type: ignore[index]

    def get(self, ids: Sequence[int], *, vectors: bool = False) -> dict[int, StoredImage]:
        with self._connection() as connection:
            query = self._sql("SELECT id, facts, metadata FROM {schema}.image WHERE id = ANY(%s) ORDER BY id")
            rows = connection.execute(query, (list(map(int, ids)),)).fetchall()
            own = self._vectors(connection, [row[0] for row in rows]) if vectors else {}
        return {row: image_of(facts, metadata, own.get(row)) for row, facts, metadata in rows}

    def scan(self, *, vectors: bool = False) -> Iterator[StoredImage]:
        last, query = 0, self._sql("SELECT id FROM {schema}.image WHERE id > %s ORDER BY id LIMIT %s")
        while True:
            with self._connection() as connection:
                ids = [row[0] for row in connection.execute(query, (last, AT_ONCE)).fetchall()]
            if not ids:
                return
            yield from self.get(ids, vectors=vectors).values()
            last = ids[-1]

    def close(self) -> None:
        if self._connected is not None:
            self._connected.close()

    def _vectors(self, connection: Connection[Any], ids: Sequence[int]) -> dict[int, Floats]:
        chosen = "FROM {schema}.embedding WHERE image = ANY(%s)"
        query = self._sql(f"SELECT image, embed::text {chosen} ORDER BY image, place")
        found: dict[int, list[Any]] = {}
        for image, text in connection.execute(query, (list(ids),)):
            found.setdefault(image, []).append(json.loads(text))
        return {image: np.array(rows, np.float32) for image, rows in found.items()}

    def _where(self, text: str, where: Condition | None) -> tuple[Composed, list[Any]]:
        if where is None:
            return self._sql(""), []
        condition, values = where_postgres(where)
        return self._sql(text, condition=self._psycopg.sql.SQL(condition)), values

    def _sql(self, text: str, **parts: Any) -> Composed:
        schema = self._psycopg.sql.Identifier(self.address.name)
        return self._psycopg.sql.SQL(text).format(schema=schema, **parts)  # type: ignore[no-any-return]

    def _literal(self, value: int) -> Any:
        return self._psycopg.sql.Literal(value)

    def _make_extension(self, connection: Connection[Any]) -> None:
        try:
            connection.execute("CREATE EXTENSION IF NOT EXISTS vector WITH SCHEMA public")
        except self._psycopg.Error as error:
            raise GalleryError(
                f"the database {self.address} has no pgvector ({first_line(error)}); install it on the server, and let "
                "its administrator run CREATE EXTENSION vector in this database",
                code="store-without-pgvector",
            ) from error

    @contextmanager
    def _connection(self) -> Iterator[Connection[Any]]:
        """The connection, for this thread alone; errors of the driver become ours."""
        psycopg = self._psycopg
        with self._lock:
            try:
                if self._connected is None or self._connected.closed:
                    self._connected = self._connect()
                yield self._connected
            except (psycopg.OperationalError, psycopg.InterfaceError) as error:
                self.close()
                raise UnavailableError(
                    f"the database {self.address} cannot be used ({self._shown(error)}); check that it runs, and the "
                    "address, name and password",
                    code="store-unreachable",
                ) from None
            except psycopg.Error as error:
                raise GalleryError(
                    f"the database {self.address} refused ({self._shown(error)}); check the rights of its user, and "
                    "that nothing else has changed the tables",
                    code="store-failed",
                ) from None

    def _connect(self) -> Connection[Any]:
        connection = self._psycopg.connect(
            self.address.location, autocommit=True, connect_timeout=CONNECT_SECONDS, application_name="qpert"
        )
        connection.execute("SET synchronous_commit TO on")  # what was answered survives a crash of the server
        found = connection.execute(EXTENSION_SCHEMA).fetchone()
        place = self._psycopg.sql.Identifier("public" if found is None else found[0])
        connection.execute(self._psycopg.sql.SQL("SET search_path TO {}").format(place))  # nobody's own `vector`
        return connection  # type: ignore[no-any-return]

    def _shown(self, error: Exception) -> str:
        return self.address.redacted(first_line(error))

    def __str__(self) -> str:
        return self.name


def documents(image: StoredImage) -> tuple[str, str]:
    """`facts` and `metadata` of an image as JSON."""
    facts = image.facts()
    metadata = facts.pop("metadata")
    return json.dumps(facts), json.dumps(metadata)


def image_of(facts: dict[str, Any], metadata: dict[str, Any], vectors: Floats | None = None) -> StoredImage:
    return StoredImage.of(facts | {"metadata": metadata}, vectors)


def first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
