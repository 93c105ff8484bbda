"""`qpert bench`: how fast a bundle is here, beside PyTorch in the same minutes."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qpert.runtime.benchmark.result import Benchmark, Row
from qpert.runtime.benchmark.run import BenchRequest, benchmark
from qpert.runtime.benchmark.timing import Schedule
from qpert.runtime.benchmark.workloads import Sizes, parse_names, parse_numbers
from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.cli.options import bundle_argument, json_option, provider_option
from qpert.runtime.progress import Progress, Terminal
from qpert.runtime.retrieval.encoder import Encoder
from qpert.runtime.verification.reference import Baseline, live_references

if TYPE_CHECKING:
    from rich.table import Table


@click.command("bench", short_help="how fast a bundle is here, beside PyTorch", context_settings={"show_default": True})
@bundle_argument
@click.option(
    "--baseline", "baselines", default="", help="torch, torch-sdpa, torch-compile, hf; several with commas between"
)
@click.option("--checkpoint", help="the weights for the baselines [default: the checkpoint that was exported]")
@click.option("--stage", "stages", default="", help="graphs by name, encode, search [default: all]")
@click.option("--batch", "batches", default="1,8", help="images or texts a call")
@click.option("--boxes", default="0,1,8,32", help="boxes an image, where boxes are taken")
@click.option("--repeats", type=click.IntRange(3), default=20, help="measured calls a row")
@click.option("--seconds", type=click.FloatRange(0), default=30.0, help="a row ends early after so long")
@click.option("--threads", type=click.IntRange(0), default=0, help="CPU threads [0: the runtime's choice]")
@provider_option
@json_option
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
    sizes = Sizes(parse_names(stages), parse_numbers(batches, "--batch"), parse_numbers(boxes, "--boxes"))
    request = BenchRequest(sizes, provider, Schedule(repeats=repeats, seconds=seconds), threads)
    opened = Bundle.open(bundle)
    encoder = Encoder(opened, provider, threads=threads)
    try:
        with opened_baselines(baselines, opened, checkpoint, request, progress) as compared:
            result = benchmark(encoder, request, compared, progress)
    finally:
        encoder.close()
    keep(opened, result, progress)
    if as_json:
        click.echo(json.dumps(result.to_dict()))
    else:
        show(result)


@contextlib.contextmanager
def opened_baselines(
    names: str, bundle: Bundle, checkpoint: str | None, request: BenchRequest, progress: Progress
) -> Iterator[tuple[Baseline, ...]]:
    if not names:
        progress.say("measuring without comparison; --baseline torch,torch-sdpa,torch-compile,hf adds it")
        yield ()
        return
    with live_references("a baseline").open_baselines(
        parse_names(names), bundle.manifest, checkpoint, provider=request.provider, threads=request.threads
    ) as compared:
        yield compared


def keep(bundle: Bundle, result: Benchmark, progress: Progress) -> None:
    """Write `reports/bench.json`. A bundle that cannot be written is measured all the same, and that is said."""
    try:
        bundle.with_report("bench.json", json.dumps(result.to_dict(), indent=1) + "\n")
    except OSError as error:
        progress.say(f"the report is not kept: {bundle.folder} cannot be written ({error})")


def show(result: Benchmark) -> None:
    """What was measured on, the rows, and the cold start."""
    from rich.console import Console

    console, machine = Console(highlight=False), result.machine
    console.print(f"[bold]{machine['gpu'] or machine['cpu']}[/], {machine['cores']} cores, load {machine['load']}")
    peak = machine["peak"]
    console.print(f"reaches {peak['product_gflops']:.0f} GFLOP/s and {peak['copy_gb_per_second']:.0f} GB/s on its CPU")
    console.print(rows_table(result))
    cold = result.cold_start
    console.print(
        f"cold start to the first result {cold['process_seconds']:.2f} s "
        f"(import {cold['import_seconds']:.2f}, open {cold['open_seconds']:.2f}, "
        f"search {cold['first_search_seconds']:.2f}), peak memory {cold['peak_memory_mb']:.0f} MB"
    )


def rows_table(result: Benchmark) -> Table:
    """One line for each call, one column for each baseline: how many times as long it took."""
    from rich import box
    from rich.table import Table

    title = f"{result.rows[0].provider}, {result.rows[0].precision}; ×: how many times as long the baseline takes"
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    table.add_column("stage", no_wrap=True)
    for name in ("batch", "boxes", "ms", "p95", "a second", "of peak", *(f"× {each}" for each in result.baselines)):
        table.add_column(name, justify="right")
    calls: dict[tuple[str, int, int], list[Row]] = {}
    for row in result.rows:
        calls.setdefault((row.stage, row.batch, row.boxes), []).append(row)
    before = ""
    for rows in calls.values():
        if before and rows[0].stage != before:
            table.add_section()
        before = rows[0].stage
        table.add_row(*cells(rows, result.baselines))
    return table


def cells(rows: list[Row], baselines: tuple[str, ...]) -> list[str]:
    """One call beside its baselines."""
    row = rows[0]
    share = "" if row.share_of_peak is None else f"{100 * row.share_of_peak:.0f} %"
    numbers = [f"{row.median_ms:.2f}", f"{row.p95_ms:.2f}", f"{row.per_second:.1f}", share]
    ratios = {each.baseline: each.ratio for each in rows}
    compared = [f"{ratio:.2f}" if (ratio := ratios.get(name)) is not None else "" for name in baselines]
    return [row.stage, str(row.batch), str(row.boxes or ""), *numbers, *compared]
