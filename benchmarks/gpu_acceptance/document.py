"""The document that is committed: verdict, counts, machine, and every line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from gpu_acceptance.environment import REPOSITORY
from gpu_acceptance.lines import Line, Result
from gpu_acceptance.plan import EVALUATION, MEMORY, MEMORY_BASELINE, PARITY, SHARE, SPEED

SHOWS_A_GPU = (PARITY, SPEED, SHARE, MEMORY, EVALUATION)
"""Sections whose lines run a bundle on a provider. Where none of them passed, nothing was accepted."""
EXIT_CODES = {"passed": 0, "failed": 1, "nothing shown": 3, "incomplete": 1}


def document(
    lines: Sequence[Line], results: Sequence[Result], environment: dict[str, Any], *, dry_run: bool
) -> dict[str, Any]:
    """The whole JSON document. Lines without a result are `not run`."""
    found = {result.name: result for result in results}
    rows = [row(line, found.get(line.name, Result(line.name, "not run"))) for line in lines]
    verdict = verdict_of(rows)
    return {
        "what": "Dry run of the GPU acceptance on a CPU: no GPU was used, and nothing is accepted by it."
        if dry_run
        else "GPU acceptance: everything about qpert that only an NVIDIA GPU can show, line by line.",
        "dry_run": dry_run,
        "verdict": f"dry run {verdict}" if dry_run else verdict,
        "counts": dict(Counter(row["status"] for row in rows)),
        "failed": {row["name"]: row["reason"] for row in rows if row["status"] == "failed"},
        "skipped": {row["name"]: row["reason"] for row in rows if row["status"] == "skipped"},
        "skipped_figures": skipped_figures(rows),
        "environment": environment,
        "lines": rows,
    }


def row(line: Line, result: Result) -> dict[str, Any]:
    values = result.to_dict()
    del values["fingerprint"], values["command"]  # they hold this machine's paths
    values["reason"] = result.reason.replace(f"{REPOSITORY}/", "")
    return {"name": line.name, "section": line.section, "title": line.title, **values}


def skipped_figures(rows: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """What was not shown of lines that showed something else, by line."""
    found = {
        row["name"]: [f"{check['what']}: {check['reason']}" for check in row["checks"] if check["status"] == "skipped"]
        for row in rows
        if row["status"] != "skipped"
    }
    return {name: figures for name, figures in found.items() if figures}


def verdict_of(rows: Sequence[dict[str, Any]]) -> str:
    statuses = Counter(row["status"] for row in rows)
    if statuses["failed"]:
        return "failed"
    if statuses["not run"]:
        return "incomplete"
    shown = [row for row in rows if row["section"] in SHOWS_A_GPU and row["name"] != MEMORY_BASELINE]
    return "passed" if any(row["status"] == "passed" for row in shown) else "nothing shown"


def exit_code(made: dict[str, Any]) -> int:
    """0 all that could be run passed; 1 a line failed; 3 nothing could be run on a provider."""
    return EXIT_CODES[str(made["verdict"]).removeprefix("dry run ")]
