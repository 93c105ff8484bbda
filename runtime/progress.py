"""Progress of long work, on stderr; results go to stdout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Protocol

Advance = Callable[[int], None]
"""Reports that this many of a stage's units are done."""


class Progress(Protocol):
    """Where long work says what it does."""

    def stage(self, what: str, total: int | None = None, *, unit: str = "") -> AbstractContextManager[Advance]:
        """One stage of the work, `total` units long where that is known; `unit` "B" is shown as bytes."""
        ...

    def say(self, line: str) -> None:
        """One line for the user to read."""
        ...


class Silent:
    """Says nothing: for libraries and tests."""

    @contextmanager
    def stage(self, what: str, total: int | None = None, *, unit: str = "") -> Iterator[Advance]:
        yield lambda count: None

    def say(self, line: str) -> None:
        return


class Terminal:
    """Progress bars on a terminal's stderr; one line a stage where stderr is a file or a pipe."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(stderr=True, highlight=False)

    @contextmanager
    def stage(self, what: str, total: int | None = None, *, unit: str = "") -> Iterator[Advance]:
        if not self.console.is_terminal:
            self.say(what)
            yield lambda count: None
            return
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as RichProgress

        amount = DownloadColumn() if unit == "B" else MofNCompleteColumn()
        timing = TimeElapsedColumn() if total is None else TimeRemainingColumn()
        columns = (TextColumn("{task.description}"), BarColumn(), *((amount,) if total else ()), timing)
        with RichProgress(*columns, console=self.console) as bars:
            task = bars.add_task(what, total=total)
            yield lambda count: bars.advance(task, count)
            bars.update(task, total=total or 1, completed=total or 1)

    def say(self, line: str) -> None:
        self.console.print(line, markup=False, soft_wrap=True)


@contextmanager
def byte_listener(progress: Progress) -> Iterator[Callable[[str, int, int | None], None]]:
    """For work that reports (what, bytes done, bytes in all or None): one stage for each `what`."""
    with ExitStack() as stages:
        current: dict[str, tuple[Advance, int]] = {}

        def listen(what: str, done: int, total: int | None) -> None:
            if what not in current:
                stages.close()
                current.clear()
                current[what] = stages.enter_context(progress.stage(what, total, unit="B")), 0
            advance, before = current[what]
            advance(done - before)
            current[what] = advance, done

        yield listen
