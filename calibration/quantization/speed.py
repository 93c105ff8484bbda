"""Is a quantised graph faster on this CPU? Both forms run in turn, so that a busy machine slows both."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median

from qpert.calibration.quantization.data import Feed
from qpert.runtime.sessions.protocol import Session

ROUNDS = 7
SLOWER = 0.95
"""Below this ratio a graph counts as slower: the variation between repeats of one graph on a shared machine."""


def speed_ratio(
    before: Session, after: Session, feeds: Sequence[Feed], *, clock: Callable[[], float] = time.perf_counter
) -> float:
    """How many times as fast `after` is: the median over rounds of one call each, without the first round."""
    ratios = []
    for number in range(ROUNDS + 1):
        feed = feeds[number % len(feeds)]
        ratios.append(seconds(before, feed, clock) / seconds(after, feed, clock))
    return median(ratios[1:])


def seconds(session: Session, feed: Feed, clock: Callable[[], float]) -> float:
    started = clock()
    session.run(feed)
    return clock() - started
