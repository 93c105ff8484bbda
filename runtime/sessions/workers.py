"""How many calls run at the same time, and how many threads each may use: the cores are shared, not fought over."""

from __future__ import annotations

from qpert.runtime.benchmark.machine import usable_cores


def worker_count(provider: str, asked: int = 0) -> int:
    """`asked`, or where that is 0 two on a CPU, so that the host's work on one batch (decoding, preprocessing, writing)
    overlaps the graphs of another; one on a GPU and in OpenVINO, whose sessions run one call at a time."""
    return asked or (min(2, usable_cores()) if provider == "cpu" else 1)


def thread_count(workers: int, asked: int = 0) -> int:
    """CPU threads of an operator: `asked`, or where that is 0 the cores divided among the workers."""
    return asked or max(1, usable_cores() // workers)
