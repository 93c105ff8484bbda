"""The report of `qpert bench`: the machine, each row with its baselines, the cold start."""

from __future__ import annotations

from qpert.runtime.benchmark.result import Benchmark, Row
from qpert.runtime.report.model import Report, Table, paragraphs


def benchmark_report(result: Benchmark) -> Report:
    """The whole report."""
    machine, peak, cold = result.machine, result.machine["peak"], result.cold_start
    before = (
        f"reaches {peak['product_gflops']:.0f} GFLOP/s and {peak['copy_gb_per_second']:.0f} GB/s on its CPU",
        f"{result.rows[0].provider}, {result.rows[0].precision}; ×: how many times as long the baseline takes",
    )
    after = (
        f"cold start to the first result {cold['process_seconds']:.2f} s (import {cold['import_seconds']:.2f}, open "
        f"{cold['open_seconds']:.2f}, search {cold['first_search_seconds']:.2f}), peak memory "
        f"{cold['peak_memory_mb']:.0f} MB"
    )
    heading = f"{machine['gpu'] or machine['cpu']}, {machine['cores']} cores, load {machine['load']}"
    return Report("qpert bench", heading, (*paragraphs(*before), rows_table(result), *paragraphs(after)))


def rows_table(result: Benchmark) -> Table:
    """One row per call, one column per baseline: how many times as long it took."""
    calls: dict[tuple[str, int, int], list[Row]] = {}
    for row in result.rows:
        calls.setdefault((row.stage, row.batch, row.boxes), []).append(row)
    head = (
        "stage",
        "batch",
        "boxes",
        "ms",
        "p95",
        "per second",
        "of peak",
        *(f"× {name}" for name in result.baselines),
    )
    return Table(head, tuple(cells(rows, result.baselines) for rows in calls.values()))


def cells(rows: list[Row], baselines: tuple[str, ...]) -> tuple[str, ...]:
    """One call with its baselines."""
    row = rows[0]
    share = "" if row.share_of_peak is None else f"{100 * row.share_of_peak:.0f} %"
    numbers = (f"{row.median_ms:.2f}", f"{row.p95_ms:.2f}", f"{row.per_second:.1f}", share)
    ratios = {each.baseline: each.ratio for each in rows}
    compared = (f"{ratio:.2f}" if (ratio := ratios.get(name)) is not None else "" for name in baselines)
    return row.stage, str(row.batch), str(row.boxes or ""), *numbers, *compared
