"""Reading encoded images from Parquet, batch by batch, and checking that they are what a gallery can take."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qpert.runtime.batch import columns as names
from qpert.runtime.batch.columns import load_pyarrow
from qpert.runtime.errors import InputError
from qpert.runtime.gallery.box_json import boxes_from_json
from qpert.runtime.gallery.spec import GallerySpec
from qpert.runtime.inputs.boxes import Boxes
from qpert.runtime.inputs.perturbation import Perturbation
from qpert.runtime.retrieval.query_sets import image_sets

ROWS_AT_ONCE = 64
UNIT_TOLERANCE = 1e-3
"""Of a vector's length: half precision leaves 5e-4, float32 far less; anything beyond is no normalised vector."""


@dataclass(frozen=True, eq=False)
class Row:
    """One encoded image, or one that could not be encoded (`error`, no vectors).

    `vectors` float32 [S·Q, E]; `tokens` [N, C] where they came along.
    """

    record: dict[str, Any]
    captions: tuple[str, ...]
    error: str | None
    vectors: npt.NDArray[np.float32] | None
    tokens: npt.NDArray[Any] | None

    @property
    def name(self) -> str:
        return str(self.record[names.IMAGE])

    @property
    def boxes(self) -> Boxes | None:
        return boxes_from_json(self.record[names.BOXES])


def parquet_files(source: Path) -> list[Path]:
    """The Parquet files of a source: itself, or those below a folder by name, without hidden ones.

    Raises:
        InputError: there is none (`vectors-missing`).
    """
    if source.is_dir():
        inside = [path for path in sorted(source.rglob("*.parquet")) if path.is_file()]
        files = [path for path in inside if not any(p[0] in "._" for p in path.relative_to(source).parts)]
    else:
        files = [source] if source.is_file() else []
    if not files:
        raise InputError(
            f"{source} {'holds no .parquet file' if source.is_dir() else 'does not exist'}; expected what "
            "qpert.runtime.batch.EncodeImages gave, as a Parquet file or a folder of them",
            code="vectors-missing",
        )
    return files


def read_rows(path: Path, *, tokens: bool) -> Iterator[list[Row]]:
    """The rows of one file, some at a time; `tokens` false leaves image tokens on the disk.

    Raises:
        InputError: no Parquet, or other columns than `qpert.runtime.batch.columns` says.
    """
    pa = load_pyarrow()
    try:
        with pa.parquet.ParquetFile(path) as file:
            wanted = checked_columns(path, file.schema_arrow.names, tokens=tokens)
            for batch in file.iter_batches(ROWS_AT_ONCE, columns=wanted):
                yield rows_of(batch)
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"{path} cannot be read as Parquet ({error}); leave it out, or write it again", code="vectors-unreadable"
        ) from error


def checked_columns(path: Path, found: Sequence[str], *, tokens: bool) -> list[str]:
    """Those columns that are read of a file that has the columns `found`."""
    if missing := [name for name in names.REQUIRED if name not in found]:
        raise InputError(
            f"{path} has no column {', '.join(missing)}; expected those that qpert.runtime.batch.EncodeImages gives "
            f"({', '.join(names.REQUIRED)})",
            code="vectors-columns",
        )
    optional = [names.CAPTIONS, *([names.IMAGE_EMBEDS] if tokens else [])]
    return [*names.REQUIRED, *(name for name in optional if name in found)]


def has_tokens(path: Path) -> bool:
    """Whether a file has image tokens."""
    return names.IMAGE_EMBEDS in load_pyarrow().parquet.read_schema(path).names


