"""How fast `qpert serve` answers, beside the same calls in Python; what it does under mixed and hostile load.

    python benchmarks/serving.py qpert-blip2-demo-fp32 --out benchmarks/results/serving.json

Everything runs on this machine: the service in one process, clients in another, and in between, while the service is
idle, the direct loop: the same inputs through `Retriever` in as many threads as the service has workers, with the same
threads an operator. Rounds take turns, and each figure is the median of its rounds. Loads are bounded.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import math
import multiprocessing
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from qpert.runtime import Retriever
from qpert.runtime.benchmark.machine import describe_machine
from qpert.runtime.cli import run
from qpert.runtime.gallery.catalogue import open_catalogue
from qpert.runtime.retrieval.scores import final_scores, itc_scores
from qpert.runtime.scenes.writer import write_dataset

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from running_service import RunningService, data_uri

CLIENTS = (1, 8, 32)
WORKERS = 2
RERANKED = 8
Request = tuple[str, bytes]
"""A path, and the JSON that is posted there."""


async def one_client(port: int, requests: Sequence[Request], until: float, found: list[tuple[float, int]]) -> None:
    """Asks again and again on one connection: (seconds, status) of each answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for number in range(1_000_000):
        if time.perf_counter() > until:
            break
        path, body = requests[number % len(requests)]
        began = time.perf_counter()
        head = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}", "", ""]
        writer.write("\r\n".join(head).encode() + body)
        await writer.drain()
        answer = await reader.readuntil(b"\r\n\r\n")
        length = next(int(line[15:]) for line in answer.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        await reader.readexactly(length)
        found.append((time.perf_counter() - began, int(answer[9:12])))
    writer.close()


def clients(port: int, each: Sequence[Sequence[Request]], seconds: float, pipe: Any) -> None:
    """In a process of its own: one connection for each list of requests."""

    async def all_of_them() -> tuple[list[tuple[float, int]], float]:
        found: list[tuple[float, int]] = []
        began = time.perf_counter()
        await asyncio.gather(*(one_client(port, requests, began + seconds, found) for requests in each))
        return found, time.perf_counter() - began

    pipe.send(asyncio.run(all_of_them()))


def load(port: int, each: Sequence[Sequence[Request]], seconds: float) -> tuple[list[tuple[float, int]], float]:
    """(seconds, status) of every answer, and how long it took in all."""
    mine, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=clients, args=(port, each, seconds, theirs))
    process.start()
    result: tuple[list[tuple[float, int]], float] = mine.recv()
    process.join()
    return result


def direct(call: Callable[[int], object], seconds: float) -> float:
    """Calls a second, in as many threads as the service has workers."""
    until = time.perf_counter() + seconds

    def loop(first: int) -> int:
        number = first
        while time.perf_counter() < until:
            call(number)
            number += WORKERS
        return (number - first) // WORKERS

    began = time.perf_counter()
    with ThreadPoolExecutor(WORKERS) as pool:
        return sum(pool.map(loop, range(WORKERS))) / (time.perf_counter() - began)


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, math.ceil(share * len(values)) - 1)]


def post(path: str, body: object) -> Request:
    return path, json.dumps(body).encode()


def compare(
    service: RunningService, work: dict[str, tuple[list[Request], Callable[[int], object]]], options: Any
) -> list[Any]:
    """Rows of requests a second and milliseconds, by kind of request and number of clients."""
    rows = []
    for kind, (requests, call) in work.items():
        rounds: dict[int, list[dict[str, float]]] = {count: [] for count in CLIENTS}
        baseline = []
        for _ in range(options.rounds):
            baseline.append(direct(call, options.seconds))
            for count in CLIENTS:
                each = [requests[n % len(requests) :] + requests[: n % len(requests)] for n in range(count)]
                answers, took = load(service.port, each, options.seconds)
                assert {status for _, status in answers} == {200}, "the service refused"
                times = [seconds for seconds, _ in answers]
                figures = {
                    "per_second": len(times) / took,
                    "p50": percentile(times, 0.5),
                    "p99": percentile(times, 0.99),
                }
                rounds[count].append(figures)
        for count, found in rounds.items():
            median = {name: statistics.median(one[name] for one in found) for name in found[0]}
            rows.append(
                {
                    "kind": kind,
                    "clients": count,
                    "per_second": round(median["per_second"], 1),
                    "p50_ms": round(median["p50"] * 1e3, 2),
                    "p99_ms": round(median["p99"] * 1e3, 2),
                    "direct_per_second": round(statistics.median(baseline), 1),
                    "ratio": round(median["per_second"] / statistics.median(baseline), 3),
                }
            )
            print(rows[-1], file=sys.stderr)
    return rows


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


