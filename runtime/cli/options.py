"""Options that several commands share."""

from __future__ import annotations

import importlib.util
import shlex
import sys
from pathlib import Path

import click

from qpert.runtime.errors import UnavailableError
from qpert.runtime.files import portable_name
from qpert.runtime.sessions.open import PROVIDERS

bundle_argument = click.argument("bundle", type=click.Path(path_type=Path))
provider_option = click.option(
    "--provider",
    type=click.Choice(list(PROVIDERS)),
    default="cpu",
    show_default=True,
    help="what runs the graphs: ONNX Runtime on cpu or cuda; engines that `qpert build` made with tensorrt or rtx",
)
FLAVORS_HELP = "classic TensorRT, TensorRT-RTX, or what suits the target"
TARGET_HELP = (
    "auto (this machine's GPU; without one, all that can be built for), current, sm80,sm89 (an engine for each) or "
    "sm80+sm89 (one for both)"
)
json_option = click.option("--json", "as_json", is_flag=True, help="print exactly one JSON document on stdout")


def command_line() -> str:
    """What the user typed, as a bundle or an engine records it."""
    return portable_name(shlex.join(["qpert", *(click.get_current_context().obj or sys.argv[1:])]))


def require_export_extra(purpose: str) -> None:
    """Raises UnavailableError where the libraries of the `export` extra are missing."""
    needed = ("torch", "onnx", "onnxscript", "onnx_graphsurgeon")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise UnavailableError(f"{purpose} needs {', '.join(missing)}, not installed here; pip install 'qpert[export]'")