def rows_of(batch: Any) -> list[Row]:
    """The rows of a record batch."""
    light = {name: batch.column(name).to_pylist() for name in (*names.RECORD, names.ERROR)}
    kept = batch.schema.names
    captions = batch.column(names.CAPTIONS).to_pylist() if names.CAPTIONS in kept else [()] * batch.num_rows
    vectors = matrices(batch.column(names.QUERY_EMBEDS))
    tokens = matrices(batch.column(names.IMAGE_EMBEDS)) if names.IMAGE_EMBEDS in kept else [None] * batch.num_rows
    made = zip(*(batch.column(name).to_pylist() for name in (names.BUNDLE, names.PERTURBATION)), strict=True)
    rows = []
    for place, (bundle, perturbation) in enumerate(made):
        record = {name: light[name][place] for name in names.RECORD}
        record |= {names.BUNDLE: bundle, names.PERTURBATION: perturbation}
        words = tuple(captions[place] or ())
        rows.append(Row(record, words, light[names.ERROR][place], vectors[place], tokens[place]))
    return rows


def matrices(column: Any) -> list[npt.NDArray[Any] | None]:
    """A column of lists of vectors as a matrix for each row, or None where there is none.

    Other engines write the same rows with lists of another kind (large, without a fixed length): what counts is how
    many numbers each holds.
    """
    found: list[npt.NDArray[Any] | None] = []
    for cell in column:
        rows = cell.values
        if rows is None or not len(rows):
            found.append(None)
            continue
        flat = rows.flatten()
        found.append(np.asarray(flat.to_numpy(zero_copy_only=False)).reshape(len(rows), -1))
    return found


def check_row(row: Row, spec: GallerySpec, perturbation: Perturbation, path: Path) -> None:
    """Raises InputError for a row that this gallery cannot take; one with an error has nothing to check."""
    where = f"{path}: {row.name}"
    if not isinstance(row.record[names.IMAGE], str) or not row.name:
        raise InputError(f"{path} has an image without a name; write the column {names.IMAGE}", code="vectors-name")
    check_maker(row, spec, where)
    if row.error is not None:
        return
    sets = len(image_sets(0 if row.boxes is None else len(row.boxes), perturbation))
    check_vectors(row.vectors, (sets * spec.queries, spec.width), f"{where} has {names.QUERY_EMBEDS}")
    lengths = np.linalg.norm(row.vectors.astype(np.float64), axis=1)  # type: ignore[union-attr]
    if (worst := float(np.abs(lengths - 1).max())) > UNIT_TOLERANCE:
        raise InputError(
            f"{where} has vectors whose length differs from 1 by {worst:.3g}; expected unit length as EncodeImages "
            "gives them: encode the image again",
            code="vectors-not-unit",
        )
    if row.tokens is not None:
        check_vectors(row.tokens, (spec.tokens, spec.channels), f"{where} has {names.IMAGE_EMBEDS}")


def check_maker(row: Row, spec: GallerySpec, where: str) -> None:
    """Raises InputError unless the gallery's bundle and settings made this row."""
    if row.record[names.BUNDLE] != spec.identity:
        raise InputError(
            f"{where} was encoded with the bundle {str(row.record[names.BUNDLE])[:12]}, this one is "
            f"{spec.identity[:12]}; pass the bundle that encoded it, or encode the images again",
            code="vectors-other-bundle",
        )
    try:
        made = json.loads(row.record[names.PERTURBATION])
        differing = [key for key, value in spec.perturbation.items() if key != "semantics" and made[key] != value]
    except (TypeError, ValueError, KeyError) as error:
        raise InputError(
            f"{where} does not say with which perturbation settings it was encoded ({error!r}); encode it again",
            code="vectors-perturbation",
        ) from error
    if differing:
        shown = ", ".join(f"{key} {made[key]!r} (now {spec.perturbation[key]!r})" for key in differing)
        raise InputError(
            f"{where} was encoded with other perturbation settings: {shown}; encode the images again with these",
            code="vectors-perturbation",
        )


def check_vectors(found: npt.NDArray[Any] | None, shape: tuple[int, int], what: str) -> None:
    """Raises InputError unless there are finite numbers of this shape."""
    if found is None or found.shape != shape:
        got = "none" if found is None else str(list(found.shape))
        raise InputError(
            f"{what} {got}, expected {list(shape)}; encode the image again with this bundle", code="vectors-shape"
        )
    if not np.isfinite(found).all():
        raise InputError(f"{what} with NaN or infinity; encode the image again", code="vectors-not-finite")
