"""The paper's table for BLIP-2, measured, with the published figures beside it: Flickr30K and COCO, stock, perturbed,
and the ablations of strength, weight function and threshold.

    python examples/reproduce_paper.py DATA                      # DATA holds flickr30k/ and coco/
    python examples/reproduce_paper.py DATA --dry-run            # shows the commands
    python examples/reproduce_paper.py DATA --limit 50           # a rehearsal on the first 50 pictures

Every step is one `qpert` command whose JSON is kept in OUT/steps; the same command line resumes, finished steps are not
repeated, and a step that stopped halfway resumes too. The result is OUT/table.md, table.html and table.json.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reproduce_table import report

from qpert.runtime.files import write_atomically
from qpert.runtime.inputs.data_check import CheckedData, check_data_folder
from qpert.runtime.report.html import to_html
from qpert.runtime.report.markdown import to_markdown

SPLITS = ("val", "test")
ABLATIONS = Path(__file__).resolve().parent / "paper_ablations.json"


@dataclass(frozen=True)
class Step:
    """One command. `makes`: a bundle that it leaves, or None. Its JSON document goes to `steps/<name>.json`."""

    name: str
    arguments: tuple[str, ...]
    makes: Path | None = None


@dataclass(frozen=True)
class Plan:
    """What to run on which data, from the command line."""

    data: Path
    out: Path
    datasets: tuple[str, ...]
    export: tuple[str, ...]
    provider: str
    limit: int | None
    detector_boxes: dict[str, str]

    def steps(self) -> Iterator[Step]:
        bundle, release = self.out / "bundle", self.out / "release"
        yield self._export("export", bundle)
        yield self._export("export-release", release, "--semantics", "release", "--threshold", "0.99")
        for name in self.datasets:
            calibrated = self.out / f"calibrated-{name}"
            yield self._eval(f"{name}-stock", bundle, name, "--boxes", "none", "--bin-boxes", "entities")
            yield self._calibrate(f"{name}-calibrate", bundle, name, "val", out=calibrated)
            yield self._eval(f"{name}-entities", calibrated, name)
            if name in self.detector_boxes:
                boxes = self.detector_boxes[name]
                bins = "entities" if name == "flickr30k" else boxes  # as the paper sorts them
                extra = ("--boxes", boxes, "--bin-boxes", bins, "--skip-bad-boxes")
                yield self._eval(f"{name}-detector", calibrated, name, *extra)
        if "flickr30k" in self.datasets:
            yield self._eval("flickr30k-release", release, "flickr30k", "--alpha", "8", "--beta", "1", "--gamma", "0")
            yield from self._ablations(bundle)

    def _ablations(self, bundle: Path) -> Iterator[Step]:
        published = json.loads(ABLATIONS.read_text(encoding="utf-8"))
        strength, threshold = published["alpha"], published["threshold"]
        for name, alphas, thresholds in (
            ("ablation-strength", strength["values"], [strength["threshold"]]),
            ("ablation-threshold", [threshold["alpha"]], threshold["values"]),
        ):
            grid = ("--alphas", listed(alphas), "--thresholds", listed(thresholds))
            yield self._calibrate(name, bundle, "flickr30k", "test", grid)

    def _export(self, name: str, out: Path, *more: str) -> Step:
        return Step(name, ("export", "blip2", *self.export, *more, "--out", str(out)), out)

    def _eval(self, name: str, bundle: Path, dataset: str, *more: str) -> Step:
        chosen = ("--dataset", str(self.data / dataset), "--split", "test", "--rerank", "64", *self._limited())
        work = ("--work", str(self.out / "work" / name), "--provider", self.provider)
        return Step(name, ("eval", str(bundle), *chosen, *more, *work))

    def _calibrate(
        self, name: str, bundle: Path, dataset: str, split: str, grid: Sequence[str] = (), out: Path | None = None
    ) -> Step:
        """The paper sums over boxes and reports mR@1 of ITC and ITM; a calibrated bundle is written whatever wins."""
        chosen = ("--dataset", str(self.data / dataset), "--split", split, "--reductions", "sum", "--rerank", "64")
        small = ("--score", "r1") if self.limit else ()  # of a few pictures some size bins are empty: mR@1 is undefined
        written = ("--out", str(out), "--regardless") if out else ()
        work = ("--work", str(self.out / "work" / name), "--provider", "cuda" if self.provider != "cpu" else "cpu")
        return Step(name, ("calibrate", str(bundle), *chosen, *grid, *self._limited(), *small, *written, *work), out)

    def _limited(self) -> tuple[str, ...]:
        return ("--limit", str(self.limit)) if self.limit else ()


def listed(values: Sequence[float]) -> str:
    return ",".join(f"{value:g}" for value in values)


def run(step: Step, out: Path) -> dict[str, Any]:
    """The step's document: what it said before, or now says. Raises SystemExit with its exit code where it fails."""
    path = out / "steps" / f"{step.name}.json"
    if path.is_file() and (step.makes is None or step.makes.is_dir()):
        return dict(json.loads(path.read_text(encoding="utf-8")))
    print(f"== {step.name}: qpert {shlex.join(step.arguments)}", file=sys.stderr, flush=True)
    forced = ("--force",) if step.arguments[0] == "export" and step.makes is not None and step.makes.is_dir() else ()
    command = [sys.executable, "-m", "qpert.runtime.cli", *step.arguments, *forced, "--json"]
    answer = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if answer.returncode != 0:
        print(f"{step.name} stopped with exit code {answer.returncode}; mend it and run this again", file=sys.stderr)
        raise SystemExit(answer.returncode)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, answer.stdout.encode())
    return dict(json.loads(answer.stdout))


