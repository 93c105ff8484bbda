"""A queue in front of a few worker threads, from which requests that go together are run together.

What waits is taken as soon as a worker is free: nothing waits for company, and under load company is there. Jobs go
together that ask for the same work with the same key (such as a padded length); a worker takes its share of them, so
that the others, which are soon free, find the rest. The runtime's results do not depend on the batch, so batching is
invisible but for the time that it saves.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from qpert.runtime.errors import QpertError
from qpert.runtime.serving.errors import BusyError, status_of

Results = list[Any]
"""Of each payload its result, or the exception that it gave."""
FAILED_IN_A_ROW = 3
"""Batches in a row that failed through no fault of their requests before the service calls itself broken."""
STALLED_SECONDS = 120.0
"""A batch that runs for longer is taken to hang."""


@dataclass(frozen=True)
class Work:
    """Something that workers do: `run` takes the payloads of up to `most` rows (texts, pictures) and gives a result
    each. Where `exclusive`, one batch of it runs at a time."""

    name: str
    run: Callable[[list[Any]], Results]
    most: int
    exclusive: bool = False


class Watcher(Protocol):
    """Hears what the queue does, for metrics."""

    def batch(self, work: str, rows: int, waited: Sequence[float]) -> None: ...

    def ran(self, work: str, seconds: float) -> None: ...

    def refused(self, reason: str) -> None: ...


@dataclass(eq=False)
class Job:
    """What one caller waits for: `rows` texts or pictures."""

    work: Work
    key: Hashable
    payload: Any
    rows: int
    queued: float
    answer: asyncio.Future[Any]


NOT_OURS = ("gallery-locked", "store-unreachable", "store-image-gone")
"""Codes of failures that the workers are no reason for; whether a store answers is asked anew by each probe."""


class Scheduler:
    """Owns the worker threads. All methods but the work itself run in the event loop's thread."""

    def __init__(self, workers: int, most_rows: int, watcher: Watcher) -> None:
        self.most_rows, self.watcher = most_rows, watcher
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="qpert-worker")
        self._workers = self._free = workers
        self._waiting: list[Job] = []
        self._running: dict[int, tuple[str, float]] = {}  # by the number of the batch
        self._batches = self._failed = 0

    @property
    def waiting_rows(self) -> int:
        return sum(job.rows for job in self._waiting)

    @property
    def trouble(self) -> str | None:
        """Why nothing can be expected of the workers at the moment, or None."""
        longest = max((time.monotonic() - began for _, began in self._running.values()), default=0.0)
        if longest > STALLED_SECONDS:
            return f"a batch has been running for {longest:.0f} s"
        if self._failed >= FAILED_IN_A_ROW:
            return f"the last {self._failed} batches failed"
        return None

    async def run(self, work: Work, jobs: Sequence[tuple[Hashable, Any, int]], deadline: float) -> list[Any]:
        """Wait for several jobs (key, payload, rows) of one request; results in order.

        Raises:
            BusyError: there is no room in the queue, or no result by `deadline` (of `time.monotonic`).
            whatever the work raised for one of the jobs.
        """
        loop, now = asyncio.get_running_loop(), time.monotonic()
        rows = sum(rows for *_, rows in jobs)
        if (waiting := self.waiting_rows) + rows > self.most_rows:
            self.watcher.refused("queue")
            raise BusyError(
                f"{waiting} texts and pictures are waiting and there is room for {self.most_rows}; try again",
                code="queue-full",
            )
        added = [Job(work, key, payload, rows, now, loop.create_future()) for key, payload, rows in jobs]
        self._waiting += added
        self._dispatch()
        late = loop.call_later(max(0.0, deadline - now), self._expire, added)
        try:
            return [await job.answer for job in added]
        finally:  # also where the client has gone: what has not begun need not be done
            late.cancel()
            self._withdraw(added)

    def _expire(self, jobs: Sequence[Job]) -> None:
        late = [job for job in jobs if not job.answer.done()]
        if late:
            self.watcher.refused("deadline")
        for job in late:
            job.answer.set_exception(BusyError("the request was not answered in time; try again", code="deadline"))

    def _withdraw(self, jobs: Sequence[Job]) -> None:
        """Nobody waits for these any more."""
        for job in jobs:
            if not job.answer.cancel() and not job.answer.cancelled():
                job.answer.exception()  # asyncio logs errors that nobody has looked at
        gone = {id(job) for job in jobs}
        self._waiting = [job for job in self._waiting if id(job) not in gone]

    def _dispatch(self) -> None:
        """Give waiting jobs to free workers, the oldest first and with it what can go along."""
        loop = asyncio.get_running_loop()
        while self._free and (batch := self._next_batch()):
            taken = {id(job) for job in batch}
            self._waiting = [job for job in self._waiting if id(job) not in taken]
            self._free -= 1
            self._batches += 1
            work, began = batch[0].work, time.monotonic()
            self._running[self._batches] = work.name, began
            self.watcher.batch(work.name, sum(job.rows for job in batch), [began - job.queued for job in batch])
            self._pool.submit(self._run, loop, self._batches, batch)

    def _run(self, loop: asyncio.AbstractEventLoop, number: int, batch: Sequence[Job]) -> None:
        """In a worker."""
        try:
            results = run_batch(batch[0].work, [job.payload for job in batch])
        except BaseException as error:  # noqa: BLE001, the worker is free again whatever has happened
            results = [error] * len(batch)
        loop.call_soon_threadsafe(self._finish, number, batch, results)

    def _next_batch(self) -> list[Job]:
        busy = {name for name, _ in self._running.values()}
        first = next((job for job in self._waiting if not (job.work.exclusive and job.work.name in busy)), None)
        if first is None:
            return []
        alike = [job for job in self._waiting if job.work is first.work and job.key == first.key]
        share = -(-sum(job.rows for job in alike) // self._workers)
        batch, rows = [first], first.rows
        for job in alike:
            if job is not first and rows + job.rows <= min(first.work.most, share):
                batch.append(job)
                rows += job.rows
        return batch

    def _finish(self, number: int, batch: Sequence[Job], results: Results) -> None:
        work, began = self._running.pop(number)
        self._free += 1
        self.watcher.ran(work, time.monotonic() - began)
        self._failed = self._failed + 1 if all(map(is_our_fault, results)) else 0
        for job, result in zip(batch, results, strict=True):
            if job.answer.done():  # its client has gone, or the deadline passed
                continue
            if isinstance(result, BaseException):
                job.answer.set_exception(result)
            else:
                job.answer.set_result(result)
        self._dispatch()

    async def close(self) -> None:
        """Wait for what runs, and end the threads."""
        await asyncio.get_running_loop().run_in_executor(None, self._pool.shutdown)


def run_batch(work: Work, payloads: list[Any]) -> Results:
    """In a worker: the results, and where the batch fails, of each payload alone, so that one spoils no other."""
    try:
        return work.run(payloads)
    except Exception as error:  # noqa: BLE001, handed to whoever waits for it
        if len(payloads) == 1:
            return [error]
    return [result for payload in payloads for result in run_batch(work, [payload])]


def is_our_fault(result: object) -> bool:
    """Whether a result is an error that no request can be blamed for."""
    if isinstance(result, QpertError):
        return status_of(result) >= 500 and result.code not in NOT_OURS
    return isinstance(result, BaseException)
