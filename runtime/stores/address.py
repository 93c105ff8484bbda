"""Where a store is: what `--store` takes. A password is used and never shown."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit, urlunsplit

from qpert.runtime.errors import InputError
from qpert.runtime.files import local_path

Kind = Literal["gallery", "qdrant", "qdrant-edge", "postgresql"]
QDRANT_SCHEMES = {"qdrant": "http", "qdrant+https": "https"}
POSTGRES_SCHEMES = ("postgresql", "postgres")
QDRANT_PORT = 6333
EXPECTED = (
    "expected qdrant://HOST:6333/COLLECTION (qdrant+https:// with TLS), qdrant-edge:FOLDER, "
    "postgresql://USER@HOST/DATABASE, or a gallery's folder"
)
COLLECTION = re.compile(r"[A-Za-z0-9_-]{1,200}")
SCHEMA = re.compile(r"[a-z_][a-z0-9_]{0,59}")
DEFAULT_SCHEMA = "qpert"
SCHEMA_PARAMETER = "gallery"
"""Of a PostgreSQL address: the schema that holds the tables."""


@dataclass(frozen=True)
class StoreAddress:
    """`shown` is for people; `location` what a driver takes (a URL, a connection string, a folder); `name` the
    collection or schema. `secret` is the password in the address, empty without one."""

    kind: Kind
    shown: str
    location: str = field(repr=False)
    name: str = ""
    secret: str = field(default="", repr=False)

    def __str__(self) -> str:
        return self.shown

    @property
    def folder(self) -> Path:
        return Path(self.location)

    def redacted(self, text: str) -> str:
        """A driver's message without the password."""
        for secret in {self.secret, quote(self.secret, safe="")} - {""}:
            text = text.replace(secret, "***")
        return text


def parse_address(text: str) -> StoreAddress:
    """The store that an address means.

    Raises:
        InputError: of code `store-address`; the message does not repeat a password.
    """
    scheme, colon, rest = text.partition(":")
    if scheme == "qdrant-edge" and colon:
        if not rest or rest.startswith("//"):
            raise InputError(f"--store is {text}; expected qdrant-edge:FOLDER", code="store-address")
        return StoreAddress("qdrant-edge", text, str(local_path(rest)))
    if scheme in QDRANT_SCHEMES or scheme in POSTGRES_SCHEMES or rest.startswith("//"):
        return _of_url(text, scheme)
    return StoreAddress("gallery", text, str(local_path(text)))


def _of_url(text: str, scheme: str) -> StoreAddress:
    try:
        parts = urlsplit(text)
        host, port, secret = parts.hostname, parts.port, unquote(parts.password or "")
    except ValueError:
        raise InputError(f"--store is no URL ({scheme}://…); {EXPECTED}", code="store-address") from None
    user = f"{parts.username}:***@" if parts.password else f"{parts.username}@" if parts.username else ""
    place = f"{user}{parts.netloc.rpartition('@')[2]}"
    options = [(key, value) for key, value in parse_qsl(parts.query, keep_blank_values=True)]
    hidden = urlencode([(key, "***" if key == "password" else value) for key, value in options], safe="*/")
    shown = urlunsplit((scheme, place, parts.path, hidden, ""))
    if scheme in POSTGRES_SCHEMES:
        secret = secret or dict(options).get("password", "")
        name = dict(options).get(SCHEMA_PARAMETER, DEFAULT_SCHEMA)
        if not SCHEMA.fullmatch(name) or parts.fragment:
            raise InputError(
                f"--store {shown}: {SCHEMA_PARAMETER} is {name!r}; expected small letters, digits and underscores",
                code="store-address",
            )
        query = urlencode([pair for pair in options if pair[0] != SCHEMA_PARAMETER], safe="/")
        location = urlunsplit((scheme, parts.netloc, parts.path, query, ""))
        return StoreAddress("postgresql", shown, location, name, secret)
    name = parts.path.strip("/")
    if scheme not in QDRANT_SCHEMES or not host or not COLLECTION.fullmatch(name) or options or parts.fragment:
        raise InputError(f"--store is {shown}; {EXPECTED}", code="store-address")
    if user:
        raise InputError(
            f"--store {shown} holds a name or a key; leave it out, and set QDRANT_API_KEY in the environment",
            code="store-address",
        )
    address = f"[{host}]" if ":" in host else host
    return StoreAddress("qdrant", shown, f"{QDRANT_SCHEMES[scheme]}://{address}:{port or QDRANT_PORT}", name)
