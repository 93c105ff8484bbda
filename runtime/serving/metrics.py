"""What `/metrics` tells Prometheus."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
ROWS = (1, 2, 4, 8, 16, 32, 64)
CONTENT_TYPE = CONTENT_TYPE_LATEST


class Metrics:
    """Counters of one service; labels are few and fixed, whatever clients send."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        self.requests = Counter("qpert_requests", "requests answered", ["route", "method", "status"], registry=registry)
        self.latency = Histogram(
            "qpert_request_seconds", "from a request's head to the end of its answer", ["route"], buckets=SECONDS,
            registry=registry,
        )  # fmt: skip
        self.active = Gauge("qpert_requests_active", "requests that are being answered", registry=registry)
        self.rows = Histogram(
            "qpert_batch_rows", "texts or pictures of a batch", ["work"], buckets=ROWS, registry=registry
        )
        self.queued = Histogram(
            "qpert_queue_seconds", "what a job waited for a worker", ["work"], buckets=SECONDS, registry=registry
        )
        self.running = Histogram(
            "qpert_batch_seconds", "what a batch took in its worker", ["work"], buckets=SECONDS, registry=registry
        )
        self.refusals = Counter(
            "qpert_refused", "requests refused: queue, requests, deadline, body, token, origin", ["reason"],
            registry=registry,
        )  # fmt: skip
        self.waiting = Gauge("qpert_queue_rows", "texts and pictures that wait for a worker", registry=registry)
        self.images = Gauge("qpert_gallery_images", "pictures in the gallery", registry=registry)
        self.ready = Gauge("qpert_ready", "1 where /health/ready says 200", registry=registry)

        # Looking a label up takes longer than counting.
        self._requests, self._latency = cache(self.requests.labels), cache(self.latency.labels)
        self._rows, self._queued, self._running = map(
            cache, (self.rows.labels, self.queued.labels, self.running.labels)
        )

    def answered(self, route: str, method: str, status: int, seconds: float) -> None:
        """`seconds`: from the request's head to the end of its answer."""
        self._requests(route, method, str(status)).inc()
        self._latency(route).observe(seconds)

    def batch(self, work: str, rows: int, waited: Sequence[float]) -> None:
        self._rows(work).observe(rows)
        for seconds in waited:
            self._queued(work).observe(seconds)

    def ran(self, work: str, seconds: float) -> None:
        self._running(work).observe(seconds)

    def refused(self, reason: str) -> None:
        self.refusals.labels(reason).inc()

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)
