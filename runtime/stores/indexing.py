"""Encoding images into a store, resumably; or taking them over from a gallery that has them encoded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from dataclasses import replace as replaced_fields

from qpert.runtime.detection.source import BoxSource
from qpert.runtime.errors import GalleryError
from qpert.runtime.gallery.batches import ImageBatches, boxes_difference
from qpert.runtime.gallery.detected import DetectedBoxes
from qpert.runtime.gallery.entries import ImageEntry
from qpert.runtime.gallery.files import file_differs
from qpert.runtime.gallery.indexing import IndexSummary, check_names, portable
from qpert.runtime.gallery.reader import StoredGallery
from qpert.runtime.gallery.spec import GallerySpec
from qpert.runtime.gallery.writer import NewImage
from qpert.runtime.progress import Progress, Silent
from qpert.runtime.retrieval.encoder import Encoder
from qpert.runtime.retrieval.query_sets import QuerySets
from qpert.runtime.stores.protocol import Floats, StoredImage, StoreSpec, VectorStore, id_of

AT_ONCE = 64
"""Images that are durable together."""


@dataclass(frozen=True)
class Plan:
    """What is to be encoded, with what is there in its place, and what only gets other metadata."""

    todo: Sequence[ImageEntry]
    replaced: frozenset[str]
    relabelled: Sequence[StoredImage]


def index_store(
    store: VectorStore,
    encoder: Encoder,
    entries: Iterable[ImageEntry],
    *,
    boxes: BoxSource | None = None,
    replace: bool = False,
    skip_unreadable: bool = False,
    workers: int = 1,
    progress: Progress | None = None,
) -> IndexSummary:
    """Make the store's gallery, or go on with it: images that it holds already (same file, same boxes) are not encoded
    again. Captions are not kept: a store is searched by text.

    Arguments and errors as in `index_images`; an image that differs from the one of its name needs `replace`.

    Raises:
        GalleryError: the store was made with another bundle or other settings, or holds something else.
        UnavailableError: the engine cannot be reached. What was committed stays, and the same call resumes from there.
    """
    listed = [portable(entry) for entry in entries]
    check_names(listed)
    require_or_create(store, encoder, None)
    detected = None if boxes is None else DetectedBoxes.of(boxes, encoder)
    plan = planned(store, listed, detected, may_replace=replace)
    store.relabel(plan.relabelled)
    batches = ImageBatches(encoder, detected, skip_unreadable=skip_unreadable, workers=workers)
    added: list[str] = []
    with (
        (progress or Silent()).stage(f"encoding {len(plan.todo)} images", total=len(plan.todo)) as advance,
        batches.encoded(plan.todo, AT_ONCE) as parts,
    ):
        for part in parts:
            if part.features is not None:
                sets = part.features.query_sets
                store.upsert([stored(one, sets.of([place])) for place, one in enumerate(part.images)])
            added += [one.name for one in part.images]
            advance(len(part.entries))
    replaced = len([name for name in added if name in plan.replaced])
    return IndexSummary(
        images=store.count(),
        added=len(added) - replaced,
        replaced=replaced,
        unchanged=len(listed) - len(plan.todo) - len(plan.relabelled),
        skipped=tuple(batches.skipped),
        without_boxes=batches.without_boxes,
        relabelled=len(plan.relabelled),
    )


def copy_gallery(store: VectorStore, gallery: StoredGallery, *, progress: Progress | None = None) -> IndexSummary:
    """Make the store hold what a gallery holds, vectors from the gallery: nothing is encoded, and what the gallery
    lacks is taken out. Searches then read features for re-ranking from the gallery.

    Raises GalleryError and UnavailableError as `index_store`.
    """
    require_or_create(store, gallery.encoder, gallery)
    images = [stored_of(gallery, row) for row in range(len(gallery))]
    there = {one.name: one for one in store.scan()}
    todo = [row for row, one in enumerate(images) if one.name not in there or not one.same_as(there[one.name])]
    store.delete(sorted(there.keys() - {one.name for one in images}))
    replaced = sum(images[row].name in there for row in todo)
    with (progress or Silent()).stage(f"copying {len(todo)} images", total=len(todo)) as advance:
        for start in range(0, len(todo), AT_ONCE):
            part = todo[start : start + AT_ONCE]
            store.upsert([replaced_fields(images[row], vectors=vectors_of(gallery.sets_of([row]))[1]) for row in part])
            advance(len(part))
    return IndexSummary(store.count(), len(todo) - replaced, replaced, len(images) - len(todo))


def require_or_create(store: VectorStore, encoder: Encoder, gallery: StoredGallery | None) -> None:
    """The store is the encoder's; a new one is made."""
    found = store.spec()
    features_in = None if gallery is None else str(gallery.folder.absolute())
    if found is not None:
        found.gallery.require(encoder, store.name)
        if features_in in (None, found.features_in):
            return
    spec = GallerySpec.of(encoder, "recomputed" if encoder.reranks else "none") if found is None else found.gallery
    store.create(StoreSpec(spec, features_in))


def planned(
    store: VectorStore, entries: Sequence[ImageEntry], detected: DetectedBoxes | None, *, may_replace: bool
) -> Plan:
    """Raises GalleryError for images that differ, unless they may be replaced, and for two names of one id."""
    todo, replaced, relabelled, differs = list[ImageEntry](), set[str](), list[StoredImage](), list[tuple[str, str]]()
    for start in range(0, len(entries), AT_ONCE):
        part = entries[start : start + AT_ONCE]
        there = store.get([id_of(entry.name) for entry in part])
        for entry in part:
            found = there.get(id_of(entry.name))
            difference = None if found is None else difference_of(found, entry, detected)
            if found is None:
                todo.append(entry)
            elif difference is not None:
                differs.append((entry.name, difference))
                replaced.add(entry.name)
                todo.append(entry)
            elif dict(found.metadata) != dict(entry.metadata):
                differs.append((entry.name, "metadata"))
                relabelled.append(found.relabelled(entry.metadata))
    if differs and not may_replace:
        name, difference = differs[0]
        raise GalleryError(
            f"{len(differs)} images are in the store {store.name} under the same name but differ, {name} in its "
            f"{difference} for instance; pass --replace to encode them again, or index into a new store",
            code="image-changed",
        )
    return Plan(todo, frozenset(replaced), relabelled)


def difference_of(found: StoredImage, entry: ImageEntry, detected: DetectedBoxes | None) -> str | None:
    """In what an image differs from the one in the store, metadata aside; None where in nothing."""
    if found.name != entry.name:
        raise GalleryError(
            f"the names {found.name!r} and {entry.name!r} have one number in the store; rename one of them",
            code="store-same-id",
        )
    return boxes_difference(found.boxes, entry, detected) or ("file" if file_differs(found, entry) else None)


def stored(new: NewImage, sets: QuerySets) -> StoredImage:
    """`sets`: of this image alone."""
    file = (new.name, new.path, new.bytes, new.mtime, new.sha256)
    return StoredImage(*file, new.boxes, new.metadata, *vectors_of(sets))


def vectors_of(sets: QuerySets) -> tuple[int, Floats]:
    return len(sets.vectors), sets.vectors.reshape(-1, sets.vectors.shape[-1])


def stored_of(gallery: StoredGallery, row: int) -> StoredImage:
    """An image of a gallery, without its vectors."""
    record = gallery.record(row)
    file = (record.name, record.path, record.bytes, record.mtime, record.sha256)
    return StoredImage(*file, record.boxes, gallery.metadata[row], record.sets)
