"""Options shared by several commands, and how commands print their result."""

from __future__ import annotations

import importlib.util
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import click

from qpert.runtime.bundle.folder import GraphBundle
from qpert.runtime.cli.number_types import IntegerRange, NumberRange
from qpert.runtime.detection.options import DetectionOptions
from qpert.runtime.errors import InputError, UnavailableError
from qpert.runtime.files import portable_name
from qpert.runtime.inputs.box_files import XmlCoordinates
from qpert.runtime.inputs.numbers import parse_float, parse_int
from qpert.runtime.report.model import Report
from qpert.runtime.sessions.providers import PROVIDERS

bundle_argument = click.argument("bundle", type=click.Path(path_type=Path))
provider_option = click.option(
    "--provider",
    type=click.Choice(list(PROVIDERS)),
    default="cpu",
    show_default=True,
    help="what runs the graphs: ONNX Runtime on cpu or cuda; openvino on the CPU; engines that `qpert build` made with "
    "tensorrt or rtx",
)
FLAVORS_HELP = "classic TensorRT, TensorRT-RTX, or what suits the target"
TARGET_HELP = (
    "auto (this machine's GPU; without one, all that can be built for), current, sm80,sm89 (an engine for each) or "
    "sm80+sm89 (one for both)"
)
REDUCTION_HELP = "an image's boxes act as a sum, as a mean, or each on a query set of its own (beyond the paper)"
KEEP_STOCK_HELP = "with --reduction each: the unperturbed queries take part as well"
RERANK_HELP = "how many candidates the pair scorer (ITM) re-ranks; 0 disables it [default: 64; 0 without a pair scorer]"
PATH = click.Path(path_type=Path)
dataset_option = click.option(
    "--dataset",
    required=True,
    help="a folder in LAVIS's layout, or generated scenes: demo; demo-small-objects, whose captions name small objects",
)
bin_boxes_option = click.option(
    "--bin-boxes", help="boxes that decide the size bins [default: entities if there are any, else --boxes]"
)
xml_option = click.option(
    "--xml-coordinates",
    type=click.Choice(get_args(XmlCoordinates)),
    help="how corners in XML are counted [default: one_based_inclusive; one_based_shift_all with --semantics release]",
)
limit_option = click.option("--limit", type=IntegerRange(min=1), help="use only the first N images")
work_option = click.option(
    "--work", type=PATH, help="keep features and scores here [default: in the cache, until finished]"
)
threads_option = click.option(
    "--threads",
    type=IntegerRange(min=0),
    default=0,
    help="CPU threads; 0: what the library that runs the graphs chooses",
)
html_option = click.option("--html", type=PATH, help="also write the report page here")
skip_bad_option = click.option(
    "--skip-bad-boxes", is_flag=True, help="leave out boxes that are empty, inverted, not finite or outside"
)
max_boxes_option = click.option(
    "--max-boxes", type=IntegerRange(min=1), help="of more boxes on an image, keep this many, the best by score"
)
json_option = click.option("--json", "as_json", is_flag=True, help="print exactly one JSON document on stdout")


def detection_options(
    prefix: str = "", *, recorded: str = "the detector's, else ", most: bool = True
) -> Callable[[Any], Any]:
    """`--threshold`, `--max-boxes`, `--classes` and `--suppress`, with a prefix such as `detector-`; None if not given.

    `recorded`: what the help says before the default. `most`: false leaves `--max-boxes` out, where a command has it.
    """
    usual = DetectionOptions()

    def option(name: str, value_type: Any, text: str, default: object) -> Any:
        shown = "all" if default is None else f"{default:g}"
        return click.option(f"--{prefix}{name}", type=value_type, help=f"{text} [default: {recorded}{shown}]")

    options = (
        option("threshold", NumberRange(0, 1), "keep detections with a score above this", usual.threshold),
        *(
            (
                option(
                    "max-boxes",
                    IntegerRange(min=1),
                    "keep at most this many boxes a picture, the best",
                    usual.max_boxes,
                ),
            )
            if most
            else ()
        ),
        option("classes", str, "keep these labels, with commas between", usual.classes),
        option(
            "suppress",
            NumberRange(0, 1),
            "of boxes whose IoU is above this, whatever their labels, keep the best; 1 keeps all",
            usual.suppression,
        ),
    )

    def decorate(function: Any) -> Any:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def print_result(document: object, report: Callable[[], Report], *, as_json: bool) -> None:
    """The result on stdout: one JSON document, or the report for a person."""
    if as_json:
        click.echo(json.dumps(document))
        return
    from qpert.runtime.report.terminal import print_report

    print_report(report())


def command_line() -> str:
    """The command line as the user typed it, for the record of a bundle or engine."""
    return portable_name(shlex.join(["qpert", *(click.get_current_context().obj or sys.argv[1:])]))


def check_graphs(option: str, names: Sequence[str], bundle: GraphBundle) -> None:
    """Raise InputError for a name that no graph of the bundle has."""
    known = bundle.manifest.graphs
    if unknown := [name for name in names if name not in known]:
        raise InputError(f"{option} is {', '.join(unknown)}, expected one of {', '.join(known)}", code="graph-unknown")


def parse_names(text: str) -> tuple[str, ...]:
    """Split `torch, hf` into its non-empty parts."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def parse_numbers(text: str, option: str, example: str) -> tuple[float, ...]:
    """Parse `2,4.5`. Raises InputError with `example` in its message."""
    try:
        return tuple(parse_float(part) for part in text.split(","))
    except ValueError:
        raise InputError(
            f"{option} is {text!r}, expected comma-separated numbers, such as {example}", code="not-numbers"
        ) from None


def parse_counts(text: str, option: str) -> tuple[int, ...]:
    """Parse `1,8` to distinct whole numbers. Raises InputError."""
    try:
        return tuple(dict.fromkeys(parse_int(part) for part in text.split(",")))
    except ValueError:
        raise InputError(
            f"{option} is {text!r}, expected comma-separated whole numbers, such as 1,8", code="not-numbers"
        ) from None


def require(purpose: str, modules: tuple[str, ...], extra: str) -> None:
    """Raise UnavailableError if modules of an extra are missing."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise UnavailableError(
            f"{purpose} needs {', '.join(missing)}, not installed here; pip install 'qpert[{extra}]'",
            code="missing-extra",
        )


def require_export_extra(purpose: str) -> None:
    """Raise UnavailableError if the libraries of the `export` extra are missing."""
    require(purpose, ("torch", "onnx", "onnxscript", "onnx_graphsurgeon"), "export")
