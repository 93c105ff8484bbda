"""Running targets: so many inputs of each kind, with a watch on hangs and on memory."""

from __future__ import annotations

import faulthandler
import gc
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, given, seed, settings

from qpert.runtime import Boxes, Gallery, Retriever
from qpert.runtime.errors import QpertError, QpertWarning
from soak.targets import SIZE, Target

ROUND = 100
"""Inputs of one Hypothesis run: it remembers what it has tried, which would look like a leak."""
HANG_SECONDS = 60
"""Longer than this for one input of a few kilobytes is a hang, even on a loaded machine."""


@dataclass
class Outcome:
    """What became of the inputs of one kind."""

    accepted: int = 0
    refused: int = 0
    seconds: float = 0.0
    memory: list[int] = field(default_factory=list)

    @property
    def inputs(self) -> int:
        return self.accepted + self.refused


def soak(target: Target, count: int, first_seed: int, *, hang_seconds: float = HANG_SECONDS) -> Outcome:
    """Give a target at least `count` inputs. What is no QpertError comes out, shrunk by Hypothesis to its smallest.

    An input that hangs ends the process with every thread's traceback.
    """
    outcome, began = Outcome(), time.perf_counter()

    def attempt(value: Any) -> None:
        faulthandler.dump_traceback_later(hang_seconds, exit=True, file=sys.__stderr__)
        try:
            target.run(value)
            outcome.accepted += 1
        except QpertError as error:
            if not str(error):
                raise AssertionError("an error without a message") from error
            outcome.refused += 1
        finally:
            faulthandler.cancel_dump_traceback_later()

    round_number = 0
    while outcome.inputs < count:
        run_round(attempt, target, min(ROUND, count - outcome.inputs), first_seed + round_number)
        outcome.memory.append(resident_bytes())
        round_number += 1
    outcome.seconds = time.perf_counter() - began
    return outcome


def run_round(attempt: Callable[[Any], None], target: Target, count: int, number: int) -> None:
    """One Hypothesis run. Warnings of arithmetic are faults; the user's own warnings and other libraries' are not."""
    once = settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", RuntimeWarning)
        warnings.simplefilter("ignore", QpertWarning)
        seed(number)(once(given(target.strategy)(lambda value: attempt(value))))()


def resident_bytes() -> int:
    """Memory of this process that is in use now (Linux)."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def memory_growth(memory: list[int]) -> int:
    """Bytes by which the last fifth of the readings lies above the second fifth; medians. The first warms up."""
    fifth = max(1, len(memory) // 5)
    return int(np.median(memory[-fifth:]) - np.median(memory[fifth : 2 * fifth] or memory[:1]))


def concurrent_differences(retriever: Retriever, *, threads: int, rounds: int) -> int:
    """How many results of calls from several threads at once differ from the same calls one after the other."""
    rng = np.random.default_rng(1)
    pictures = [rng.integers(0, 256, (SIZE[1], SIZE[0], 3), dtype=np.uint8) for _ in range(2 * threads)]
    boxes = [Boxes([[1, 2, 9 + i, 12]], SIZE) if i % 3 else None for i in range(2 * threads)]
    texts = [f"a picture of {words}" for words in ("a dog", "two men on a bench", "a small red box", "the sea")]
    gallery = Gallery(tuple(map(str, range(len(pictures)))), retriever.encode_images(pictures, boxes))

    def work(number: int) -> list[np.ndarray]:
        part = slice(2 * number, 2 * number + 2)
        features = retriever.encode_images(pictures[part], boxes[part])
        hits = retriever.search(texts[number % len(texts)], gallery, k=5, rerank=4)
        return [
            features.query_embeds,
            features.image_embeds,
            retriever.encode_texts(texts[: 1 + number % 4]),
            retriever.itm_scores(features, texts[number % 4 :]),
            np.array([[int(hit.image), hit.score] for hit in hits]),
        ]

    alone = [work(number) for number in range(threads)]
    start = threading.Barrier(threads)

    def together(number: int) -> int:
        start.wait()
        found = [work(number) for _ in range(rounds)]
        return sum(
            not np.array_equal(got, wanted)
            for results in found
            for got, wanted in zip(results, alone[number], strict=True)
        )

    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(together, range(threads)))
