"""TensorRT's log, kept instead of printed: when a call fails it returns None or False, and only the log says why."""

from __future__ import annotations

from typing import Any

KEPT = 20
"""Messages kept of each kind, the latest ones."""


def make_log(library: Any) -> Any:
    """An `ILogger` of `tensorrt` or `tensorrt_rtx` that keeps errors and warnings; `summary` gives them in one line."""

    class Log(library.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            library.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity in (library.ILogger.ERROR, library.ILogger.INTERNAL_ERROR):
                self.errors = [*self.errors, msg][-KEPT:]
            elif severity == library.ILogger.WARNING:
                self.warnings = [*self.warnings, msg][-KEPT:]

        def summary(self) -> str:
            """The errors, or the warnings if there are none."""
            return "; ".join(self.errors or self.warnings) or "the library gave no reason"

        def forget(self) -> None:
            self.errors, self.warnings = [], []

    return Log()
