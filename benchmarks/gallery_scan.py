"""How long the scan of a gallery takes, against NumPy in float32, and whether it finds the same 64 images.

    python benchmarks/gallery_scan.py --out benchmarks/results/gallery_scan.json

Synthetic galleries of the full size, 32 vectors of 256 numbers an image, in clusters that share a direction as a
model's embeddings do. Each time is a median; the ratio is to NumPy (one matrix product in float32, maximum over the
queries, best 64) in the same run, turn by turn; beside it the time of reading the codes, which no scan of them can beat
(the bits of all words are joined, in one thread a core). Embeddings lie in memory-mapped files, as in a gallery. The
kernels of NumPy's BLAS are named in the result: run it with `OPENBLAS_CORETYPE` unset.
"""

from __future__ import annotations

import argparse
import datetime
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qpert.runtime.benchmark.machine import describe_machine, usable_cores
from qpert.runtime.gallery.scan import Codes, Nearest, encode_codes, nearest

QUERIES, WIDTH, TOP = 32, 256, 64
CLUSTERS, SPREAD, SHARED = 500, 0.05, 0.7
"""Cosines inside a cluster are near 0.8, across clusters near 0.3."""
BLOCK = 2000
TIE = 2e-6
"""Scores nearer than this are one score to float32."""

ASLEEP = 0.1
"""Seconds before each measurement: OpenBLAS's threads wait for more work at full speed for some 25 ms, which would be
counted, and felt, in what comes after a product."""

Floats = npt.NDArray[np.float32]


def unit(array: npt.NDArray[Any]) -> Floats:
    return np.asarray(array / np.linalg.norm(array, axis=-1, keepdims=True), np.float32)


def make_gallery(folder: Path, images: int, rng: np.random.Generator) -> tuple[Floats, Codes]:
    """float32 [n, Q, E] and its codes, in files."""
    shape = (images, QUERIES, WIDTH)
    vectors = np.memmap(folder / "vectors", np.float32, "w+", shape=shape)
    codes = np.memmap(folder / "codes", np.uint8, "w+", shape=shape)
    stats = np.empty((images, 3), np.float32)
    centres = unit(rng.standard_normal((CLUSTERS, QUERIES, WIDTH))) + SHARED * unit(rng.standard_normal(WIDTH))
    for start in range(0, images, BLOCK):
        count = min(BLOCK, images - start)
        noise = rng.standard_normal((count, QUERIES, WIDTH), np.float32)
        part = unit(centres[rng.integers(0, CLUSTERS, count)] + SPREAD * noise)
        found = encode_codes(part)
        vectors[start : start + count], codes[start : start + count] = part, found.codes
        stats[start : start + count] = found.stats
    return vectors, Codes(codes, stats)


def make_texts(vectors: Floats, count: int, rng: np.random.Generator) -> Floats:
    """Each near one vector of some image."""
    rows = np.sort(rng.integers(0, len(vectors), count))
    picked = vectors[rows, rng.integers(0, QUERIES, count)]
    return unit(picked + SPREAD * rng.standard_normal(picked.shape))


def numpy_scan(vectors: Floats, texts: Floats) -> list[npt.NDArray[np.int64]]:
    """The baseline: what one writes in NumPy, in blocks, so that memory does not decide."""
    scores = np.empty((len(texts), len(vectors)), np.float32)
    for start in range(0, len(vectors), BLOCK):
        block = vectors[start : start + BLOCK]
        products = block.reshape(-1, WIDTH) @ texts.T  # [block·Q, T]
        scores[:, start : start + BLOCK] = products.reshape(len(block), QUERIES, -1).max(axis=1).T
    best = [np.argpartition(-row, TOP)[:TOP] for row in scores]
    return [rows[np.argsort(-row[rows], kind="stable")] for rows, row in zip(best, scores, strict=True)]


def read(codes: npt.NDArray[np.uint8]) -> None:
    """Every byte once, by all cores."""

    def part(start: int, stop: int) -> None:
        np.bitwise_or.reduce(codes[start:stop].reshape(-1).view(np.uint64))

    bounds = np.linspace(0, len(codes), 4 * usable_cores() + 1).astype(int)
    with ThreadPoolExecutor(usable_cores()) as pool:
        list(pool.map(part, bounds[:-1], bounds[1:]))


