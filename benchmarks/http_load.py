"""Clients in a process of their own that ask a service on this machine again and again, and what that costs."""

from __future__ import annotations

import asyncio
import math
import multiprocessing
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Request = tuple[str, bytes]
"""A path, and the JSON that is posted there; nothing to post is a GET."""


@dataclass(frozen=True)
class Load:
    """`answers`: (seconds, status) of each. `seconds` in all; `cpu`: processor seconds of the clients' process."""

    answers: Sequence[tuple[float, int]]
    seconds: float
    cpu: float

    @property
    def times(self) -> list[float]:
        return [seconds for seconds, _ in self.answers]

    @property
    def per_second(self) -> float:
        return len(self.answers) / self.seconds


class Client(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self, requests: Sequence[bytes], until: float, found: list[tuple[float, int]]) -> None:
        self.requests, self.until, self.found = requests, until, found
        self.number, self.began, self.left, self.status, self.head = 0, 0.0, -1, 0, b""
        self.done = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.ask()

    def ask(self) -> None:
        if time.perf_counter() > self.until:
            self.transport.close()
            return
        self.began, self.left, self.head = time.perf_counter(), -1, b""
        self.transport.write(self.requests[self.number % len(self.requests)])
        self.number += 1

    def data_received(self, data: bytes) -> None:
        if self.left < 0:
            self.head += data
            head, found, data = self.head.partition(b"\r\n\r\n")
            if not found:
                return
            self.status = int(head[9:12])
            lines = head.lower().split(b"\r\n")
            self.left = next(int(line[15:]) for line in lines if line.startswith(b"content-length:"))
        self.left -= len(data)
        if self.left == 0:
            self.found.append((time.perf_counter() - self.began, self.status))
            self.ask()

    def connection_lost(self, error: Exception | None) -> None:
        self.done.set_result(None)


def http_of(request: Request) -> bytes:
    path, body = request
    kind = ["Content-Type: application/json", f"Content-Length: {len(body)}"] if body else []
    head = [f"{'POST' if body else 'GET'} {path} HTTP/1.1", "Host: localhost", *kind, "", ""]
    return "\r\n".join(head).encode() + body


def clients(port: int, each: Sequence[Sequence[Request]], seconds: float, pipe: Any) -> None:
    """In a process of its own: one connection for each list of requests."""
    prepared = [[http_of(request) for request in requests] for requests in each]

    async def all_of_them() -> Load:
        found: list[tuple[float, int]] = []
        began, used = time.perf_counter(), time.process_time()
        loop = asyncio.get_running_loop()
        made = [
            (await loop.create_connection(lambda own=own: Client(own, began + seconds, found), "127.0.0.1", port))[1]  # type: ignore[misc]
            for own in prepared
        ]
        await asyncio.gather(*(one.done for one in made))
        return Load(found, time.perf_counter() - began, time.process_time() - used)

    pipe.send(asyncio.run(all_of_them()))


def load(port: int, each: Sequence[Sequence[Request]], seconds: float) -> Load:
    """As many clients as there are lists of requests, each asking its own over and over for `seconds`."""
    mine, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=clients, args=(port, each, seconds, theirs))
    process.start()
    result: Load = mine.recv()
    process.join()
    return result


def processor_seconds(pid: int) -> float:
    """Of a process and all its threads so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, math.ceil(share * len(values)) - 1)]


async def slow_client(port: int, seconds: float) -> None:
    """Sends a byte a second of a body of a thousand, until it is turned away."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n")
    for _ in range(int(seconds)):
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


def slow_clients(port: int, count: int, seconds: float) -> None:
    async def all_of_them() -> None:
        await asyncio.gather(*(slow_client(port, seconds) for _ in range(count)))

    asyncio.run(all_of_them())
