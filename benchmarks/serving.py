"""How fast `qpert serve` answers, beside the same calls in Python; what it does under mixed and hostile load.

    python benchmarks/serving.py qpert-blip2-demo-fp32 --out benchmarks/results/serving.json
    python benchmarks/serving.py … --part speed --kind text     # a part alone; the others stay in the file as they are

Everything runs on this machine: the service in one process, clients in another, and in between, while the service is
idle, the direct loop: the same inputs through `Retriever` in as many threads as the service has workers, with the same
threads an operator. Rounds take turns, and each figure is the median of its rounds. Loads are bounded.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from qpert.runtime import Retriever
from qpert.runtime.benchmark.machine import describe_machine
from qpert.runtime.cli import run
from qpert.runtime.retrieval.scores import final_scores, itc_scores
from qpert.runtime.scenes.writer import write_dataset

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from http_load import Request, load, percentile, processor_seconds, slow_clients
from running_service import RunningService, data_uri
from serving_hardship import kills, soak

CLIENTS = (1, 8, 32)
WORKERS = 2
COMPARED = 8
"""Clients at which the service is to reach 0.9 of the direct loop."""
SLOW = 20
RERANKED = 8
KINDS = ("text", "image", "search", "rerank")
Work = tuple[list[Request], Callable[[int], object]]
"""Requests, and the same in Python by number."""
PARTS = ("speed", "first", "soak", "kills")


def direct(call: Callable[[int], object], seconds: float) -> tuple[float, float]:
    """Calls a second in as many threads as the service has workers, and microseconds of processor time a call."""
    until = time.perf_counter() + seconds

    def loop(first: int) -> int:
        number = first
        while time.perf_counter() < until:
            call(number)
            number += WORKERS
        return (number - first) // WORKERS

    began, used = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(WORKERS) as pool:
        count = sum(pool.map(loop, range(WORKERS)))
    return count / (time.perf_counter() - began), (time.process_time() - used) / count * 1e6


def post(path: str, body: object) -> Request:
    return path, json.dumps(body).encode()


def compare(service: RunningService, work: dict[str, Work], options: Any) -> list[Any]:
    """Rows of requests a second, milliseconds and processor time, by kind of request and number of clients."""
    rows = []
    for kind, (requests, call) in work.items():
        rounds: dict[int, list[dict[str, float]]] = {count: [] for count in CLIENTS}
        baseline = []
        for _ in range(options.rounds):
            baseline.append(direct(call, options.seconds))
            for count in CLIENTS:
                rounds[count].append(one_load(service, requests, count, options.seconds))
        alone, alone_cpu = (statistics.median(column) for column in zip(*baseline, strict=True))
        for count, found in rounds.items():
            median = {name: statistics.median(one[name] for one in found) for name in found[0]}
            rows.append({"kind": kind, "clients": count} | {name: round(value, 2) for name, value in median.items()})
            direct_row = {"direct_per_second": round(alone, 1), "direct_cpu_us": round(alone_cpu)}
            rows[-1] |= direct_row | {"ratio": round(median["per_second"] / alone, 3)}
            print(rows[-1], file=sys.stderr)
    return rows


def one_load(service: RunningService, requests: list[Request], count: int, seconds: float) -> dict[str, float]:
    """`server_cpu_us` and `client_cpu_us`: processor time of a request, in microseconds."""
    each = [requests[n % len(requests) :] + requests[: n % len(requests)] for n in range(count)]
    used = processor_seconds(service.process.pid)
    found = load(service.port, each, seconds)
    used = processor_seconds(service.process.pid) - used
    assert {status for _, status in found.answers} == {200}, "the service refused"
    return {
        "per_second": found.per_second,
        "p50_ms": percentile(found.times, 0.5) * 1e3,
        "p99_ms": percentile(found.times, 0.99) * 1e3,
        "server_cpu_us": used / len(found.answers) * 1e6,
        "client_cpu_us": found.cpu / len(found.answers) * 1e6,
    }


def most_possible(rows: Sequence[dict[str, Any]], route: dict[str, float], cores: int) -> dict[str, float]:
    """By kind, the ratio to the direct loop that a server would reach whose own work is that of a route that does
    nothing: the direct loop's work, that route's and the clients' on all cores, which are never idle."""
    return {
        row["kind"]: round(
            cores
            * 1e6
            / (row["direct_cpu_us"] + route["server_cpu_us"] + row["client_cpu_us"])
            / row["direct_per_second"],
            3,
        )
        for row in rows
        if row["clients"] == COMPARED
    }


def beside_slow_clients(service: RunningService, requests: list[Request], seconds: float) -> dict[str, Any]:
    """Eight clients with and without 20 others that never finish a body."""
    without = one_load(service, requests, COMPARED, seconds)
    slow = threading.Thread(target=slow_clients, args=(service.port, SLOW, seconds + 2))
    slow.start()
    time.sleep(1.0)
    beside = one_load(service, requests, COMPARED, seconds)
    slow.join()
    figures = ("per_second", "p50_ms", "p99_ms")
    return {
        name: {key: round(one[key], 2) for key in figures} for name, one in (("without", without), ("beside", beside))
    }


