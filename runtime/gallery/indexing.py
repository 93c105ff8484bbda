"""Encoding images into a gallery, resumably."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import replace as replace_fields
from pathlib import Path

import numpy as np

from qpert.runtime.detection.source import BoxSource
from qpert.runtime.errors import GalleryError, InputError
from qpert.runtime.files import local_path, portable_name
from qpert.runtime.filters.metadata import Metadata, checked_metadata
from qpert.runtime.gallery.batches import EncodedPart, ImageBatches, boxes_difference
from qpert.runtime.gallery.catalogue import Catalogue, ImageRecord
from qpert.runtime.gallery.detected import DetectedBoxes
from qpert.runtime.gallery.entries import ImageEntry
from qpert.runtime.gallery.fields import read_fields
from qpert.runtime.gallery.files import file_differs
from qpert.runtime.gallery.spec import FeatureMode
from qpert.runtime.gallery.writer import GalleryWriter, open_writer
from qpert.runtime.inputs.arguments import as_count
from qpert.runtime.progress import Progress, Silent
from qpert.runtime.retrieval.encoder import Encoder

RECORDS_A_SHARD = 64


@dataclass(frozen=True)
class IndexSummary:
    """What one call did, in images: `skipped` holds (name, reason) of those that could not be read; in `without_boxes`
    of those added or replaced, the given `boxes` source found nothing; of `relabelled`, the metadata alone changed."""

    images: int
    added: int
    replaced: int
    unchanged: int
    skipped: tuple[tuple[str, str], ...] = ()
    texts: int = 0
    without_boxes: int = 0
    relabelled: int = 0


def index_images(
    folder: str | Path,
    encoder: Encoder,
    entries: Iterable[ImageEntry],
    *,
    boxes: BoxSource | None = None,
    features: FeatureMode | None = None,
    replace: bool = False,
    skip_unreadable: bool = False,
    workers: int = 1,
    records_a_shard: int = RECORDS_A_SHARD,
    progress: Progress | None = None,
) -> IndexSummary:
    """Create the gallery, or go on with it: images that it holds already (same file, same boxes) are not encoded again.

    New images are appended in the order of `entries`, so a gallery that was only ever given one list has its order.
    `progress` advances once images are durable: what it counted survives a crash of process or machine. Images that
    are in the gallery and not among `entries` stay.

    Args:
        folder: the gallery's folder; made where it does not exist.
        encoder: what encodes; its bundle and perturbation settings are the gallery's from then on.
        entries: the images, each with its boxes and captions; names have to be unique.
        boxes: finds the boxes of entries that have none, a `Detector` for instance. What it says of itself (`identity`)
            is recorded: images that another source made, or none, count as changed.
        features: `stored` keeps image features for re-ranking; `recomputed` keeps none (16 to 60 times less space) and
            encodes the shortlist again at each search; `none` keeps none and never re-ranks. None means what the
            gallery has; for a new one `stored`, or `none` where the bundle has no pair scorer.
        replace: encode again what is there under the same name with another file, other boxes or captions. Where
            only the metadata differ, nothing is encoded.
        skip_unreadable: leave out, and count, images that cannot be read, instead of stopping at them.
        workers: batches that are read and encoded at the same time. Two keep a machine's cores busy where a batch alone
            does not; give the encoder its share of them (`threads`).
        records_a_shard: images that are committed together.
        progress: where to say how far it is.

    Raises:
        GalleryError: another process is indexing into it; it was made with another bundle, other perturbation settings
            or another `features` mode; it is damaged; an image of that name is there with other content or boxes and
            `replace` is false; two entries have one name.
        ImageError, BoxError: an image that cannot be read (unless `skip_unreadable`), boxes that do not fit it.
        LimitError: more boxes on an image than the bundle takes.
        UnavailableError: the disk is full. What was committed stays, and the same call resumes from there.
    """
    if records_a_shard < 1:
        raise InputError(f"records_a_shard is {records_a_shard}; expected at least 1", code="records-per-shard")
    workers = as_count(workers, "workers", least=1)
    listed = [portable(entry) for entry in entries]
    check_names(listed)
    folder = Path(folder)
    detected = None if boxes is None else DetectedBoxes.of(boxes, encoder)
    with open_writer(folder, encoder, features) as writer:
        plan = _plan(writer.catalogue, listed, detected, replace=replace)
        writer.set_metadata(plan.relabelled)
        batches = ImageBatches(encoder, detected, skip_unreadable=skip_unreadable, workers=workers)
        run = _Run(writer, encoder)
        shown = progress or Silent()
        with (
            shown.stage(f"encoding {len(plan.todo)} images", total=len(plan.todo)) as advance,
            batches.encoded(plan.todo, records_a_shard) as parts,
        ):
            for part in parts:
                run.commit(part)
                advance(len(part.entries))
        writer.remember()
        replaced = len([name for name in run.added if name in plan.replaced])
        return IndexSummary(
            images=len(writer.catalogue.images()),
            added=len(run.added) - replaced,
            replaced=replaced,
            unchanged=len(listed) - len(plan.todo) - len(plan.relabelled),
            skipped=tuple(batches.skipped),
            texts=len(writer.catalogue.texts()),
            without_boxes=batches.without_boxes,
            relabelled=len(plan.relabelled),
        )


def portable(entry: ImageEntry) -> ImageEntry:
    """The entry with a name that can be stored, a path that this process can open, whatever the locale is, and
    metadata that a filter can name."""
    name = portable_name(entry.name)
    metadata = checked_metadata(entry.metadata, f"the image {name}")
    return replace_fields(entry, name=name, path=local_path(entry.path), metadata=metadata)


@dataclass(frozen=True)
class _Plan:
    """What has to be encoded, in order; which of it replaces an image of the same name; and the new metadata, by name,
    of images that differ in nothing else."""

    todo: Sequence[ImageEntry]
    replaced: frozenset[str]
    relabelled: Mapping[str, Metadata]


def check_names(entries: Sequence[ImageEntry]) -> None:
    twice = [name for name, count in Counter(entry.name for entry in entries).items() if count > 1]
    if twice:
        raise GalleryError(
            f"{len(twice)} image names are given twice: {', '.join(twice[:5])}; each image needs a name of its own",
            code="image-names-repeated",
        )


def _plan(
    catalogue: Catalogue, entries: Sequence[ImageEntry], detected: DetectedBoxes | None, *, replace: bool
) -> _Plan:
    present = {record.name: record for record in catalogue.images()}
    fields = read_fields(catalogue)
    todo: list[ImageEntry] = []
    changed: dict[str, str] = {}
    relabelled: dict[str, Metadata] = {}
    for entry in entries:
        record = present.get(entry.name)
        if record is not None:
            difference = _difference(catalogue, record, entry, detected)
            if difference is None and dict(entry.metadata) == fields.get(record.row, {}):
                continue
            changed[entry.name] = difference or "metadata"
            if difference is None:
                relabelled[entry.name] = entry.metadata
                continue
        todo.append(entry)
    if changed and not replace:
        name, difference = next(iter(changed.items()))
        raise GalleryError(
            f"{len(changed)} images are in the gallery {catalogue.folder} under the same name but differ, {name} in "
            f"its {difference} for instance; pass --replace to encode them again, or index into a new gallery",
            code="image-changed",
        )
    return _Plan(todo, frozenset(changed) - relabelled.keys(), relabelled)


def _difference(
    catalogue: Catalogue, record: ImageRecord, entry: ImageEntry, detected: DetectedBoxes | None
) -> str | None:
    """In what an image differs from the one of its name in the gallery, or None."""
    if (difference := boxes_difference(record.boxes, entry, detected)) is not None:
        return difference
    if catalogue.captions(record.row) != entry.captions:
        return "captions"
    return "file" if file_differs(record, entry) else None


class _Run:
    """Writes shards of encoded images into a gallery; `added` says which."""

    def __init__(self, writer: GalleryWriter, encoder: Encoder) -> None:
        self.writer, self.encoder = writer, encoder
        self.added: list[str] = []

    def commit(self, part: EncodedPart) -> None:
        if part.features is None:
            return
        captions = [caption for image in part.images for caption in image.captions]
        width = self.writer.spec.width
        texts = self.encoder.encode_texts(captions) if captions else np.empty((0, width), np.float32)
        self.writer.append(part.images, part.features, texts)
        self.added += [image.name for image in part.images]