def resident(service: RunningService) -> float:
    return int(Path(f"/proc/{service.process.pid}/statm").read_text().split()[1]) * 4096 / 1e6


def soak(bundle: Path, gallery: Path, pictures: Sequence[bytes], total: int) -> dict[str, Any]:
    """Good and bad requests of every kind, eight at a time, and 20 slow clients that never finish a body."""
    rng = random.Random(7)
    with closing(io.BytesIO()) as stream:
        Image.new("RGB", (1, 1)).save(stream, "PNG")
        tiny = stream.getvalue()

    def request() -> Request:
        text = " ".join(rng.choices("red blue cup star left of a large small wall".split(), k=rng.randint(1, 50)))  # noqa: SIM905
        good = data_uri(rng.choice(pictures))
        boxes = [[rng.randint(0, 50), 5, rng.randint(60, 100), 90] for _ in range(rng.randint(0, 8))]
        kinds: list[Callable[[], Request]] = [
            lambda: post("/v1/embeddings", {"input": [text] * rng.randint(1, 8), "encoding_format": "base64"}),
            lambda: post("/v1/embeddings", {"input": {"image": good, "boxes": boxes}, "encoding_format": "base64"}),
            lambda: post("/v1/search", {"text": text, "k": rng.randint(1, 20), "rerank": rng.choice([0, 8, 64])}),
            lambda: post("/v1/rerank", {"query": text, "documents": [{"image": good}] * 3}),
            lambda: post("/v1/embeddings", {"input": {"image": data_uri(tiny)}}),
            lambda: post(
                "/v1/embeddings", {"input": {"image": data_uri(rng.choice(pictures)[: rng.randint(1, 3000)])}}
            ),
            lambda: post("/v1/embeddings", {"input": rng.choice(["", " ", 3, None, {}, "x" * 20_000])}),
            lambda: ("/v1/search", rng.randbytes(rng.randint(1, 200))),
            lambda: post(
                "/v1/embeddings", {"input": {"image": good, "boxes": [[rng.uniform(-9, 9) for _ in range(4)]]}}
            ),
        ]
        return rng.choice(kinds)()

    service = RunningService(bundle, "--gallery", gallery).wait_until_ready()
    statuses: dict[int, int] = {}
    memory = [resident(service)]
    slow = threading.Thread(target=slow_clients, args=(service.port, 20))
    slow.start()
    while sum(statuses.values()) < total:
        answers, _ = load(service.port, [[request() for _ in range(120)] for _ in range(8)], 15.0)
        for _, status in answers:
            statuses[status] = statuses.get(status, 0) + 1
        memory.append(resident(service))
        print(sum(statuses.values()), statuses, round(memory[-1]), file=sys.stderr)
    ready = service.client.get("/health/ready").status_code
    slow.join()
    code = service.stop()
    return {
        "requests": sum(statuses.values()),
        "statuses": dict(sorted(statuses.items())),
        "megabytes": [round(one) for one in memory],
        "ready_afterwards": ready == 200,
        "exit_code": code,
        "tracebacks": sum("Traceback" in line for line in service.lines),
    }


def slow_clients(port: int, count: int) -> None:
    """Each sends a byte a second of a body of a thousand, until it is turned away."""

    async def slow() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n")
        for _ in range(60):
            writer.write(b" ")
            try:
                await writer.drain()
                await asyncio.wait_for(reader.read(1), 1.0)
                break
            except asyncio.TimeoutError:
                continue
            except ConnectionError:
                break
        writer.close()

    async def all_of_them() -> None:
        await asyncio.gather(*(slow() for _ in range(count)))

    asyncio.run(all_of_them())


