"""Encoding images into a gallery, resumably."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import replace as replace_fields
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qpert.runtime.bundle.roles import IMAGE_TOWER
from qpert.runtime.detection.source import BoxSource
from qpert.runtime.errors import BoxError, GalleryError, ImageError, InputError
from qpert.runtime.files import local_path, portable_name, sha256_of
from qpert.runtime.filters.metadata import Metadata, checked_metadata
from qpert.runtime.gallery.box_json import boxes_to_json
from qpert.runtime.gallery.catalogue import Catalogue, ImageRecord
from qpert.runtime.gallery.detected import DetectedBoxes, without_source
from qpert.runtime.gallery.entries import ImageEntry
from qpert.runtime.gallery.fields import read_fields
from qpert.runtime.gallery.pipeline import ordered
from qpert.runtime.gallery.spec import FeatureMode
from qpert.runtime.gallery.writer import GalleryWriter, NewImage, open_writer
from qpert.runtime.inputs.arguments import as_count
from qpert.runtime.inputs.images import load_image
from qpert.runtime.progress import Progress, Silent
from qpert.runtime.retrieval.encoder import Encoder
from qpert.runtime.retrieval.features import ImageFeatures, concatenated

if TYPE_CHECKING:
    from PIL.Image import Image

RECORDS_A_SHARD = 64
IMAGES_AT_ONCE = 16
"""Decoded photographs held in memory (a batch of the vision graph may be smaller)."""


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
    _check_names(listed)
    folder = Path(folder)
    detected = None if boxes is None else DetectedBoxes.of(boxes, encoder)
    with open_writer(folder, encoder, features) as writer:
        plan = _plan(writer.catalogue, listed, detected, replace=replace)
        writer.set_metadata(plan.relabelled)
        run = _Run(writer, encoder, detected, skip_unreadable=skip_unreadable)
        shown = progress or Silent()
        with shown.stage(f"encoding {len(plan.todo)} images", total=len(plan.todo)) as advance:
            shards = [
                run.batches(plan.todo[start : start + records_a_shard])
                for start in range(0, len(plan.todo), records_a_shard)
            ]
            every = [batch for shard in shards for batch in shard]
            with ordered(run.encode, every, workers) as encoded:
                for shard in shards:
                    run.commit(list(islice(encoded, len(shard))))
                    advance(sum(map(len, shard)))
        writer.remember()
        replaced = len([name for name in run.added if name in plan.replaced])
        return IndexSummary(
            images=len(writer.catalogue.images()),
            added=len(run.added) - replaced,
            replaced=replaced,
            unchanged=len(listed) - len(plan.todo) - len(plan.relabelled),
            skipped=tuple(run.skipped),
            texts=len(writer.catalogue.texts()),
            without_boxes=run.without_boxes,
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


def _check_names(entries: Sequence[ImageEntry]) -> None:
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
    if detected is not None and entry.boxes is None:
        if not detected.made(record.boxes):
            return "detector or its options"
    elif without_source(record.boxes) != boxes_to_json(entry.boxes):
        return "boxes"
    if catalogue.captions(record.row) != entry.captions:
        return "captions"
    try:
        state = entry.path.stat()
    except OSError as error:
        raise ImageError(
            f"{entry.path} cannot be read: {error.strerror}; check the path", code="image-missing"
        ) from error
    if state.st_size == record.bytes and state.st_mtime_ns == record.mtime:
        return None
    return None if state.st_size == record.bytes and sha256_of(entry.path) == record.sha256 else "file"


@dataclass(frozen=True)
class _Batch:
    """What became of some images: those that were encoded with their features, and those that cannot be read."""

    images: Sequence[NewImage]
    features: ImageFeatures | None
    skipped: Sequence[tuple[str, str]]
    without_boxes: int


class _Run:
    """Encodes shards of images into a gallery; `added` and `skipped` say what became of them."""

    def __init__(
        self, writer: GalleryWriter, encoder: Encoder, detected: DetectedBoxes | None, *, skip_unreadable: bool
    ) -> None:
        self.writer, self.encoder, self.skip_unreadable = writer, encoder, skip_unreadable
        self.detected, self.without_boxes = detected, 0
        self.added: list[str] = []
        self.skipped: list[tuple[str, str]] = []

    def batches(self, entries: Sequence[ImageEntry]) -> list[Sequence[ImageEntry]]:
        """The calls of one shard. Batches start with the shard, so that a resumed run makes the same batches as one
        that was never interrupted."""
        step = min(self.encoder.limit(IMAGE_TOWER, "B"), IMAGES_AT_ONCE)
        return [entries[start : start + step] for start in range(0, len(entries), step)]

    def commit(self, batches: Sequence[_Batch]) -> None:
        """Write the images of one shard."""
        for batch in batches:
            self.skipped += batch.skipped
            self.without_boxes += batch.without_boxes
        images = [image for batch in batches for image in batch.images]
        parts = [batch.features for batch in batches if batch.features is not None]
        if not parts:
            return
        captions = [caption for image in images for caption in image.captions]
        width = self.writer.spec.width
        texts = self.encoder.encode_texts(captions) if captions else np.empty((0, width), np.float32)
        self.writer.append(images, concatenated(parts), texts)
        self.added += [image.name for image in images]

    def encode(self, entries: Sequence[ImageEntry]) -> _Batch:
        """One batch, without the images that cannot be read where these are to be skipped. In any thread."""
        found: list[tuple[ImageEntry, Image, NewImage]] = []
        skipped: list[tuple[str, str]] = []
        for entry in entries:
            try:
                state = _state(entry)
                found.append((entry, _loaded(entry), state))
            except ImageError as error:
                if not self.skip_unreadable:
                    raise
                skipped.append((entry.name, str(error)))
        if not found:
            return _Batch([], None, skipped, 0)
        without_boxes = 0
        if self.detected is not None:
            found, without_boxes = _with_detected(self.detected, found)
        features = self.encoder.encode_images([image for _, image, _ in found], [entry.boxes for entry, _, _ in found])
        _check_finite([entry.name for entry, _, _ in found], features)
        return _Batch([new for _, _, new in found], features, skipped, without_boxes)


def _with_detected(
    detected: DetectedBoxes, found: Sequence[tuple[ImageEntry, Image, NewImage]]
) -> tuple[list[tuple[ImageEntry, Image, NewImage]], int]:
    """The same with the source's boxes where an entry has none, and in how many of these it found nothing."""
    boxes = iter(detected.find([image for entry, image, _ in found if entry.boxes is None]))
    filled, empty = [], 0
    for entry, image, new in found:
        if entry.boxes is None:
            its = next(boxes)
            empty += not len(its)
            entry, new = replace_fields(entry, boxes=its), replace_fields(new, boxes=detected.to_json(its))
        filled.append((entry, image, new))
    return filled, empty


