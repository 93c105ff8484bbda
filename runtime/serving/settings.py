"""The settings of a service, and its limits."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path

from qpert.runtime.detection.choice import DetectorChoice
from qpert.runtime.errors import InputError
from qpert.runtime.sessions.workers import thread_count, worker_count
from qpert.runtime.stores.address import StoreAddress

LENGTH_STEP = 4
"""Texts are padded to a multiple of this many tokens: BLIP-2's 35 give nine lengths, so that memory does not grow with
ever new ones, and texts of similar length share a call. Twice as many made searches slower by a tenth: their pairs are
padded too."""


@dataclass(frozen=True)
class Limits:
    """What one client, and all together, may ask for.

    body_bytes: of a request's body. picture_bytes: of one picture, decoded from base64. pixels: width × height of one
    picture. inputs: texts and pictures of one request. characters: of one text. results: `k` and `rerank` of a search.
    queue: texts and pictures that wait for a worker, of all requests. requests: requests that are being answered.
    seconds: from a request's arrival to its answer, or to the refusal in its place.
    """

    body_bytes: int = 64 << 20
    picture_bytes: int = 16 << 20
    pixels: int = 50_000_000
    inputs: int = 64
    characters: int = 10_000
    results: int = 1_000
    queue: int = 512
    requests: int = 256
    seconds: float = 30.0

    def __post_init__(self) -> None:
        if self.queue < self.inputs:
            raise InputError(
                f"--max-queue is {self.queue} and --max-inputs {self.inputs}; expected a queue that can hold one "
                "request at least",
                code="serve-queue",
            )


@dataclass(frozen=True)
class Settings:
    """One service.

    workers: batches that run at the same time; 0 chooses. threads: CPU threads of an operator; 0 divides the cores
    among the workers. token: what clients have to send as `Authorization: Bearer …`; empty for none. origins: pages of
    other sites that may call the service (CORS). names: host names that a service of this machine alone answers to,
    besides this machine's own: those of a proxy in front of it. url_hosts: hosts from which pictures may be fetched.
    pictures: where pictures sent to `POST /v1/images` are kept. detector: finds the boxes of pictures that come
    without; max_boxes: as many of them, the best. store: a vector store instead of a gallery, and features: the gallery
    that has the features of its pictures.
    """

    bundle: Path
    gallery: Path | None = None
    store: StoreAddress | None = None
    features: Path | None = None
    provider: str = "cpu"
    host: str = "127.0.0.1"
    port: int = 8000
    workers: int = 0
    threads: int = 0
    token: str = field(default="", repr=False)
    origins: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    url_hosts: tuple[str, ...] = ()
    pictures: Path | None = None
    detector: DetectorChoice = field(default_factory=DetectorChoice)
    max_boxes: int | None = None
    limits: Limits = field(default_factory=Limits)

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the service."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def worker_count(self) -> int:
        return worker_count(self.provider, self.workers)

    @property
    def thread_count(self) -> int:
        return thread_count(self.worker_count, self.threads)
