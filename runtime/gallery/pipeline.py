"""A few threads that compute results ahead of the consumer, which takes them in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

AHEAD = 2
"""Results that may wait for each worker: enough to work on while one shard is written, and a bound on memory."""


@contextmanager
def ordered(work: Callable[[T], R], items: Sequence[T], workers: int) -> Iterator[Iterator[R]]:
    """`map(work, items)`, by `workers` threads; by the caller's own where that is 1.

    An error of `work` is raised where its result would be taken. When the block ends early, what has not begun is left
    out and what has is waited for.
    """
    if workers == 1:
        yield map(work, items)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="qpert-index")
    try:
        yield _results(pool, work, items, workers * AHEAD)
    finally:
        pool.shutdown(cancel_futures=True)


def _results(pool: ThreadPoolExecutor, work: Callable[[T], R], items: Sequence[T], ahead: int) -> Iterator[R]:
    left = iter(items)
    waiting: deque[Future[R]] = deque(pool.submit(work, item) for item in islice(left, ahead))
    while waiting:
        result = waiting.popleft().result()
        waiting.extend(pool.submit(work, item) for item in islice(left, 1))
        yield result