def first_and_tenth(bundle: Path, gallery: Path, work: dict[str, Any], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of the first and of the tenth request after a start; medians over starts."""
    found: dict[str, list[list[float]]] = {kind: [] for kind in work}
    for _ in range(rounds):
        for kind, (requests, _call) in work.items():
            service = RunningService(bundle, "--gallery", gallery).wait_until_ready()
            times = []
            for _ in range(10):
                path, body = requests[0]
                began = time.perf_counter()
                service.client.post(path, content=body, headers={"content-type": "application/json"})
                times.append((time.perf_counter() - began) * 1e3)
            found[kind].append([times[0], times[9]])
            service.stop()
    return {kind: np.round(np.median(pairs, axis=0), 2).tolist() for kind, pairs in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--out", type=Path, help="write the figures here")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each load")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--part", choices=PARTS, action="append", help="this part alone [default: all]")
    parser.add_argument("--kind", choices=KINDS, action="append", help="of the part speed: this kind alone")
    parser.add_argument("--images", type=int, default=256, help="scenes in the gallery")
    parser.add_argument("--soak", type=int, default=20_000, help="requests of the mixed load")
    parser.add_argument("--kills", type=int, default=50)
    options = parser.parse_args()
    figures: dict[str, Any] = {}
    if options.out is not None and options.out.exists() and options.part:
        figures = json.loads(options.out.read_text())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_dataset(folder / "scenes", "test", options.images)
        files = sorted((folder / "scenes").rglob("*.jpg"))
        gallery = folder / "gallery"
        assert run(["index", str(options.bundle), str(files[0].parent), "--out", str(gallery)]) == 0
        figures |= {"machine": describe_machine(), "bundle": options.bundle.name}
        for part in options.part or PARTS:
            figures |= measure(part, options, folder, gallery, [path.read_bytes() for path in files])
    if options.out is not None:
        options.out.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


def measure(part: str, options: Any, folder: Path, gallery: Path, pictures: Sequence[bytes]) -> dict[str, Any]:
    if part == "soak":
        return {"soak": soak(options.bundle, gallery, options.soak)}
    if part == "kills":
        return {"kill_9": kills(options.bundle, folder / "written", pictures, options.kills)}
    cores = describe_machine()["cores"]
    with (
        Retriever.open(options.bundle, threads=max(1, cores // WORKERS), spin=False) as retriever,
        retriever.open_gallery(gallery) as opened,
    ):
        work = work_of(retriever, opened, [{"image": data_uri(data)} for data in pictures], options.kind or KINDS)
        if part == "first":
            return {"first_and_tenth_ms": first_and_tenth(options.bundle, gallery, work, options.rounds)}
        service = RunningService(options.bundle, "--gallery", gallery, "--workers", WORKERS).wait_until_ready()
        rows = compare(service, work, options)
        nothing = one_load(service, [("/health/live", b"")], COMPARED, options.seconds)
        found: dict[str, Any] = {
            "rows": rows,
            "route_without_work": {name: round(value, 2) for name, value in nothing.items()},
            "most_possible_ratio": most_possible(rows, nothing, cores),
        }
        if "text" in work:
            found["slow_clients"] = beside_slow_clients(service, work["text"][0], options.seconds)
        service.stop()
    return found


def work_of(retriever: Retriever, opened: Any, images: list[dict[str, str]], kinds: Sequence[str]) -> dict[str, Work]:
    """By kind: requests, and the same in Python by number."""
    texts = [f"a {size} {colour} {thing}" for size in ("small", "large") for colour in ("red", "blue", "green", "grey")
             for thing in ("circle", "star", "cup on a wall", "square left of a round thing")]  # fmt: skip

    def decoded(number: int) -> Any:
        return Image.open(io.BytesIO(base64.b64decode(images[number % len(images)]["image"].partition(",")[2])))

    def rerank(number: int) -> Any:
        features = retriever.encode_images([decoded(number + n) for n in range(RERANKED)])
        itc = itc_scores(features.query_embeds, retriever.encode_texts([texts[number % len(texts)]]))
        return final_scores(retriever.itm_scores(features, [texts[number % len(texts)]]), itc)

    kept = {"encoding_format": "base64"}
    work: dict[str, Work] = {
        "text": (
            [post("/v1/embeddings", {"input": text, **kept}) for text in texts],
            lambda number: retriever.encode_texts([texts[number % len(texts)]]),
        ),
        "image": (
            [post("/v1/embeddings", {"input": image, **kept}) for image in images[:64]],
            lambda number: retriever.encode_images([decoded(number)]),
        ),
        "search": (
            [post("/v1/search", {"text": text, "k": 10}) for text in texts],
            lambda number: retriever.search(texts[number % len(texts)], opened, k=10),
        ),
        "rerank": (
            [
                post(
                    "/v1/rerank", {"query": text, "documents": [images[(n + m) % len(images)] for m in range(RERANKED)]}
                )
                for n, text in enumerate(texts)
            ],
            rerank,
        ),
    }
    return {kind: work[kind] for kind in kinds}


if __name__ == "__main__":
    main()
