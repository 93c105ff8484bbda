"""Encode a folder of pictures with Daft: the callable of `examples/ray`, in other processes.

pip install 'qpert[cpu,daft]'
python examples/daft/encode.py BUNDLE pictures/ vectors/
qpert index BUNDLE --from vectors/ --out gallery
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("DAFT_ANALYTICS_ENABLED", "0")  # read at the import

import daft
import pyarrow as pa

from qpert.runtime.batch import EncodeImages
from qpert.runtime.errors import QpertError
from qpert.runtime.gallery.box_json import boxes_to_json
from qpert.runtime.gallery.entries import list_images, with_boxes


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("bundle", type=Path, help="what `qpert export` made")
    parser.add_argument("source", type=Path, help="a folder of pictures, a .txt list or LAVIS annotation JSON")
    parser.add_argument("out", type=Path, help="the folder for the vectors, new")
    parser.add_argument("--boxes", type=Path, help="a box file, as for `qpert index`")
    parser.add_argument("--features", action="store_true", help="keep image tokens too, for re-ranking without files")
    parser.add_argument("--provider", default="cpu", help="cpu or cuda")
    parser.add_argument("--processes", type=int, default=2, help="that encode (2)")
    return parser.parse_args()


def encoder_of(options: argparse.Namespace) -> tuple[Any, list[str]]:
    """`EncodeImages` as a Daft class, of which each process gets a pickled copy, and the names of its columns."""
    encode = EncodeImages(
        options.bundle, image="file", name="image", boxes="boxes", features=options.features, provider=options.provider
    )
    kind = daft.DataType.from_arrow_type(pa.struct(list(encode.schema)))

    @daft.cls(max_concurrency=options.processes, use_process=True)
    class Encode:
        def __init__(self, encode: EncodeImages) -> None:
            self.encode = encode

        @daft.method.batch(return_dtype=kind, batch_size=32)
        def __call__(self, image: daft.Series, file: daft.Series, boxes: daft.Series) -> Any:
            columns = {"image": image, "file": file, "boxes": boxes}
            table = pa.table({name: column.to_arrow() for name, column in columns.items()})
            return self.encode(table).to_struct_array().combine_chunks()

    return Encode(encode), encode.schema.names


def encode(options: argparse.Namespace) -> dict[str, Any]:
    """Run the job; returns what was done."""
    began = time.monotonic()
    entries = list_images(options.source).entries
    if options.boxes is not None:
        entries = tuple(with_boxes(entries, options.boxes))
    frame = daft.from_pydict(
        {
            "image": [entry.name for entry in entries],
            "file": [str(entry.path.absolute()) for entry in entries],
            "boxes": pa.array([boxes_to_json(entry.boxes) for entry in entries], pa.string()),
        }
    )
    encoder, names = encoder_of(options)
    encoded = frame.select(encoder(daft.col("image"), daft.col("file"), daft.col("boxes")).alias("row"))
    encoded.select(*(daft.col("row")[name].alias(name) for name in names)).write_parquet(str(options.out))
    return {"out": str(options.out), "images": len(entries), "seconds": round(time.monotonic() - began, 1)}


def main() -> int:
    options = arguments()
    try:
        print(json.dumps(encode(options)))
    except QpertError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
