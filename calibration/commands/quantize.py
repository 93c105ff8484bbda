"""`qpert quantize`: a float bundle to INT8 or FP8. Exits 1, leaving no bundle, where that costs too much accuracy."""

from __future__ import annotations

import importlib.util
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import click

from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.cli.options import bundle_argument, json_option
from qpert.runtime.errors import UnavailableError
from qpert.runtime.progress import Terminal


@click.command("quantize", short_help="INT8 or FP8, with a gate on recall", context_settings={"show_default": True})
@bundle_argument
@click.option("--out", type=click.Path(path_type=Path), required=True, help="the quantised bundle's folder")
@click.option("--precision", default="int8", help="int8 or fp8 (GPUs from sm89 on; needs NVIDIA ModelOpt)")
@click.option("--target", default="cpu", help="what will run it: cpu or tensorrt; they take different Q/DQ")
@click.option("--arch", help="for tensorrt: GPU architectures that the precision must fit, such as sm80,sm89")
@click.option("--dataset", default="demo", help="images and captions as they will be searched: a folder, or demo")
@click.option("--split", default="val", help="split of the data set: take one that nothing is reported on")
@click.option("--skip-bad-boxes", is_flag=True, help="leave out boxes that are empty, inverted, not finite or outside")
@click.option("--samples", type=int, default=64, help="images that activations' ranges are taken from")
@click.option("--limit", type=int, help="images that the gate judges [default: the whole split]")
@click.option("--graphs", help="graphs to quantise, comma-separated [default: those that do not get slower]")
@click.option("--ranges", default="minmax", help="of activations: minmax, percentile or entropy")
@click.option("--reduce-range", is_flag=True, help="7-bit weights, for CPUs without VNNI (their products saturate)")
@click.option("--max-drop", type=float, default=0.5, help="points of R@1 that may be lost, in either direction")
@click.option("--min-agreement", type=float, default=80.0, help="percent of queries that must keep their first result")
@click.option(
    "--sensitivity/--no-sensitivity",
    default=True,
    help="measure each block, and compute the worst in float where the gate fails",
)
@click.option("--force", is_flag=True, help="replace an existing bundle")
@json_option
def command(**options: Any) -> int:
    """Quantise BUNDLE: 8-bit products with ranges from a data set, judged by R@1 against the float bundle.

    The products that stay in float: the perturbation's own, attention's, and those of blocks that the gate makes give
    up. The report, with each block's sensitivity, is in the new bundle's reports.
    """
    require_onnx()
    from qpert.calibration.quantization.build import quantize_bundle
    from qpert.calibration.quantization.gate import AccuracyError
    from qpert.calibration.quantization.request import QuantizeRequest

    as_json, progress = options.pop("as_json"), Terminal()
    listed = {name: split_names(options.pop(name)) for name in ("arch", "graphs")}
    request = QuantizeRequest(
        **options,
        arch=listed["arch"] or (),
        graphs=listed["graphs"],
        command=shlex.join(["qpert", *(click.get_current_context().obj or sys.argv[1:])]),
    )
    try:
        bundle = quantize_bundle(request, progress)
    except AccuracyError as error:
        click.echo(f"error: {error}", err=True)
        if as_json:
            click.echo(json.dumps(error.report))
        return error.exit_code
    report = read_report(bundle)
    if as_json:
        click.echo(json.dumps({"bundle": str(bundle.folder)} | report))
    else:
        show(report)
        click.echo(bundle.folder)
    progress.say(f"next: qpert verify {bundle.folder}")
    return 0


def split_names(value: str | None) -> tuple[str, ...] | None:
    return None if value is None else tuple(name.strip() for name in value.split(",") if name.strip())


def require_onnx() -> None:
    """Raises UnavailableError where what rewrites graphs is missing."""
    missing = [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise UnavailableError(f"quantising needs {', '.join(missing)}, not installed; pip install 'qpert[quantize]'")


def read_report(bundle: Bundle) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(bundle.path("reports/quantize.json").read_text(encoding="utf-8"))
    return report


def show(report: dict[str, Any]) -> None:
    """The gates, then the graphs."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    table = Table("gate", "value", "limit", "")
    for gate in report["gates"]:
        table.add_row(gate["name"], f"{gate['value']:.3g}", f"{gate['limit']:.3g}", "pass" if gate["pass"] else "FAIL")
    console.print(table)
    table = Table("graph", "form", "8-bit products", "blocks in float", "times fp32's speed here")
    for name, graph in report["graphs"].items():
        speed = graph.get("speed_on_this_cpu")
        kept = ", ".join(graph.get("blocks_weights_only", []))
        table.add_row(name, graph["form"], str(graph.get("products", 0)), kept, "" if speed is None else f"{speed:g}")
    console.print(table)
    console.print(f"graphs and weights: {report['graph_bytes']['ratio']:.1%} of fp32")
