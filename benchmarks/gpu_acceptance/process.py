"""Runs one line's process: time limit, what it printed, and why it failed where it did."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OUT_OF_MEMORY = ("out of memory", "OutOfMemory", "Failed to allocate memory", "GPU memory is too small", "MemoryError")
TAIL = 6
"""Lines of stderr that a failure quotes."""
DIE_WITH_PARENT = 1
"""Linux's PR_SET_PDEATHSIG."""


@dataclass(frozen=True)
class Answer:
    """document: what the process printed, None where it failed. reason: why it failed."""

    document: dict[str, Any] | None
    reason: str
    seconds: float


def run(
    command: Sequence[str], log: Path, *, minutes: float, exit_codes: Sequence[int], environment: Mapping[str, str]
) -> Answer:
    """Run a command to its end, or to its time limit; its stderr goes to `log`.

    Whatever happens to it (a crash in a driver, memory that runs out) is an answer. It gets a session of its own, so
    that all it started ends with it, also where this process is interrupted or killed.
    """
    began = time.perf_counter()
    with log.open("w", encoding="utf-8") as errors:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            stdin=subprocess.DEVNULL,
            text=True,
            env=dict(environment),
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
        try:
            out, _ = process.communicate(timeout=60 * minutes)
            late = False
        except subprocess.TimeoutExpired:
            late = True
            out = ""
        finally:
            end(process)
    seconds = time.perf_counter() - began
    if late:
        return Answer(None, f"took longer than its limit of {minutes:g} minutes; {tail(log)}", seconds)
    if process.returncode not in exit_codes:
        return Answer(None, why(process.returncode, log), seconds)
    document = parse(out)
    return Answer(document, "" if document is not None else f"printed no JSON document; {tail(log)}", seconds)


def die_with_parent() -> None:
    """In the child, before it starts: the kernel kills it when this process is killed. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)


def end(process: subprocess.Popen[str]) -> None:
    """Kill whatever is left of a process and of what it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # all of it has ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def parse(out: str) -> dict[str, Any] | None:
    """The JSON document of the last line."""
    lines = [line for line in out.splitlines() if line.strip()]
    try:
        document = json.loads(lines[-1]) if lines else None
    except json.JSONDecodeError:
        return None
    return document if isinstance(document, dict) else None


def why(code: int, log: Path) -> str:
    """Why a process failed: out of memory, a crash, or the last thing it printed."""
    said = tail(log)
    if any(words in said for words in OUT_OF_MEMORY):
        return f"out of memory: {said}"
    if code == -signal.SIGKILL:
        return f"killed, as the kernel does where the machine's memory runs out; {said}"
    if code < 0:
        return f"crashed with {signal.Signals(-code).name}; {said}"
    return f"exit code {code}: {said}"


def tail(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    said = next((number for number, line in enumerate(lines) if line.startswith("error: ")), None)
    if said is not None:
        return "\n".join(lines[said:])[:1500].removeprefix("error: ")
    if any(line.startswith("Traceback ") for line in lines):
        return f"{lines[-1]} (traceback in {log})"
    return "\n".join(lines[-TAIL:])[-1500:] or "it said nothing"
