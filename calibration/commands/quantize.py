"""`qpert quantize`: a float bundle to INT8 or FP8. Exits 1 without a bundle if that costs too much accuracy."""

from __future__ import annotations

import json
from typing import Any

import click

from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.cli import options as shared
from qpert.runtime.cli.number_types import Integer, Number
from qpert.runtime.progress import Terminal


@click.command("quantize", short_help="INT8 or FP8, with a gate on recall", context_settings={"show_default": True})
@shared.bundle_argument
@click.option("--out", type=shared.PATH, required=True, help="the quantised bundle's folder")
@click.option("--precision", default="int8", help="int8 or fp8 (GPUs from sm89 on; needs NVIDIA ModelOpt)")
@click.option("--target", default="cpu", help="what will run it: cpu or tensorrt, which need different Q/DQ")
@click.option("--arch", help="for tensorrt: GPU architectures that must support the precision, such as sm80,sm89")
@click.option("--dataset", default="demo", help="images and captions like those to be searched: a folder, or demo")
@click.option("--split", default="val", help="split of the data set: use one that you report no results on")
@click.option("--skip-bad-boxes", is_flag=True, help="leave out boxes that are empty, inverted, not finite or outside")
@click.option("--samples", type=Integer(), default=64, help="images to measure activation ranges on")
@click.option("--limit", type=Integer(), help="images to judge the gate on [default: the whole split]")
@click.option("--graphs", help="graphs to quantise, comma-separated [default: all that do not get slower]")
@click.option("--ranges", default="minmax", help="how to measure activation ranges: minmax, percentile or entropy")
@click.option("--reduce-range", is_flag=True, help="7-bit weights, for CPUs without VNNI (their products saturate)")
@click.option("--max-drop", type=Number(), default=0.5, help="largest loss of R@1 in points, in either direction")
@click.option("--min-agreement", type=Number(), default=80.0, help="percent of queries with the same first result")
@click.option(
    "--sensitivity/--no-sensitivity",
    default=True,
    help="measure each block, and compute the worst in float if the gate fails",
)
@click.option("--force", is_flag=True, help="replace an existing bundle")
@shared.json_option
def command(**options: Any) -> int:
    """Quantise BUNDLE: 8-bit products with ranges from a data set, judged by R@1 against the float bundle.

    The products of the perturbation and of attention stay in float, and those of blocks that fail the gate. The report,
    with each block's sensitivity, is in the new bundle's reports.
    """
    shared.require("quantising", ("onnx", "onnxruntime"), "quantize")
    from qpert.calibration.quantization.build import quantize_bundle
    from qpert.calibration.quantization.gate import AccuracyError
    from qpert.calibration.quantization.report import quantization_report
    from qpert.calibration.quantization.request import QuantizeRequest

    as_json, progress = options.pop("as_json"), Terminal()
    graphs, arch = options.pop("graphs"), options.pop("arch")
    request = QuantizeRequest(
        **options,
        arch=shared.parse_names(arch or ""),
        graphs=None if graphs is None else shared.parse_names(graphs),
        command=shared.command_line(),
    )
    try:
        bundle = quantize_bundle(request, progress)
    except AccuracyError as error:
        click.echo(f"error: {error}", err=True)
        if as_json:
            click.echo(json.dumps(error.report))
        return error.exit_code
    document = read_report(bundle)
    shared.print_result(
        {"bundle": str(bundle.folder)} | document, lambda: quantization_report(document), as_json=as_json
    )
    if not as_json:
        click.echo(bundle.folder)
    progress.say(f"next: qpert verify {bundle.folder}")
    return 0


def read_report(bundle: Bundle) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(bundle.path("reports/quantize.json").read_text(encoding="utf-8"))
    return report
