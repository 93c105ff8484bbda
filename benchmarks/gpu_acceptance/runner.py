"""Runs the lines that are not done yet; each result is on disk before the next line starts."""

from __future__ import annotations

import datetime
import fcntl
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from gpu_acceptance import process
from gpu_acceptance.lines import Check, Document, Judged, Line, Result, broken, skipped
from qpert.runtime.errors import InputError
from qpert.runtime.files import write_atomically

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS, LOGS, CACHE = "results", "logs", "cache"


@contextmanager
def locked(work: Path) -> Iterator[None]:
    """The work folder for this process alone. Raises InputError where another one has it."""
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(
                f"another acceptance runs in {work}; wait for it, or give --work another folder", code="work-in-use"
            ) from error
        yield


@dataclass
class Runner:
    """Runs lines in a work folder.

    fingerprint: what results depend on; those with another are measured again. again: statuses that are measured again
    though they are of this fingerprint. say: called with a line for the user. changed: called with all results after
    each line.
    """

    work: Path
    fingerprint: str
    again: frozenset[str] = frozenset({"skipped"})
    say: Callable[[str], None] = print
    changed: Callable[[list[Result]], object] = lambda results: None
    results: dict[str, Result] = field(default_factory=dict)

    def run(self, lines: Sequence[Line]) -> list[Result]:
        """The results of all lines, in order."""
        for folder in (RESULTS, LOGS, CACHE):
            (self.work / folder).mkdir(exist_ok=True)
        for number, line in enumerate(lines, start=1):
            place = f"[{number}/{len(lines)}] {line.section}: {line.title}"
            kept = self.kept(line)
            if kept is not None:
                self.say(f"{place}: {kept.status} before")
            else:
                self.say(f"{place} …")
                kept = self.fresh(line)
                write_atomically(self.file(line.name), json.dumps(kept.to_dict(), indent=1) + "\n")
                self.say(f"{place}: {kept.status}{f' ({first_line(kept.reason)})' if kept.reason else ''}")
            self.results[line.name] = kept
            self.changed(list(self.results.values()))
        return list(self.results.values())

    def file(self, name: str) -> Path:
        return self.work / RESULTS / f"{name}.json"

    def kept(self, line: Line) -> Result | None:
        """The result of an earlier run; None where the line has to be run."""
        try:
            found = Result.from_dict(json.loads(self.file(line.name).read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError):  # none yet, or of another version of this program
            return None
        gone = found.status == "passed" and line.makes is not None and not line.makes.exists()
        stale = found.fingerprint != self.fingerprint or found.command != shlex.join(line.command)
        fresh_needs = any(self.results[name].when > found.when for name in line.needs)
        return None if stale or gone or fresh_needs or found.status in self.again else found

    def fresh(self, line: Line) -> Result:
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="microseconds")
        result = Result(line.name, "skipped", command=shlex.join(line.command), fingerprint=self.fingerprint, when=now)
        missing = [name for name in line.needs if self.results[name].status != "passed"]
        if missing:
            return as_a_whole(line, result, "skipped", "; ".join(self.why_missing(name) for name in missing))
        log = self.work / LOGS / f"{line.name}.txt"
        answer = process.run(
            line.command,
            log,
            minutes=line.minutes,
            exit_codes=line.exit_codes,
            environment=self.environment(),
        )
        result = replace(result, seconds=round(answer.seconds, 1))
        if answer.document is None:
            return as_a_whole(line, result, "failed", answer.reason)
        if "skipped" in answer.document:
            return as_a_whole(line, result, "skipped", str(answer.document["skipped"]))
        judged = self.judged(line, answer.document)
        if isinstance(judged, str):
            return as_a_whole(line, result, "failed", judged)
        made = replace(result, status=judged.status, checks=judged.checks, figures=judged.figures)
        return made if judged.status == "passed" else replace(made, reason=reason_of(judged))

    def judged(self, line: Line, document: Document) -> Judged | str:
        """The checks, or what is wrong with the document."""
        try:
            return line.judge(document, self.results)
        except (LookupError, TypeError, ValueError) as error:
            return f"printed a document that cannot be judged ({type(error).__name__}: {error})"

    def why_missing(self, name: str) -> str:
        found = self.results[name]
        if found.status == "failed":
            return f"needs {name}, which failed"
        return found.reason if found.reason.startswith("needs ") else f"needs {name}, which was skipped: {found.reason}"

    def environment(self) -> Mapping[str, str]:
        """For a line's process: this code, a cache of its own, and the GPU that nvidia-smi means."""
        paths = [str(REPOSITORY / "benchmarks"), str(REPOSITORY / "src"), os.environ.get("PYTHONPATH", "")]
        cache = self.work / CACHE
        own = {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "QPERT_CACHE": str(cache),
            "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
            "TRITON_CACHE_DIR": str(cache / "triton"),
            "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",  # or the compile time of a second run would be that of a look-up
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
            "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0"),
        }
        return os.environ | own


def as_a_whole(line: Line, result: Result, status: Literal["failed", "skipped"], reason: str) -> Result:
    """A line that gave no figures: its goal is missed, or nothing is shown about it."""
    made = broken(line.goal, reason) if status == "failed" else skipped(line.goal, reason)
    return replace(result, status=status, checks=(made,), reason=reason)


def reason_of(judged: Judged) -> str:
    """What missed its goal, or could not be shown."""
    found = [one for one in judged.checks if one.status == judged.status]
    if len(found) == 1 and found[0].reason:
        return found[0].reason
    return "; ".join(f"{one.what}: {one.reason or missed(one)}" for one in found)


def missed(check: Check) -> str:
    return (
        f"{check.value:.4g} {check.unit}".strip() + f", goal {check.goal}" if check.value is not None else "no figure"
    )


def first_line(text: str) -> str:
    line = text.splitlines()[0]
    return line if len(line) < 160 else f"{line[:157]}…"


def to_terminal(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
