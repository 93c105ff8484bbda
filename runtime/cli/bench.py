"""`qpert bench`: how fast a bundle runs here, compared with PyTorch measured at the same time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import click

from qpert.runtime.benchmark.report import benchmark_report
from qpert.runtime.benchmark.run import BenchRequest, benchmark
from qpert.runtime.benchmark.timing import Schedule
from qpert.runtime.benchmark.workloads import Sizes
from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.cli import options as shared
from qpert.runtime.cli.number_types import IntegerRange, NumberRange
from qpert.runtime.progress import Progress, Terminal
from qpert.runtime.report.files import json_text, keep_reports
from qpert.runtime.retrieval.encoder import Encoder
from qpert.runtime.verification.reference import Baseline, live_references


@click.command(
    "bench", short_help="how fast a bundle is here, compared with PyTorch", context_settings={"show_default": True}
)
@shared.bundle_argument
@click.option("--baseline", "baselines", default="", help="torch, torch-sdpa, torch-compile, hf; comma-separated")
@click.option("--checkpoint", help="the weights of the baselines [default: the exported checkpoint]")
@click.option("--stage", "stages", default="", help="graphs by name, encode, search [default: all]")
@click.option("--batch", "batches", default="1,8", help="images or texts per call")
@click.option("--boxes", default="0,1,8,32", help="boxes per image, for graphs that take boxes")
@click.option("--repeats", type=IntegerRange(3), default=20, help="measured calls per row")
@click.option("--seconds", type=NumberRange(0), default=30.0, help="time limit per row")
@click.option("--threads", type=IntegerRange(0), default=0, help="CPU threads [0: the runtime's choice]")
@shared.provider_option
@shared.json_option
def command(
    bundle: Path,
    baselines: str,
    checkpoint: str | None,
    stages: str,
    batches: str,
    boxes: str,
    repeats: int,
    seconds: float,
    threads: int,
    provider: str,
    as_json: bool,
) -> None:
    """Measure BUNDLE: each graph, pictures to embeddings, text to results; the report goes to BUNDLE/reports."""
    progress = Terminal()
    sizes = Sizes(distinct(stages), shared.parse_counts(batches, "--batch"), shared.parse_counts(boxes, "--boxes"))
    request = BenchRequest(sizes, provider, Schedule(repeats=repeats, seconds=seconds), threads)
    opened = Bundle.open(bundle)
    with (
        contextlib.closing(Encoder(opened, provider, threads=threads)) as encoder,
        opened_baselines(baselines, opened, checkpoint, request, progress) as compared,
    ):
        result = benchmark(encoder, request, compared, progress)
    document = result.to_dict()
    keep_reports(opened, {"bench.json": json_text(document)}, progress)
    shared.print_result(document, lambda: benchmark_report(result), as_json=as_json)


def distinct(names: str) -> tuple[str, ...]:
    """Comma-separated names, without repeats."""
    return tuple(dict.fromkeys(shared.parse_names(names)))


@contextlib.contextmanager
def opened_baselines(
    names: str, bundle: Bundle, checkpoint: str | None, request: BenchRequest, progress: Progress
) -> Iterator[tuple[Baseline, ...]]:
    if not names:
        progress.say("measuring without a baseline; add one with --baseline torch,torch-sdpa,torch-compile,hf")
        yield ()
        return
    with live_references("a baseline").open_baselines(
        distinct(names), bundle.manifest, checkpoint, provider=request.provider, threads=request.threads
    ) as compared:
        yield compared