def _state(entry: ImageEntry) -> NewImage:
    """What the catalogue keeps of an image's file."""
    try:
        state = entry.path.stat()
        digest = sha256_of(entry.path)
    except OSError as error:
        raise ImageError(
            f"{entry.path} cannot be read: {error.strerror}; check the path", code="image-missing"
        ) from error
    path = os.path.abspath(entry.path)  # noqa: PTH100, resolve() would follow the links of a data set
    boxes = boxes_to_json(entry.boxes)
    captions, metadata = entry.captions, entry.metadata
    return NewImage(entry.name, path, state.st_size, state.st_mtime_ns, digest, boxes, captions, metadata)


def _loaded(entry: ImageEntry) -> Image:
    image = load_image(entry.path)
    if entry.boxes is not None and entry.boxes.size != image.size:
        raise BoxError(
            f"the boxes of {entry.name} are for a picture of {entry.boxes.size[0]}×{entry.boxes.size[1]} pixels, "
            f"it has {image.size[0]}×{image.size[1]}; give boxes in the picture's own pixels (after EXIF rotation)",
            code="box-image-size",
        )
    return image


def _check_finite(names: Sequence[str], features: ImageFeatures) -> None:
    """Half precision can overflow; a NaN in the gallery would spoil every search."""
    for index, name in enumerate(names):
        if not (np.isfinite(features.query_embeds[index]).all() and np.isfinite(features.image_embeds[index]).all()):
            raise ImageError(
                f"{name} was encoded to NaN or infinity; verify the bundle (`qpert verify`), and export it in fp32 if "
                "half precision overflows",
                code="image-not-finite",
            )
