"""Ending what a task waits for, from outside and without a task of its own for it: each request does so twice."""

from __future__ import annotations

import asyncio
import sys
from types import TracebackType
from typing import Any


class Interruption:
    """A block of a task that `interrupt` ends; `happened` says so afterwards.

    What is awaited in the block gets CancelledError, which goes no further than the block. Where somebody else cancels
    the task, that goes on.
    """

    def __init__(self) -> None:
        self.happened = False
        self._task: asyncio.Task[Any] | None = None

    def interrupt(self, _: object = None) -> None:
        """To be called from the event loop's thread. Does nothing once the block is over."""
        if self._task is not None and not self.happened:
            self.happened = True
            self._task.cancel()

    def __enter__(self) -> Interruption:
        self._task = asyncio.current_task()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        task, self._task = self._task, None
        if not self.happened or task is None:
            return False
        others = task.uncancel() if sys.version_info >= (3, 11) else 0  # type: ignore[attr-defined]
        return isinstance(error, asyncio.CancelledError) and not others
