"""`EncodeImages`: a batch of columns in, a batch of columns out, in whatever process it is called."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from qpert.runtime.batch import columns as names
from qpert.runtime.batch.columns import Columns, Widths, given_columns, is_arrow, to_arrow, to_numpy
from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.bundle.roles import IMAGE_TOKENS, IMAGE_VECTORS
from qpert.runtime.errors import BoxError, BundleError, ImageError, InputError, LimitError
from qpert.runtime.files import local_path, portable_name, sha256_of
from qpert.runtime.gallery.box_json import boxes_from_json, boxes_to_json
from qpert.runtime.gallery.spec import bundle_identity
from qpert.runtime.inputs.arguments import kind_of
from qpert.runtime.inputs.boxes import Boxes
from qpert.runtime.inputs.images import decode_image, load_image
from qpert.runtime.inputs.perturbation import Perturbation
from qpert.runtime.retrieval.encoder import Encoder, compatible

if TYPE_CHECKING:
    from PIL.Image import Image

OnError = Literal["column", "raise"]
IMAGES_AT_ONCE = 16
"""Decoded photographs held in memory (a batch of the image tower may be smaller)."""


@dataclass
class _Row:
    """One image on its way: what is known of it, its picture until it is encoded, and what came of it."""

    record: dict[str, Any]
    captions: Sequence[str] = ()
    image: Image | None = None
    boxes: Boxes | None = None
    error: str | None = None
    vectors: npt.NDArray[Any] | None = None
    tokens: npt.NDArray[Any] | None = field(default=None, repr=False)


class EncodeImages:
    """Encodes the images of a batch of columns. Can be pickled; each process opens the graphs at its first batch.

    Takes a mapping of columns (NumPy arrays or lists) and returns one of NumPy arrays; takes a `pyarrow.Table` and
    returns one of `schema`. Which columns come out: `qpert.runtime.batch.columns`. The vectors are those of
    `Retriever.encode_images`.

    Example (Ray Data; `examples/ray` is the whole program):
        >>> dataset.map_batches(EncodeImages, fn_constructor_args=["bundle"], batch_format="pyarrow",
        ...                     fn_constructor_kwargs={"image": "bytes", "name": "path"}, concurrency=2)
    """

    def __init__(
        self,
        bundle: str | Path,
        *,
        provider: str = "cpu",
        image: str = names.IMAGE,
        name: str | None = None,
        boxes: str | None = None,
        captions: str | None = None,
        features: bool = False,
        on_error: OnError = "column",
        perturbation: Perturbation | None = None,
        threads: int = 1,
    ) -> None:
        """Reads the bundle's manifest; opens no graph.

        Args:
            bundle: the bundle's folder, at the same path in every process.
            provider: as in `Retriever.open`.
            image: the column of pictures: paths, bytes of image files, or uint8 arrays [H, W, 3].
            name: the column of the images' unique names; may be left out where `image` holds paths.
            boxes: the column of boxes: rows of x1, y1, x2, y2 in pixels; or JSON as it comes out; None for none.
            captions: a column of lists of captions, which is carried along.
            features: also give the image tokens, from which a gallery re-ranks.
            on_error: `column` gives an image that cannot be encoded no vectors and the reason in the column `error`;
                `raise` stops at it.
            perturbation: other settings than the bundle's, as in `Retriever.open`.
            threads: CPU threads of an operator. One, because there are usually as many processes as cores.

        Raises:
            BundleError: not a bundle. InputError: settings that the graphs cannot follow; `on_error` is neither.
        """
        if on_error not in get_args(OnError):
            raise InputError(f"on_error is {on_error!r}; expected column or raise", code="on-error")
        opened = Bundle.open(bundle)
        manifest = opened.manifest
        self.bundle, self.provider, self.threads = opened.folder.absolute(), provider, threads
        self.image, self.name, self.boxes, self.captions = image, name, boxes, captions
        self.on_error = on_error
        self.perturbation = compatible(perturbation, opened)
        self.identity = bundle_identity(manifest)
        image_tokens = manifest.image_tower.output(IMAGE_TOKENS)
        self.widths = Widths(
            vector=int(manifest.query_head.output(IMAGE_VECTORS).shape[-1]),
            token=int(image_tokens.shape[-1]),
            token_dtype=image_tokens.dtype,
            captions=captions is not None,
            tokens=features,
        )
        self._forget()

    def _forget(self) -> None:
        self._encoder: Encoder | None = None
        self._opening = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_encoder", "_opening")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    @property
    def schema(self) -> Any:
        """The `pyarrow.Schema` of what comes out."""
        return names.schema(self.widths)

    @property
    def encoder(self) -> Encoder:
        """This process's own. Raises BundleError where another bundle lies at the path here."""
        with self._opening:
            if self._encoder is None:
                opened = Bundle.open(self.bundle)
                if bundle_identity(opened.manifest) != self.identity:
                    raise BundleError(
                        f"{self.bundle} is another bundle here than where the job was started; copy the bundle to "
                        "every machine",
                        code="bundle-replaced",
                    )
                self._encoder = Encoder(opened, self.provider, self.perturbation, threads=self.threads, spin=False)
            return self._encoder

    def close(self) -> None:
        """Release this process's graphs; the next batch opens them again."""
        if self._encoder is not None:
            self._encoder.close()
            self._forget()

    def __call__(self, batch: Any) -> Any:
        """Encode one batch of any number of images.

        Raises:
            InputError: no such batch or columns (`batch-kind`, `batch-columns`).
            ImageError, BoxError, LimitError: an image that cannot be encoded, with `on_error="raise"`.
        """
        given = self._columns(batch)
        cells = [dict(zip(given, values, strict=True)) for values in zip(*given.values(), strict=True)]
        rows: list[_Row] = []
        for start in range(0, len(cells), IMAGES_AT_ONCE):
            part = [self._prepared(cell) for cell in cells[start : start + IMAGES_AT_ONCE]]
            self._encode([row for row in part if row.error is None])
            rows += part
        result = self._result(rows)
        return to_arrow(result, self.widths) if is_arrow(batch) else to_numpy(result)

    def _columns(self, batch: Any) -> Mapping[str, Sequence[Any]]:
        if not isinstance(batch, Mapping) and not is_arrow(batch):
            raise InputError(
                f"the batch is a {kind_of(batch)}; expected a mapping of columns or a pyarrow.Table (in Ray Data "
                'batch_format="numpy" or "pyarrow")',
                code="batch-kind",
            )
        wanted = [name for name in (self.image, self.name, self.boxes, self.captions) if name is not None]
        found = given_columns(batch, wanted)
        if found is None:
            have = batch.column_names if is_arrow(batch) else list(batch)
            raise InputError(
                f"the batch has the columns {', '.join(map(str, have))}; expected {', '.join(wanted)}: name the "
                "columns that are there (image, name, boxes, captions)",
                code="batch-columns",
            )
        return found

    def _prepared(self, cell: Mapping[str, Any]) -> _Row:
        picture = cell[self.image]
        label = cell[self.name] if self.name is not None else picture
        if not isinstance(label, str | Path):
            raise InputError(
                f"an image has a {kind_of(label)} for a name; expected text: name the column of names (name)",
                code="image-name",
            )
        unknown = dict.fromkeys(names.RECORD) | {names.FILE_BYTES: 0, names.MODIFIED: 0}
        row = _Row(unknown | {names.IMAGE: portable_name(str(label))})
        if self.captions is not None:
            row.captions = [str(caption) for caption in some(cell[self.captions])]
        try:
            row.image = opened_image(picture, row.record[names.IMAGE])
            row.record |= file_record(picture, row.record[names.IMAGE])
            row.boxes = boxes_of_cell(None if self.boxes is None else cell[self.boxes], row.image.size)
            row.record[names.BOXES] = boxes_to_json(row.boxes)
            self.encoder.check_boxes(1, [row.boxes])
        except (ImageError, BoxError, LimitError) as error:
            if self.on_error == "raise":
                raise
            row.error = f"{error.code}: {error}"
        return row

    def _encode(self, rows: Sequence[_Row]) -> None:
        if not rows:
            return
        features = self.encoder.encode_images([row.image for row in rows if row.image], [row.boxes for row in rows])
        for place, row in enumerate(rows):
            row.image = None
            vectors = features.query_sets.of([place]).vectors.reshape(-1, self.widths.vector)
            finite = np.isfinite(vectors).all() and np.isfinite(features.image_embeds[place]).all()
            if finite:
                row.vectors = vectors
                row.tokens = features.image_embeds[place] if self.widths.tokens else None
                continue
            message = f"{row.record[names.IMAGE]} was encoded to NaN or infinity; verify the bundle (`qpert verify`)"
            if self.on_error == "raise":
                raise ImageError(message, code="image-not-finite")
            row.error = f"image-not-finite: {message}"

    def _result(self, rows: Sequence[_Row]) -> Columns:
        settings = json.dumps(self.perturbation.to_dict(), sort_keys=True)
        columns: Columns = {name: [row.record[name] for row in rows] for name in names.RECORD}
        if self.widths.captions:
            columns[names.CAPTIONS] = [list(row.captions) for row in rows]
        columns[names.QUERY_EMBEDS] = [row.vectors for row in rows]
        if self.widths.tokens:
            columns[names.IMAGE_EMBEDS] = [row.tokens for row in rows]
        columns[names.ERROR] = [row.error for row in rows]
        return columns | {names.BUNDLE: [self.identity] * len(rows), names.PERTURBATION: [settings] * len(rows)}


