"""The queue by itself, with work that is watched: what goes together, what is refused, and what a failure spoils."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from qpert.runtime.errors import TextError, UnavailableError
from qpert.runtime.serving import batching
from qpert.runtime.serving.batching import Scheduler, Work
from qpert.runtime.serving.errors import BusyError

FAR = 60.0


class Watcher:
    def __init__(self):
        self.batches, self.refusals = [], []

    def batch(self, work, rows, waited):
        self.batches.append((work, rows))

    def ran(self, work, seconds):
        pass

    def refused(self, reason):
        self.refusals.append(reason)


class Gate:
    """Work that waits until it is let go; `calls` are the batches that ran."""

    def __init__(self, most=8, exclusive=False, name="gate"):
        self.open, self.calls = threading.Event(), []
        self.work = Work(name, self.run, most, exclusive)

    def run(self, payloads):
        self.calls.append(list(payloads))
        assert self.open.wait(FAR)
        return [payload * 10 for payload in payloads]


def deadline(seconds=FAR):
    return time.monotonic() + seconds


async def until(condition):
    for _ in range(6000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never came to that")


def scheduled(test, *, workers=1, most_rows=64):
    async def outer():
        scheduler = Scheduler(workers, most_rows, Watcher())
        await test(scheduler)
        await scheduler.close()

    asyncio.run(outer())


def test_what_waits_goes_together_by_key_oldest_first_and_within_the_limit():
    async def test(scheduler):
        gate = Gate(most=3)
        first = asyncio.create_task(scheduler.run(gate.work, [("a", 0, 1)], deadline()))
        await until(lambda: gate.calls)  # the only worker is busy: the rest waits
        later = [("a", 1, 1), ("b", 2, 1), ("a", 3, 1), ("a", 4, 1), ("a", 5, 1), ("b", 6, 1)]
        rest = [asyncio.create_task(scheduler.run(gate.work, [job], deadline())) for job in later]
        await until(lambda: scheduler.waiting_rows == 6)
        gate.open.set()
        assert [result for task in (first, *rest) for result in await task] == [0, 10, 20, 30, 40, 50, 60]
        assert gate.calls == [[0], [1, 3, 4], [2, 6], [5]]
        assert scheduler.watcher.batches == [("gate", 1), ("gate", 3), ("gate", 2), ("gate", 1)]

    scheduled(test)


def test_a_worker_takes_its_share_and_leaves_the_rest_to_the_others():
    async def test(scheduler):
        gate = Gate()
        first = [asyncio.create_task(scheduler.run(gate.work, [("a", n, 1)], deadline())) for n in (0, 1)]
        await until(lambda: len(gate.calls) == 2)  # both workers are busy
        rest = [asyncio.create_task(scheduler.run(gate.work, [("a", n, 1)], deadline())) for n in range(2, 7)]
        await until(lambda: scheduler.waiting_rows == 5)
        gate.open.set()
        assert [result for task in (*first, *rest) for result in await task] == [n * 10 for n in range(7)]
        assert [len(call) for call in gate.calls] == [1, 1, 3, 1, 1]

    scheduled(test, workers=2)


def test_nothing_waits_where_a_worker_is_free_and_jobs_of_one_request_are_one_batch():
    async def test(scheduler):
        gate = Gate()
        gate.open.set()
        assert await scheduler.run(gate.work, [("a", 1, 1), ("a", 2, 1), ("a", 3, 1)], deadline()) == [10, 20, 30]
        assert gate.calls == [[1, 2, 3]]

    scheduled(test)


def test_a_job_larger_than_a_batch_runs_alone():
    async def test(scheduler):
        gate = Gate(most=2)
        gate.open.set()
        assert await scheduler.run(gate.work, [("a", 1, 5), ("a", 2, 1)], deadline()) == [10, 20]
        assert gate.calls == [[1], [2]]

    scheduled(test)


def test_exclusive_work_runs_one_batch_at_a_time_while_other_work_goes_on():
    async def test(scheduler):
        alone, other = Gate(most=1, exclusive=True, name="alone"), Gate(name="other")
        other.open.set()
        tasks = [asyncio.create_task(scheduler.run(alone.work, [(None, n, 1)], deadline())) for n in (1, 2)]
        await until(lambda: alone.calls)
        assert await scheduler.run(other.work, [(None, 3, 1)], deadline()) == [30]
        assert alone.calls == [[1]]
        alone.open.set()
        assert [await task for task in tasks] == [[10], [20]]

    scheduled(test, workers=3)


def test_a_full_queue_refuses_and_keeps_what_it_has():
    async def test(scheduler):
        gate = Gate(most=1)
        tasks = [asyncio.create_task(scheduler.run(gate.work, [(None, n, 1)], deadline())) for n in range(5)]
        await until(lambda: scheduler.waiting_rows == 4)
        with pytest.raises(BusyError) as refused:
            await scheduler.run(gate.work, [(None, 9, 1)], deadline())
        assert refused.value.code == "queue-full"
        assert scheduler.watcher.refusals == ["queue"]
        gate.open.set()
        assert [await task for task in tasks] == [[0], [10], [20], [30], [40]]
        assert await scheduler.run(gate.work, [(None, 9, 1)], deadline()) == [90]

    scheduled(test, most_rows=4)


def test_a_job_whose_deadline_passes_is_refused_and_never_runs():
    async def test(scheduler):
        gate = Gate(most=1)
        running = asyncio.create_task(scheduler.run(gate.work, [(None, 1, 1)], deadline()))
        await until(lambda: gate.calls)
        with pytest.raises(BusyError) as refused:
            await scheduler.run(gate.work, [(None, 2, 1)], deadline(0.05))
        assert refused.value.code == "deadline"
        assert scheduler.waiting_rows == 0
        gate.open.set()
        assert await running == [10]
        assert gate.calls == [[1]]

    scheduled(test)


def test_a_cancelled_request_leaves_the_queue():
    async def test(scheduler):
        gate = Gate(most=1)
        running = asyncio.create_task(scheduler.run(gate.work, [(None, 1, 1)], deadline()))
        gone = asyncio.create_task(scheduler.run(gate.work, [(None, 2, 1), (None, 3, 1)], deadline()))
        await until(lambda: scheduler.waiting_rows == 2)
        gone.cancel()
        await until(lambda: scheduler.waiting_rows == 0)
        gate.open.set()
        assert await running == [10]
        assert gate.calls == [[1]]

    scheduled(test)


def test_one_bad_payload_fails_alone():
    def picky(payloads):
        if 2 in payloads:
            raise TextError("two is not a text", code="text-kind")
        return [payload * 10 for payload in payloads]

    async def test(scheduler):
        gate = Gate()
        busy = asyncio.create_task(scheduler.run(gate.work, [(None, 0, 1)], deadline()))
        await until(lambda: gate.calls)
        work = Work("picky", picky, 8)
        tasks = [asyncio.create_task(scheduler.run(work, [(None, n, 1)], deadline())) for n in (1, 2, 3)]
        await until(lambda: scheduler.waiting_rows == 3)
        gate.open.set()
        await busy
        good, bad, also_good = await asyncio.gather(*tasks, return_exceptions=True)
        assert (good, also_good) == ([10], [30])
        assert isinstance(bad, TextError)
        assert scheduler.watcher.batches[-1] == ("picky", 3)  # they did go together

    scheduled(test)


@pytest.mark.parametrize(
    ("error", "is_trouble"),
    [
        (UnavailableError("no memory", code="out-of-memory"), True),
        (RuntimeError("a bug"), True),
        (TextError("blank", code="text-blank"), False),
    ],
)
def test_the_service_calls_itself_broken_when_batches_fail_and_only_through_its_own_fault(error, is_trouble):
    def failing(payloads):
        raise error

    async def test(scheduler):
        work, gate = Work("failing", failing, 1), Gate()
        gate.open.set()
        for _ in range(batching.FAILED_IN_A_ROW):
            assert scheduler.trouble is None
            with pytest.raises(type(error)):
                await scheduler.run(work, [(None, 1, 1)], deadline())
        assert (scheduler.trouble is not None) is is_trouble
        await scheduler.run(gate.work, [(None, 1, 1)], deadline())
        assert scheduler.trouble is None, "one batch that works is the end of it"

    scheduled(test)


def test_the_service_calls_itself_broken_while_a_batch_hangs(monkeypatch):
    monkeypatch.setattr(batching, "STALLED_SECONDS", 0.01)

    async def test(scheduler):
        gate = Gate()
        task = asyncio.create_task(scheduler.run(gate.work, [(None, 1, 1)], deadline()))
        await until(lambda: scheduler.trouble is not None)
        assert "has been running" in scheduler.trouble
        gate.open.set()
        assert await task == [10]
        assert scheduler.trouble is None

    scheduled(test)
