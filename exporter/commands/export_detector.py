"""`qpert export detector`: a detector's checkpoint to a detector bundle."""

from __future__ import annotations

import json
from pathlib import Path

import click

from qpert.runtime.cli.number_types import IntegerRange, Number
from qpert.runtime.cli.options import (
    FLAVORS_HELP,
    TARGET_HELP,
    command_line,
    detection_options,
    json_option,
    require,
    require_export_extra,
)
from qpert.runtime.detection.detector import parse_classes
from qpert.runtime.detection.options import DetectionOptions
from qpert.runtime.progress import Terminal

PATH = click.Path(path_type=Path)


@click.command("detector", short_help="an object detector", context_settings={"show_default": True})
@click.option(
    "--checkpoint",
    default="demo",
    help="demo; RT-DETR, RT-DETRv2, D-FINE or DEIMv2 as a Hugging Face folder or id; a YOLOX .onnx file",
)
@click.option("--out", type=PATH, help="the detector bundle [default: qpert-detector-<checkpoint>]")
@click.option("--labels", type=PATH, help="for .onnx: label names, one a line [default: COCO's 80]")
@detection_options(recorded="")
@click.option("--max-batch", type=IntegerRange(min=1), default=8, help="most pictures per call")
@click.option("--tolerance", type=Number(), default=1e-4, help="largest difference from the stock detector")
@click.option("--trt", is_flag=True, help="also compile TensorRT engines, as `qpert build` does")
@click.option("--trt-flavor", type=click.Choice(["auto", "classic", "rtx"]), help=f"{FLAVORS_HELP} [default: auto]")
@click.option("--target", help=f"{TARGET_HELP} [default: auto]")
@click.option("--force", is_flag=True, help="replace an existing bundle")
@json_option
def command(
    checkpoint: str,
    out: Path | None,
    labels: Path | None,
    threshold: float | None,
    max_boxes: int | None,
    classes: str | None,
    suppress: float | None,
    max_batch: int,
    tolerance: float,
    trt: bool,
    trt_flavor: str | None,
    target: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Export an object detector as one graph: pictures in; boxes in pixels, scores and labels out.

    The graph is compared with the stock detector before anything is written; exits 1 if they find different objects.
    """
    from qpert.exporter.commands.export import engines_request

    require_export_extra("exporting")
    if not checkpoint.endswith(".onnx"):
        require("exporting this detector", ("transformers",), "hf")
    from qpert.exporter.detectors.export import DetectorRequest, export_detector

    engines = engines_request({"trt": trt, "trt_flavor": trt_flavor, "target": target})
    plan = engines.plan("fp32") if engines else None  # fails before the export, not after it
    progress = Terminal()
    options = DetectionOptions().changed(
        threshold=threshold, max_boxes=max_boxes, classes=parse_classes(classes), suppression=suppress
    )
    request = DetectorRequest(checkpoint, out, labels, options, max_batch, tolerance, force, command_line())
    bundle = export_detector(request, progress)
    progress.say(f"wrote {bundle.folder}; next: qpert detect {bundle.folder} IMAGES --out boxes.jsonl")
    built = {}
    if engines and plan:
        from qpert.exporter.detectors.engines import require_buildable
        from qpert.exporter.engines.build import build_engines

        require_buildable(bundle, plan)
        built = {"engines": build_engines(bundle, engines, plan, progress).to_dict()["engines"]}
    if as_json:
        click.echo(json.dumps({"bundle": str(bundle.folder)} | bundle.manifest.to_dict() | built))
    else:
        click.echo(bundle.folder)
