"""`qpert quantize`: a float bundle to INT8 or FP8. Exits 1 without a bundle if that costs too much accuracy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.bundle.manifest import is_detector, manifest_values
from qpert.runtime.cli import options as shared
from qpert.runtime.cli.number_types import Integer, Number
from qpert.runtime.errors import InputError
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

    Of a detector, the backbone's convolutions: --dataset is then pictures, half of them for the gate, which requires
    --min-agreement percent of the detections to stay (90 where it is not given).

    The products of the perturbation and of attention stay in float, and those of blocks that fail the gate. The report,
    with each block's sensitivity, is in the new bundle's reports.
    """
    shared.require("quantising", ("onnx", "onnxruntime"), "quantize")
    from qpert.calibration.quantization.build import quantize_bundle
    from qpert.calibration.quantization.gate import AccuracyError
    from qpert.calibration.quantization.report import quantization_report
    from qpert.calibration.quantization.request import QuantizeRequest

    as_json, progress = options.pop("as_json"), Terminal()
    if is_detector_folder(options["bundle"]):
        return quantize_a_detector(options, progress, as_json=as_json)
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


FOR_SEARCH = ("precision", "arch", "split", "skip_bad_boxes", "limit", "graphs", "max_drop", "sensitivity")
"""Options without a meaning for a detector; `--precision int8` is what it gets."""


def is_detector_folder(folder: Path) -> bool:
    return folder.is_dir() and is_detector(manifest_values(folder))


def quantize_a_detector(options: dict[str, Any], progress: Terminal, *, as_json: bool) -> int:
    """`qpert quantize DETECTOR`."""
    from qpert.calibration.detectors.quantize import DetectorQuantizeRequest, quantize_detector

    source = click.get_current_context().get_parameter_source
    given = [name for name in options if source(name) is not click.core.ParameterSource.DEFAULT]
    if options["precision"] == "int8":
        given = [name for name in given if name != "precision"]
    if unused := [name for name in FOR_SEARCH if name in given]:
        raise InputError(
            f"--{unused[0].replace('_', '-')} {options[unused[0]]} is for bundles that search, and "
            f"{options['bundle']} is a detector, which is quantised to int8; leave it out",
            code="quantize-option",
        )
    kept = {name: value for name, value in options.items() if name not in FOR_SEARCH}
    if "min_agreement" not in given:
        del kept["min_agreement"]
    bundle = quantize_detector(DetectorQuantizeRequest(**kept, command=shared.command_line()), progress)
    if as_json:
        click.echo(json.dumps({"bundle": str(bundle.folder)} | bundle.manifest.to_dict()))
    else:
        click.echo(bundle.folder)
    return 0


def read_report(bundle: Bundle) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(bundle.path("reports/quantize.json").read_text(encoding="utf-8"))
    return report