def some(cell: Any) -> Iterator[Any]:
    """What a cell of a list column holds; nothing where it is None."""
    return iter(() if cell is None else cell)


def file_record(picture: Any, name: str) -> dict[str, Any]:
    """Path, size, time and SHA-256 of one picture's file or bytes.

    Raises:
        ImageError: the file cannot be read.
    """
    if not isinstance(picture, str | Path):
        data = picture if isinstance(picture, bytes) else np.ascontiguousarray(picture).tobytes()
        found = {names.PATH: name, names.FILE_BYTES: len(data), names.MODIFIED: 0}
        return found | {names.SHA256: hashlib.sha256(data).hexdigest()}
    path = local_path(picture)
    try:
        state, digest = path.stat(), sha256_of(path)
    except OSError as error:
        raise ImageError(f"{path} cannot be read: {error.strerror}; check the path", code="image-missing") from error
    found = {names.PATH: portable_name(os.path.abspath(path)), names.FILE_BYTES: state.st_size}  # noqa: PTH100, no links
    return found | {names.MODIFIED: state.st_mtime_ns, names.SHA256: digest}


def opened_image(picture: Any, name: str) -> Image:
    """A cell of the image column as PIL RGB."""
    if isinstance(picture, bytes):
        return decode_image(picture, name=name)
    return load_image(local_path(picture) if isinstance(picture, str | Path) else picture, name=name)


def boxes_of_cell(cell: Any, size: tuple[int, int]) -> Boxes | None:
    """A cell of the box column as the boxes of a picture of `size` (width, height).

    Raises:
        BoxError: it holds no boxes, or the JSON of boxes of a picture of another size.
    """
    if cell is None or isinstance(cell, Boxes):
        return cell
    try:
        if isinstance(cell, str):
            boxes = boxes_from_json(cell)
        else:
            boxes = Boxes(np.array([list(box) for box in cell], np.float64).reshape(-1, 4), size)
    except (ValueError, TypeError, LookupError) as error:
        raise BoxError(
            f"boxes are {cell!r:.80}, expected rows of x1, y1, x2, y2 ({error})", code="box-shape"
        ) from error
    if boxes is not None and boxes.size != size:
        raise BoxError(
            f"the boxes are for a picture of {boxes.size[0]}×{boxes.size[1]} pixels, it has {size[0]}×{size[1]}; give "
            "boxes in the picture's own pixels (after EXIF rotation)",
            code="box-image-size",
        )
    return boxes
