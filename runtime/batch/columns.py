"""The columns in which encoded images travel, in memory and in Parquet.

| column | Arrow type | holds |
| --- | --- | --- |
| `image` | string | the image's unique name |
| `path` | string | its file; its name where it came as bytes or pixels |
| `file_bytes`, `modified` | int64 | of the file; `modified` in nanoseconds, 0 where it came as bytes |
| `sha256` | string | of the file's bytes |
| `boxes` | string, nullable | the boxes as JSON, as a gallery keeps them |
| `captions` | list of strings | only where asked for |
| `query_embeds` | list of E float32, nullable | Q vectors, unit length; S·Q with a query set for each box |
| `image_embeds` | list of C numbers, nullable | N image tokens in the bundle's feature dtype, only where asked for |
| `error` | string, nullable | why there are no vectors |
| `bundle`, `perturbation` | string | what encoded it: `bundle_identity`, and the settings as JSON |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qpert.runtime.errors import UnavailableError

IMAGE = "image"
PATH = "path"
FILE_BYTES = "file_bytes"
MODIFIED = "modified"
SHA256 = "sha256"
BOXES = "boxes"
CAPTIONS = "captions"
QUERY_EMBEDS = "query_embeds"
IMAGE_EMBEDS = "image_embeds"
ERROR = "error"
BUNDLE = "bundle"
PERTURBATION = "perturbation"

RECORD = (IMAGE, PATH, FILE_BYTES, MODIFIED, SHA256, BOXES)
"""What is known of an image before it is encoded."""
REQUIRED = (*RECORD, QUERY_EMBEDS, ERROR, BUNDLE, PERTURBATION)
"""What `qpert index --from` reads; captions and image tokens may come along."""

Columns = dict[str, list[Any]]


def load_pyarrow() -> Any:
    """The module `pyarrow`. Raises UnavailableError where it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UnavailableError(
            "vectors in Arrow or Parquet need pyarrow, not installed here; pip install 'qpert[parquet]'",
            code="missing-extra",
        ) from error
    return pyarrow


@dataclass(frozen=True)
class Widths:
    """What the vectors of a bundle look like: E, C and the dtype of image tokens. `captions`, `tokens`: whether there
    are columns of them."""

    vector: int
    token: int
    token_dtype: str
    captions: bool
    tokens: bool


def schema(widths: Widths) -> Any:
    """The Arrow schema of a batch; the same for every batch, one of failures too."""
    pa = load_pyarrow()
    fields = [(IMAGE, pa.string()), (PATH, pa.string()), (FILE_BYTES, pa.int64()), (MODIFIED, pa.int64())]
    fields += [(SHA256, pa.string()), (BOXES, pa.string())]
    fields += [(CAPTIONS, pa.list_(pa.string()))] if widths.captions else []
    fields += [(QUERY_EMBEDS, pa.list_(pa.list_(pa.float32(), widths.vector)))]
    if widths.tokens:
        token = pa.from_numpy_dtype(np.dtype(widths.token_dtype))
        fields += [(IMAGE_EMBEDS, pa.list_(pa.list_(token, widths.token)))]
    return pa.schema([*fields, (ERROR, pa.string()), (BUNDLE, pa.string()), (PERTURBATION, pa.string())])


def to_arrow(columns: Columns, widths: Widths) -> Any:
    """Columns as a `pyarrow.Table`."""
    pa = load_pyarrow()
    wanted = schema(widths)
    arrays = [
        matrices_to_arrow(columns[field.name], field.type)
        if field.name in (QUERY_EMBEDS, IMAGE_EMBEDS)
        else pa.array(columns[field.name], field.type)
        for field in wanted
    ]
    return pa.Table.from_arrays(arrays, schema=wanted)


def matrices_to_arrow(matrices: Sequence[npt.NDArray[Any] | None], kind: Any) -> Any:
    """Matrices [rows, width] of one width, some of them None, as an array of lists of rows."""
    pa = load_pyarrow()
    width = kind.value_type.list_size
    rows = [0 if matrix is None else len(matrix) for matrix in matrices]
    present = [matrix for matrix in matrices if matrix is not None]
    flat = np.concatenate(present).reshape(-1) if present else np.empty(0, kind.value_type.value_type.to_pandas_dtype())
    values = pa.FixedSizeListArray.from_arrays(pa.array(flat, kind.value_type.value_type), width)
    offsets = pa.array(np.concatenate([[0], np.cumsum(rows)]).astype(np.int32))
    missing = pa.array([matrix is None for matrix in matrices], pa.bool_())
    return pa.ListArray.from_arrays(offsets, values, mask=missing)


def to_numpy(columns: Columns) -> dict[str, npt.NDArray[Any]]:
    """Columns as NumPy arrays: `int64` for numbers, objects for all else; a matrix or None for each image."""
    return {name: object_array(values) if name not in (FILE_BYTES, MODIFIED) else np.array(values, np.int64)
            for name, values in columns.items()}  # fmt: skip


def object_array(values: Sequence[Any]) -> npt.NDArray[Any]:
    """One object for each value: NumPy alone would make one array of matrices that happen to have one shape."""
    array = np.empty(len(values), object)
    for place, value in enumerate(values):
        array[place] = value
    return array


def given_columns(batch: Any, names: Sequence[str]) -> Mapping[str, Sequence[Any]] | None:
    """The named columns of a batch of any kind as sequences; None where one is missing."""
    if is_arrow(batch):
        return {name: batch.column(name).to_pylist() for name in names} if set(names) <= {*batch.column_names} else None
    return {name: batch[name] for name in names} if all(name in batch for name in names) else None


def is_arrow(batch: object) -> bool:
    """Whether a batch is a `pyarrow.Table` or `RecordBatch`, without loading the library."""
    return type(batch).__module__.partition(".")[0] == "pyarrow"
