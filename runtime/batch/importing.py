"""`qpert index --from`: images that were encoded elsewhere, into a gallery."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qpert.runtime.batch import columns as names
from qpert.runtime.batch.vectors import Row, check_row, has_tokens, parquet_files, read_rows
from qpert.runtime.bundle.roles import BOX_WEIGHTS, OBJECT_MASKS
from qpert.runtime.errors import GalleryError, ImageError, InputError
from qpert.runtime.files import local_path
from qpert.runtime.gallery.catalogue import ImageRecord, has_catalogue, open_catalogue
from qpert.runtime.gallery.indexing import RECORDS_A_SHARD, IndexSummary
from qpert.runtime.gallery.spec import FeatureMode, GallerySpec, usual_features
from qpert.runtime.gallery.writer import GalleryWriter, NewImage, open_writer
from qpert.runtime.progress import Progress, Silent
from qpert.runtime.retrieval.encoder import Encoder
from qpert.runtime.retrieval.features import ImageFeatures
from qpert.runtime.retrieval.query_sets import QuerySets, sets_of_images


def index_vectors(
    folder: str | Path,
    encoder: Encoder,
    source: str | Path,
    *,
    features: FeatureMode | None = None,
    replace: bool = False,
    skip_unreadable: bool = False,
    progress: Progress | None = None,
) -> IndexSummary:
    """Create the gallery of images that `qpert.runtime.batch.EncodeImages` has encoded, or go on with it.

    Every row is checked before the first is written. Images that the gallery holds already, with the same file, boxes
    and captions, stay as they are; so the same call resumes one that was interrupted.

    Args:
        folder: the gallery's folder; made where it does not exist.
        encoder: of the bundle that encoded the images; it encodes their captions, no image.
        source: a Parquet file, or a folder of them.
        features: as in `index_images`. None means what the gallery has; for a new one `stored` where the image tokens
            came along, `none` where the bundle has no pair scorer, else `recomputed`.
        replace: take the new vectors of an image whose file, boxes or captions have changed.
        skip_unreadable: leave out, and count, images that could not be encoded, instead of stopping at them.
        progress: where to say how far it is.

    Raises:
        InputError: no Parquet, other columns, another bundle, other settings, other shapes, NaN, no unit length;
            features to be stored without image tokens, or recomputed from files that are not here.
        ImageError: an image could not be encoded (unless `skip_unreadable`).
        GalleryError: two rows have one name; otherwise as `index_images`.
        UnavailableError: pyarrow is missing, or the disk is full.
    """
    folder, shown = Path(folder), progress or Silent()
    files = parquet_files(Path(source))
    mode = features or usual_mode(folder, encoder, files)
    checked = check_files(files, encoder, GallerySpec.of(encoder, mode), shown)
    if checked.skipped and not skip_unreadable:
        name, reason = checked.skipped[0]
        raise ImageError(
            f"{len(checked.skipped)} images of {source} could not be encoded, {name} for instance ({reason}); leave "
            "them out with --skip-unreadable",
            code="vectors-errors",
        )
    with open_writer(folder, encoder, mode) as writer:
        run = _Import(writer, encoder)
        run.plan(files, replace=replace)
        todo = len(checked.names) - run.unchanged
        with shown.stage(f"adding {todo} images", total=todo) as advance:
            for part in shards(files, run.todo, tokens=mode == "stored"):
                run.add(part)
                advance(len(part))
        writer.remember()
        return IndexSummary(
            images=len(writer.catalogue.images()),
            added=len(run.todo) - len(run.replaced),
            replaced=len(run.replaced),
            unchanged=run.unchanged,
            skipped=tuple(checked.skipped),
            texts=len(writer.catalogue.texts()),
        )


def usual_mode(folder: Path, encoder: Encoder, files: Sequence[Path]) -> FeatureMode:
    """What a gallery keeps of these images where nobody says."""
    if folder.is_dir() and has_catalogue(folder):
        with closing(open_catalogue(folder)) as catalogue:
            return catalogue.spec.features
    usual = usual_features(encoder)
    return "recomputed" if usual == "stored" and not all(map(has_tokens, files)) else usual


@dataclass(frozen=True)
class _Checked:
    """What the first reading of all rows found: the images that have vectors, and (name, reason) of the others."""

    names: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]


def check_files(files: Sequence[Path], encoder: Encoder, spec: GallerySpec, progress: Progress) -> _Checked:
    """Read every row, image tokens too where they are wanted.

    Raises:
        InputError, GalleryError: see `index_vectors`.
    """
    found: list[str] = []
    skipped: list[tuple[str, str]] = []
    with progress.stage(f"checking {len(files)} files", total=len(files)) as advance:
        for path in files:
            for rows in read_rows(path, tokens=spec.features == "stored"):
                for row in rows:
                    check_row(row, spec, encoder.perturbation, path)
                    check_features(row, spec, path)
                found += [row.name for row in rows if row.error is None]
                skipped += [(row.name, row.error) for row in rows if row.error is not None]
            advance(1)
    twice = [name for name, count in Counter([*found, *(name for name, _ in skipped)]).items() if count > 1]
    if twice:
        raise GalleryError(
            f"{len(twice)} images are there twice: {', '.join(twice[:5])}; each image needs a name of its own: delete "
            "the files of an earlier run",
            code="image-names-repeated",
        )
    return _Checked(tuple(found), tuple(skipped))


def check_features(row: Row, spec: GallerySpec, path: Path) -> None:
    """Raises InputError where what re-ranking needs of an image is not there."""
    if row.error is not None:
        return
    if spec.features == "stored" and row.tokens is None:
        raise InputError(
            f"{path}: {row.name} has no image tokens to be stored; encode with features=True, or pass --features "
            "recomputed or none",
            code="vectors-without-tokens",
        )
    if spec.features == "recomputed" and not local_path(row.record[names.PATH]).is_file():
        raise InputError(
            f"{path}: the features of {row.name} cannot be recomputed, {row.record[names.PATH]} is not here; encode "
            "with features=True, put the pictures there, or pass --features none to search without re-ranking",
            code="vectors-without-file",
        )


def shards(files: Sequence[Path], wanted: frozenset[str], *, tokens: bool) -> Iterator[list[Row]]:
    """The wanted rows with vectors of all files in order, as many at a time as are committed together."""
    waiting: list[Row] = []
    for path in files:
        for rows in read_rows(path, tokens=tokens):
            waiting += [row for row in rows if row.error is None and row.name in wanted]
            while len(waiting) >= RECORDS_A_SHARD:
                yield waiting[:RECORDS_A_SHARD]
                waiting = waiting[RECORDS_A_SHARD:]
    if waiting:
        yield waiting


class _Import:
    """Rows into a gallery; `todo` names those that it lacks, `replaced` those among them that it has otherwise."""

    def __init__(self, writer: GalleryWriter, encoder: Encoder) -> None:
        self.writer, self.encoder = writer, encoder
        self.todo: frozenset[str] = frozenset()
        self.replaced: frozenset[str] = frozenset()
        self.unchanged = 0

    def plan(self, files: Sequence[Path], *, replace: bool) -> None:
        """Raises GalleryError where images are there otherwise, and may not be replaced."""
        present = {record.name: record for record in self.writer.catalogue.images()}
        rows = [row for path in files for part in read_rows(path, tokens=False) for row in part if row.error is None]
        changed = [row.name for row in rows if row.name in present and not self._same(present[row.name], row)]
        if changed and not replace:
            raise GalleryError(
                f"{len(changed)} images are in the gallery {self.writer.folder} under the same name with another file, "
                f"other boxes or captions, {changed[0]} for instance; pass --replace to take the new ones",
                code="image-changed",
            )
        self.replaced = frozenset(changed)
        self.todo = frozenset(row.name for row in rows if row.name not in present) | self.replaced
        self.unchanged = len(rows) - len(self.todo)

    def _same(self, known: ImageRecord, row: Row) -> bool:
        same_file = (known.bytes, known.sha256) == (row.record[names.FILE_BYTES], row.record[names.SHA256])
        captions = self.writer.catalogue.captions(known.row)
        return same_file and known.boxes == row.record[names.BOXES] and captions == row.captions

    def add(self, rows: Sequence[Row]) -> None:
        """Commit some rows together."""
        captions = [caption for row in rows for caption in row.captions]
        width = self.writer.spec.width
        texts = self.encoder.encode_texts(captions) if captions else np.empty((0, width), np.float32)
        self.writer.append([new_image(row) for row in rows], self._features(rows), texts)

    def _features(self, rows: Sequence[Row]) -> ImageFeatures:
        spec, boxes = self.writer.spec, [row.boxes for row in rows]
        counts, numbers = sets_of_images(boxes, self.encoder.perturbation)
        vectors = np.concatenate([row.vectors for row in rows if row.vectors is not None])
        sets = QuerySets(vectors.reshape(-1, spec.queries, spec.width), counts, numbers)
        tokens = [row.tokens for row in rows if row.tokens is not None]
        if spec.features != "stored":
            return ImageFeatures(sets, np.empty((len(rows), 0), np.float32))
        if not spec.has_masks:
            return ImageFeatures(sets, np.stack(tokens))
        masks = self.encoder.box_slots(boxes)
        return ImageFeatures(sets, np.stack(tokens), masks[OBJECT_MASKS], masks[BOX_WEIGHTS])


def new_image(row: Row) -> NewImage:
    """What the catalogue keeps of it."""
    found = row.record
    state = (found[names.PATH], found[names.FILE_BYTES], found[names.MODIFIED], found[names.SHA256])
    return NewImage(row.name, *state, found[names.BOXES], row.captions)
