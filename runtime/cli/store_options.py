"""`--store` of `qpert index`: a vector engine instead of a gallery, or beside one that keeps the features."""

from __future__ import annotations

from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from qpert.runtime.cli.number_types import IntegerRange
from qpert.runtime.cli.options import PATH
from qpert.runtime.detection.source import BoxSource
from qpert.runtime.errors import InputError
from qpert.runtime.gallery.entries import Listing
from qpert.runtime.gallery.indexing import IndexSummary
from qpert.runtime.gallery.reader import StoredGallery
from qpert.runtime.progress import Progress
from qpert.runtime.retrieval.encoder import Encoder
from qpert.runtime.stores.address import StoreAddress, parse_address
from qpert.runtime.stores.opening import made_spec, open_store
from qpert.runtime.stores.protocol import VectorStore

STORE_HELP = (
    "keep the vectors in Qdrant or PostgreSQL: qdrant://HOST:6333/COLLECTION, qdrant-edge:FOLDER, postgresql://…; with "
    "--out, the gallery there keeps the features for re-ranking"
)
FEATURES_HELP = "with a store: the gallery that has the features for re-ranking [default: as indexed]"
store_option = click.option("--store", help=STORE_HELP)
features_from_option = click.option("--features-from", type=PATH, help=FEATURES_HELP)
recall_option = click.option(
    "--recall-queries",
    type=IntegerRange(min=0),
    default=20,
    help="with --store: compare with exact search by this many queries, which reads all vectors once; 0: not",
)


def store_address(store: str | None, out: Path | None, features: str | None, *, keeps: bool) -> StoreAddress | None:
    """Where --store leads, None without it. `keeps`: whether --compact or --repair is asked for.

    Raises:
        InputError: neither a gallery nor a store, or what only a gallery can do without one.
    """
    if store is None:
        if out is None:
            raise InputError(
                "give --out FOLDER for a gallery, --store for a vector engine, or both", code="index-target"
            )
        return None
    address = parse_address(store)
    if address.kind == "gallery":
        raise InputError(f"--store is {address}, no engine; a gallery's folder is given as --out", code="store-address")
    if out is None and (keeps or features is not None):
        raise InputError(
            "--features, --compact and --repair are about a gallery's files; give --out for one beside --store",
            code="index-target",
        )
    return address


def index_into(
    store: VectorStore,
    encoder: Encoder,
    listing: Listing,
    source: BoxSource | None,
    progress: Progress,
    **choices: Any,
) -> IndexSummary:
    from qpert.runtime.stores.indexing import index_store

    captions = sum(len(entry.captions) for entry in listing.entries)
    if captions:
        progress.say(f"{captions} captions are left out: a store is searched by text (a gallery, --out, keeps them)")
    return index_store(store, encoder, listing.entries, boxes=source, **choices, progress=progress)


def copy_into(store: VectorStore, out: Path, encoder: Encoder, progress: Progress) -> dict[str, int]:
    """The gallery's images into the store: what was done, for the report."""
    from qpert.runtime.stores.indexing import copy_gallery

    with closing(StoredGallery.open(out, encoder)) as gallery:
        summary = copy_gallery(store, gallery, progress=progress)
    return {"added": summary.added, "replaced": summary.replaced, "unchanged": summary.unchanged}


def recall_of(store: VectorStore, count: int, out: Path | None, encoder: Encoder) -> dict[str, Any] | None:
    """Recall against exact search, None where it is not asked for or the store is empty."""
    from qpert.runtime.stores.recall import measure_recall, sample_queries

    if not count or not store.count():
        return None
    if out is None:
        return asdict(measure_recall(store, sample_queries(store, count)))
    with closing(StoredGallery.open(out, encoder)) as gallery:
        return asdict(measure_recall(store, sample_queries(store, count, gallery), gallery))


def delete_from(address: StoreAddress, names: tuple[str, ...]) -> int:
    """Raises GalleryError, before anything is deleted, for names that the store does not have."""
    from qpert.runtime.errors import GalleryError
    from qpert.runtime.stores.protocol import id_of

    with open_store(address) as store:
        made_spec(store)
        there = store.get([id_of(name) for name in names])
        unknown = [name for name in names if id_of(name) not in there]
        if unknown:
            raise GalleryError(
                f"the store {address} has no image named {', '.join(map(repr, unknown[:5]))}; nothing was deleted",
                code="gallery-image-unknown",
            )
        return store.delete(names)
