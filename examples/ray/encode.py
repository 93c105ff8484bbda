"""Encode a folder of pictures, or Parquet, on as many machines as a Ray cluster has.

    pip install 'qpert[cpu,ray]'
    python examples/ray/encode.py BUNDLE pictures/ vectors/
    qpert index BUNDLE --from vectors/ --out gallery

Vectors are written as Parquet while the job runs. A worker that dies is replaced and its images are encoded again; a
job that is stopped goes on where it was when the same command is run again. The bundle, the pictures and OUT have to be
at the same paths on every machine.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read at the import

import pyarrow.parquet as pq
import ray

from qpert.runtime.batch import EncodeImages
from qpert.runtime.errors import InputError, QpertError
from qpert.runtime.gallery.box_json import boxes_to_json
from qpert.runtime.gallery.entries import list_images, with_boxes

BATCHES_A_FILE = 4


def finished(out: Path) -> set[str]:
    """Names of the images whose vectors are in OUT. A file that a stopped job has not finished is deleted.

    Ray's own checkpoints are not used: they leave out finished rows of what Ray reads, not of rows made here.
    """
    names: set[str] = set()
    for path in sorted(out.glob("*.parquet")):
        try:
            names |= set(pq.read_table(path, columns=["image"])["image"].to_pylist())
        except (OSError, ValueError):  # pyarrow's own errors are ValueErrors
            print(f"{path} was not finished: deleted, its images are encoded again", file=sys.stderr)
            path.unlink()
    return names


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("bundle", type=Path, help="what `qpert export` made")
    parser.add_argument(
        "source", type=Path, help="a folder of pictures, a .txt list, LAVIS annotation JSON, or Parquet"
    )
    parser.add_argument("out", type=Path, help="the folder for the vectors; the same one resumes")
    parser.add_argument("--boxes", type=Path, help="a box file, as for `qpert index`")
    parser.add_argument("--image", default="bytes", help="Parquet: the column of file bytes or paths (bytes)")
    parser.add_argument("--name", default="path", help="Parquet: the column of unique names (path)")
    parser.add_argument("--box-column", help="Parquet: the column of boxes")
    parser.add_argument("--features", action="store_true", help="keep image tokens too, for re-ranking without files")
    parser.add_argument("--provider", default="cpu", help="cpu, or cuda: one GPU for each actor")
    parser.add_argument("--batch", type=int, default=32, help="images of a call (32)")
    parser.add_argument("--actors", type=int, default=2, help="processes that encode (2)")
    parser.add_argument("--address", help="of a running cluster; without it Ray starts on this machine")
    parser.add_argument("--memory", type=int, default=512, help="MB of shared memory where Ray starts here (512)")
    return parser.parse_args()


def dataset_of(options: argparse.Namespace, done: set[str]) -> tuple[ray.data.Dataset | None, dict[str, Any]]:
    """The images that are not done, None if all are, and which columns `EncodeImages` is to read."""
    if options.source.suffix == ".parquet" or any(options.source.glob("*.parquet")):
        columns = {"image": options.image, "name": options.name, "boxes": options.box_column}
        data = ray.data.read_parquet(str(options.source.absolute()))
        return data.filter(lambda row: row[columns["name"]] not in done) if done else data, columns
    entries = [entry for entry in list_images(options.source).entries if entry.name not in done]
    if options.boxes is not None and entries:
        entries = with_boxes(list_images(options.source).entries, options.boxes)
        entries = [entry for entry in entries if entry.name not in done]
    rows = [
        {
            "image": entry.name,
            "file": str(entry.path.absolute()),
            "boxes": boxes_to_json(entry.boxes),
            "captions": list(entry.captions),
        }
        for entry in entries
    ]
    captions = "captions" if any(entry.captions for entry in entries) else None
    blocks = max(1, len(rows) // (BATCHES_A_FILE * options.batch))
    data = ray.data.from_items(rows, override_num_blocks=blocks) if rows else None
    return data, {"image": "file", "name": "image", "boxes": "boxes", "captions": captions}


def resources(options: argparse.Namespace) -> dict[str, float]:
    """Of one actor. Together they leave a core: where they take all, nothing is left to read with, and Ray waits for
    ever without a word."""
    if options.provider == "cuda":
        return {"num_gpus": 1}
    cores = float(ray.cluster_resources()["CPU"])
    return {"num_cpus": min(1.0, max(cores - 1, 0.5) / options.actors)}


def encode(options: argparse.Namespace) -> dict[str, Any]:
    """Run the job; returns what was done."""
    began = time.monotonic()
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = sys.stderr.isatty()
    done = finished(options.out)
    data, columns = dataset_of(options, done)
    report = {"out": str(options.out), "found": len(done)}
    if data is None:
        return report | {"seconds": 0.0}
    settings = columns | {"features": options.features, "provider": options.provider}
    encoded = data.map_batches(
        EncodeImages,
        fn_constructor_args=[str(options.bundle.absolute())],
        fn_constructor_kwargs=settings,
        batch_size=options.batch,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=options.actors),
        **resources(options),
    )
    encoded.write_parquet(str(options.out.absolute()))
    return report | {"seconds": round(time.monotonic() - began, 1)}


def main() -> int:
    options = arguments()
    try:
        EncodeImages(options.bundle)  # a wrong bundle is said here, not by a worker
        if not options.source.exists():
            raise InputError(f"{options.source} does not exist; expected pictures or Parquet", code="image-source")
        local = {} if options.address else {"object_store_memory": options.memory << 20, "include_dashboard": False}
        ray.init(address=options.address, log_to_driver=False, **local)
        print(json.dumps(encode(options)))
    except QpertError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
