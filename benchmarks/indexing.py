"""How fast `qpert index` is beside the sum of its parts.

    python benchmarks/indexing.py --out benchmarks/results/indexing.json

Scenes of the demonstration as JPEG files, indexed into new galleries by one worker that has all cores for an operator,
and by two that share them (what `qpert index` does on a CPU), in turns. The parts are those of one image: hashing and
decoding its file, preprocessing, `vision`, `image_query`, measured on the same batches, in one thread alone and in as
many threads at once as there are cores. A machine whose cores are all busy with the parts and nothing else would index
`cores / sum` images a second: the bound, of which the second is the one that a busy machine can reach.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpert.runtime.benchmark.machine import describe_machine, usable_cores
from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.bundle.roles import IMAGE_TOKENS, IMAGE_TOWER, PIXELS
from qpert.runtime.gallery.batches import IMAGES_AT_ONCE
from qpert.runtime.gallery.entries import read_entries
from qpert.runtime.gallery.indexing import index_images
from qpert.runtime.inputs.images import decode_image, load_image, preprocess_images
from qpert.runtime.retrieval.encoder import Encoder
from qpert.runtime.scenes import draw_scene, sample_scene

if TYPE_CHECKING:
    from PIL.Image import Image

PARTS_REPEATS = 25


def write_scenes(folder: Path, count: int) -> None:
    for number in range(count):
        draw_scene(sample_scene(f"indexing/{number}")).save(folder / f"{number:04}.jpg", quality=90)


def read(file: Path) -> tuple[str, Image]:
    content = file.read_bytes()
    return hashlib.sha256(content).hexdigest(), decode_image(content, name=str(file))


def busy_parts_ms(encoder: Encoder, folder: Path, repeats: int) -> dict[str, float]:
    """The same in a thread for every core at once: means over the threads of their medians."""
    cores = usable_cores()
    with ThreadPoolExecutor(cores) as pool:
        found = list(pool.map(lambda _: parts_ms(encoder, folder, repeats), range(cores)))
    return {name: round(statistics.mean(one[name] for one in found), 3) for name in found[0]}


def parts_ms(encoder: Encoder, folder: Path, repeats: int) -> dict[str, float]:
    """Milliseconds of one image in each part, in one thread; medians."""
    step = min(encoder.limit(IMAGE_TOWER, "B"), IMAGES_AT_ONCE)
    files = [entry.path for entry in read_entries(folder)][:step]
    images = [load_image(file) for file in files]
    pixels = preprocess_images(images, encoder.manifest.preprocessing)
    tower = encoder.graph(IMAGE_TOWER)
    tokens = tower.run({PIXELS: pixels})[IMAGE_TOKENS]
    works: dict[str, Callable[[], object]] = {
        "hash and decode": lambda: [read(file) for file in files],
        "preprocess": lambda: preprocess_images(images, encoder.manifest.preprocessing),
        "vision": lambda: tower.run({PIXELS: pixels}),
        "image_query": lambda: encoder.encode_features(tokens, [None] * len(images)),
    }
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(repeats + 1):
        for name, work in works.items():
            began = time.perf_counter()
            work()
            if turn:
                times[name].append(1e3 * (time.perf_counter() - began) / len(images))
    return {name: round(statistics.median(own), 3) for name, own in times.items()}


def index_per_second(bundle: Path, images: Path, folder: Path, workers: int, threads: int) -> float:
    with closing(Encoder(Bundle.open(bundle), "cpu", threads=threads, spin=workers == 1)) as encoder:
        encoder.encode_images([load_image(read_entries(images)[0].path)])
        began = time.perf_counter()
        found = index_images(folder, encoder, read_entries(images), workers=workers)
        return found.added / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--note", default="")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    cores = usable_cores()
    ways = {"one worker": (1, 0), f"{cores} workers": (cores, 1)}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as work:
        images = Path(work) / "images"
        images.mkdir()
        write_scenes(images, options.images)
        with closing(Encoder(Bundle.open(options.bundle), "cpu", threads=1)) as encoder:
            parts = parts_ms(encoder, images, PARTS_REPEATS)
            busy = busy_parts_ms(encoder, images, PARTS_REPEATS)
        for turn in range(options.repeats):
            for number, (name, (workers, threads)) in enumerate(ways.items()):
                gallery = Path(work) / f"gallery-{turn}-{number}"
                rates[name].append(index_per_second(options.bundle, images, gallery, workers, threads))
    bound, busy_bound = (cores * 1e3 / sum(one.values()) for one in (parts, busy))
    medians = {name: statistics.median(own) for name, own in rates.items()}
    result: dict[str, Any] = {
        "what": f"{options.images} scenes of the demonstration into a new gallery, features stored; medians",
        "parts_ms_an_image_in_one_thread": parts,
        "parts_ms_an_image_with_all_cores_busy": busy,
        "bound_images_per_second": {"alone": round(bound, 1), "all cores busy": round(busy_bound, 1)},
        "images_per_second": {name: round(value, 1) for name, value in medians.items()},
        "of_the_bound": {
            name: {"alone": round(value / bound, 3), "all cores busy": round(value / busy_bound, 3)}
            for name, value in medians.items()
        },
        "several_against_one": round(medians[f"{cores} workers"] / medians["one worker"], 2),
        "machine": describe_machine(),
        "note": options.note,
        "when": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }
    print(json.dumps(result, indent=2))
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
