"""What `qpert serve` does under a long mixed load, and when it is killed: memory, statuses, what was acknowledged."""

from __future__ import annotations

import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
from http_load import slow_clients

from qpert.runtime.gallery.catalogue import open_catalogue

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from mixed_load import drawn_pictures, drive, growth, mixed_request, resident
from running_service import RunningService, data_uri

WINDOW = 500
"""Requests between two looks at the memory."""


def soak(bundle: Path, gallery: Path, total: int) -> dict[str, Any]:
    """Good and bad requests of every kind, eight at a time, beside 20 clients that never finish a body.

    `growth_mb`: of the second half, by a straight line.
    """
    rng = random.Random(7)
    pictures = drawn_pictures(rng, 60)
    service = RunningService(bundle, "--gallery", gallery).wait_until_ready()
    memory, statuses, began = [resident(service.process.pid)], Counter[int](), time.perf_counter()
    slow = threading.Thread(target=slow_clients, args=(service.port, 20, 60.0))
    slow.start()
    while statuses.total() < total:
        statuses += drive(service, [mixed_request(rng, pictures) for _ in range(WINDOW)])
        memory.append(resident(service.process.pid))
        print(statuses.total(), dict(statuses), round(memory[-1]), file=sys.stderr)
    took = time.perf_counter() - began
    ready = service.client.get("/health/ready").status_code
    slow.join()
    code = service.stop()
    return {
        "requests": statuses.total(),
        "seconds": round(took),
        "statuses": dict(sorted(statuses.items())),
        "every": WINDOW,
        "megabytes": [round(one, 1) for one in memory],
        "growth_mb": round(growth(memory[len(memory) // 2 :]), 1),
        "ready_afterwards": ready == 200,
        "exit_code": code,
        "tracebacks": sum("Traceback" in line for line in service.lines),
    }


def kills(bundle: Path, folder: Path, pictures: Sequence[bytes], count: int) -> dict[str, int]:
    """SIGKILL under writes, again and again: pictures that were acknowledged, and those of them that are gone."""
    acknowledged: set[str] = set()
    lost: set[str] = set()
    rng = random.Random(11)
    for turn in range(count):
        service = RunningService(bundle, "--gallery", folder).wait_until_ready()

        def write(writer: int, service: RunningService = service, turn: int = turn) -> None:
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