def kills(bundle: Path, folder: Path, pictures: Sequence[bytes], count: int) -> dict[str, int]:
    """SIGKILL under writes, again and again: pictures that were acknowledged, and those of them that are gone."""
    acknowledged: set[str] = set()
    lost: set[str] = set()
    rng = random.Random(11)
    for turn in range(count):
        service = RunningService(bundle, "--gallery", folder).wait_until_ready()

        def write(writer: int, service: RunningService = service, turn: int = turn) -> None:
            import httpx

            with httpx.Client(base_url=service.url, timeout=60, trust_env=False) as client:
                for number in range(1_000):
                    name = f"{turn}-{writer}-{number}.jpg"
                    body = {"images": [{"name": name, "image": data_uri(pictures[number % len(pictures)])}]}
                    try:
                        if client.post("/v1/images", json=body).status_code == 200:
                            acknowledged.add(name)
                    except httpx.TransportError:
                        return

        threads = [threading.Thread(target=write, args=(writer,)) for writer in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(rng.uniform(0.2, 1.0))
        service.kill()
        for thread in threads:
            thread.join()
        with closing(open_catalogue(folder)) as catalogue:
            lost |= acknowledged - {record.name for record in catalogue.images()}
    return {"kills": count, "acknowledged": len(acknowledged), "lost": len(lost)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--out", type=Path, help="write the figures here")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each load")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--soak", type=int, default=20_000, help="requests of the mixed load")
    parser.add_argument("--kills", type=int, default=50)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_dataset(folder / "scenes", "test", 256)
        files = sorted((folder / "scenes").rglob("*.jpg"))
        gallery = folder / "gallery"
        assert run(["index", str(options.bundle), str(files[0].parent), "--out", str(gallery)]) == 0
        figures: dict[str, Any] = {"machine": describe_machine(), "bundle": options.bundle.name}
        figures |= measure(options, folder, gallery, files)
    if options.out is not None:
        options.out.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


def measure(options: Any, folder: Path, gallery: Path, files: Sequence[Path]) -> dict[str, Any]:
    texts = [f"a {size} {colour} {thing}" for size in ("small", "large") for colour in ("red", "blue", "green", "grey")
             for thing in ("circle", "star", "cup on a wall", "square left of a round thing")]  # fmt: skip
    pictures = [path.read_bytes() for path in files]
    images = [{"image": data_uri(data)} for data in pictures]
    service = RunningService(options.bundle, "--gallery", gallery, "--workers", WORKERS).wait_until_ready()
    threads = max(1, (describe_machine()["cores"]) // WORKERS)
    with (
        Retriever.open(options.bundle, threads=threads, spin=False) as retriever,
        retriever.open_gallery(gallery) as opened,
    ):

        def decoded(number: int) -> Any:
            return Image.open(io.BytesIO(base64.b64decode(images[number % len(images)]["image"].partition(",")[2])))

        def rerank(number: int) -> Any:
            features = retriever.encode_images([decoded(number + n) for n in range(RERANKED)])
            itc = itc_scores(features.query_embeds, retriever.encode_texts([texts[number % len(texts)]]))
            return final_scores(retriever.itm_scores(features, [texts[number % len(texts)]]), itc)

        kept = {"encoding_format": "base64"}
        work: dict[str, tuple[list[Request], Callable[[int], object]]] = {
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
                    post("/v1/rerank", {"query": text, "documents": [images[n + m] for m in range(RERANKED)]})
                    for n, text in enumerate(texts)
                ],
                rerank,
            ),
        }
        found: dict[str, Any] = {"rows": compare(service, work, options)}
    service.stop()
    found["first_and_tenth_ms"] = first_and_tenth(options.bundle, gallery, work, options.rounds)
    if options.soak:
        found["soak"] = soak(options.bundle, gallery, pictures, options.soak)
    if options.kills:
        found["kill_9"] = kills(options.bundle, folder / "written", pictures, options.kills)
    return found


if __name__ == "__main__":
    main()