def incomplete(data: Path, datasets: Sequence[str]) -> list[CheckedData]:
    """The splits that are not whole, both of every data set."""
    found = [one for split in SPLITS for one in check_data_folder(data, split, datasets)]
    return [one for one in found if not one.complete]


def parse(arguments: Sequence[str] | None) -> tuple[Plan, bool]:
    parser = argparse.ArgumentParser(description="The paper's table for BLIP-2, measured.")
    parser.add_argument("data", type=Path, help="the folder that holds flickr30k/ and coco/")
    parser.add_argument("--out", type=Path, default=Path("reproduced"), help="bundles, steps and the table")
    parser.add_argument("--dataset", action="append", choices=("flickr30k", "coco"), help="only this one")
    parser.add_argument("--checkpoint", default="coco", help="as for `qpert export blip2`")
    parser.add_argument("--export-options", default="", help="more options of `qpert export blip2`, in one string")
    parser.add_argument("--provider", default="cpu", choices=("cpu", "cuda"), help="what runs the graphs")
    parser.add_argument("--limit", type=int, help="only the first pictures: a rehearsal, not the paper's table")
    for name in ("flickr30k", "coco"):
        parser.add_argument(f"--{name}-boxes", help="boxes of a detector, for the row of detector boxes")
    parser.add_argument("--dry-run", action="store_true", help="print the commands")
    given = parser.parse_args(arguments)
    boxes = {name: value for name in ("flickr30k", "coco") if (value := getattr(given, f"{name}_boxes"))}
    export = ("--checkpoint", given.checkpoint, *shlex.split(given.export_options))
    datasets = tuple(given.dataset or ("flickr30k", "coco"))
    plan = Plan(given.data, given.out, datasets, export, given.provider, given.limit, boxes)
    return plan, given.dry_run


def main(arguments: Sequence[str] | None = None) -> int:
    plan, dry_run = parse(arguments)
    if dry_run:
        for step in plan.steps():
            print("qpert", shlex.join(step.arguments))
        return 0
    if not plan.data.is_dir():
        print(f"{plan.data} is not a folder; expected one that holds flickr30k/ and coco/", file=sys.stderr)
        return 2
    missing = incomplete(plan.data, plan.datasets)
    for one in missing:
        print(
            f"{one.root}, split {one.split}: incomplete; qpert data check {one.root} --split {one.split}",
            file=sys.stderr,
        )
    if missing:
        return 1
    documents = {step.name: run(step, plan.out) for step in plan.steps()}
    made, rows = report(documents, plan.datasets, json.loads(ABLATIONS.read_text(encoding="utf-8")), plan.limit)
    for name, text in (
        ("table.md", to_markdown(made)),
        ("table.html", to_html(made)),
        ("table.json", json.dumps(rows)),
    ):
        write_atomically(plan.out / name, text.encode())
    print(plan.out / "table.md")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
