"""`python -m gpu_acceptance`: see the package.

    --work FOLDER   bundles, logs and results of lines: the same folder resumes [default: build/gpu-acceptance]
    --dry-run       the same code on the CPU, with a small model
    --retry         measure failed lines again too
    --list          print the lines and what each of them runs

Exit codes: 0 every line that could be run passed; 1 a line failed; 2 usage; 3 this machine cannot do it.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_acceptance import environment
from gpu_acceptance.document import document, exit_code
from gpu_acceptance.lines import Result
from gpu_acceptance.page import report
from gpu_acceptance.plan import Plan
from gpu_acceptance.runner import REPOSITORY, Runner, locked, to_terminal
from gpu_acceptance.scale import ACCEPTANCE, DRY_RUN
from qpert.runtime.errors import QpertError, UnavailableError
from qpert.runtime.files import write_atomically
from qpert.runtime.report.html import to_html

COMMITTED = REPOSITORY / "benchmarks" / "results"
BUILD = REPOSITORY / "build" / "gpu-acceptance"


def main(arguments: Sequence[str] | None = None) -> int:
    signal.signal(signal.SIGTERM, interrupted)
    given = parse(arguments)
    try:
        return run(given)
    except QpertError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; the same command resumes", file=sys.stderr)
        return 130


def interrupted(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gpu_acceptance", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--retry", action="store_true")
    parser.add_argument("--list", action="store_true")
    given = parser.parse_args(arguments)
    given.work = (given.work or (BUILD / "dry-run" if given.dry_run else BUILD / "work")).resolve()
    return given


def run(given: argparse.Namespace) -> int:
    """Everything between the command line and the exit code.

    Raises:
        UnavailableError: no GPU, or packages without which nothing can be exported.
        InputError: the work folder is in use.
    """
    plan = Plan(DRY_RUN if given.dry_run else ACCEPTANCE, given.work)
    lines = list(plan.lines())
    if given.list:
        for line in lines:
            print(f"{line.name}: {shlex.join(line.command[1:])}")
        return 0
    if missing := environment.missing_packages():
        raise UnavailableError(
            f"{', '.join(missing)} not installed here; pip install 'qpert[gpu,export,test]', and 'qpert[rtx]' or "
            "'qpert[trt]' for engines",
            code="export-extra-missing",
        )
    described = environment.describe(None if given.dry_run else required_gpu())
    if given.dry_run:
        to_terminal("DRY RUN on the CPU with a small model: this is not an acceptance")
    with locked(given.work):

        def write(results: list[Result]) -> dict[str, Any]:
            made = document(lines, results, described, dry_run=given.dry_run)
            write_report(made, given.work / "report")
            return made

        again = frozenset({"skipped", "failed"} if given.retry else {"skipped"})
        runner = Runner(given.work, environment.fingerprint(described), again, to_terminal, write)
        made = write(runner.run(lines))
    written = given.work / "report"
    if not given.dry_run:
        written = COMMITTED / f"gpu_acceptance_{slug(described['gpu']['name'])}"
        write_report(made, written)
    print_verdict(made, written)
    return exit_code(made)


def required_gpu() -> dict[str, str]:
    """The GPU, or an UnavailableError that offers the dry run."""
    try:
        return environment.describe_gpu()
    except UnavailableError as error:
        raise UnavailableError(
            f"an acceptance needs an NVIDIA GPU, and this machine has none that answers ({error}); "
            "`make gpu-acceptance-dry-run` runs the same lines on the CPU with a small model, to test the script",
            code=error.code,
        ) from error


def slug(name: str) -> str:
    """`NVIDIA H100 80GB HBM3` as `nvidia_h100_80gb_hbm3`."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def write_report(made: dict[str, Any], path: Path) -> None:
    """`path`.json and `path`.html, each whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path.parent / f"{path.name}.json", json.dumps(made, indent=1) + "\n")
    write_atomically(path.parent / f"{path.name}.html", to_html(report(made)))


def print_verdict(made: dict[str, Any], written: Path) -> None:
    for status in ("failed", "skipped"):
        for name, reason in made[status].items():
            to_terminal(f"{status}: {name}: {reason}")
    for name, figures in made["skipped_figures"].items():
        to_terminal(f"skipped of {name}: {'; '.join(figures)}")
    counts = ", ".join(f"{count} {status}" for status, count in made["counts"].items())
    to_terminal(f"{made['verdict'].upper()}: {counts}")
    print(f"{written}.json")
    print(f"{written}.html")


if __name__ == "__main__":
    raise SystemExit(main())