def times_ms(works: Sequence[Callable[[], object]], repeats: int) -> npt.NDArray[np.float64]:
    """[works, repeats, 2]: wall and processor milliseconds. The works take turns, so that a machine that is busy for a
    while is busy for all of them; processor time is over all threads, and does not count what others keep the machine
    from doing."""
    times = np.empty((len(works), repeats + 1, 2))
    for turn in range(repeats + 1):
        for number, work in enumerate(works):
            time.sleep(ASLEEP)
            wall, processor = time.perf_counter(), time.process_time()
            work()
            times[number, turn] = time.perf_counter() - wall, time.process_time() - processor
    return 1e3 * times[:, 1:]  # the first turn brings files and kernels in


def same_top(vectors: Floats, texts: Floats, fast: Nearest, exact: list[npt.NDArray[np.int64]]) -> int:
    """For how many texts the fast scan's images are the exact scan's, up to scores that float32 cannot tell apart."""
    same = 0
    for text, rows, expected in zip(texts, fast.rows, exact, strict=True):
        floor = float((vectors[expected[-1]].astype(np.float64) @ text).max())
        strangers = set(rows.tolist()) - set(expected.tolist())
        same += all((vectors[row].astype(np.float64) @ text).max() >= floor - TIE for row in strangers)
    return same


def measure(vectors: Floats, codes: Codes, texts: Floats, repeats: int) -> dict[str, Any]:
    works = {
        "fast": lambda: nearest(vectors, texts, TOP, codes=codes),
        "exact": lambda: nearest(vectors, texts, TOP, exact=True),
        "numpy_float32": lambda: numpy_scan(vectors, texts),
        "reading_codes": lambda: read(codes.codes),
    }
    times = dict(zip(works, times_ms(list(works.values()), repeats), strict=True))
    same = same_top(vectors, texts, nearest(vectors, texts, TOP, codes=codes), numpy_scan(vectors, texts))
    ratio, ratio_cpu = np.median(times["numpy_float32"] / times["fast"], axis=0)  # of each turn
    return {
        "images": len(vectors),
        "queries": len(texts),
        **{
            f"{name}_{unit}": round(value, 1)
            for name, own in times.items()
            for unit, value in zip(("ms", "cpu_ms"), np.median(own, axis=0).tolist(), strict=True)
        },
        "ratio": round(float(ratio), 2),
        "ratio_cpu": round(float(ratio_cpu), 2),
        "fast_over_reading": round(float(np.median(times["fast"][:, 0] / times["reading_codes"][:, 0])), 2),
        "queries_with_the_exact_top_64": same,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    parser.add_argument("--images", type=int, nargs="+", default=[20_000, 100_000])
    parser.add_argument("--queries", type=int, nargs="+", default=[1, 2, 3, 4, 16, 256])
    parser.add_argument("--repeats", type=int, nargs="+", default=[15, 7, 7, 7, 7, 3], help="for each of --queries")
    parser.add_argument("--note", default="", help="said in the result, of a busy machine for instance")
    options = parser.parse_args()
    machine = describe_machine()  # first: the load must be that of others
    rows = []
    for images in options.images:
        rng = np.random.default_rng(0)
        with tempfile.TemporaryDirectory() as folder:
            vectors, codes = make_gallery(Path(folder), images, rng)
            texts = make_texts(vectors, max(options.queries), rng)
            for count, repeats in zip(options.queries, options.repeats, strict=True):
                rows.append(measure(vectors, codes, texts[:count], repeats))
                print(json.dumps(rows[-1]), flush=True)
            del vectors, codes
    result = {
        "what": f"the best {TOP} images of a text; {QUERIES} vectors of {WIDTH} an image, {CLUSTERS} clusters",
        "rows": rows,
        "bytes_an_image": {
            "float32 embeddings, mapped from disk": 4 * QUERIES * WIDTH,
            "8-bit codes, mapped from disk, read whole by a scan": QUERIES * WIDTH + 12,
        },
        "machine": machine,
        "note": options.note,
        "simsimd": version("simsimd"),
        "when": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
