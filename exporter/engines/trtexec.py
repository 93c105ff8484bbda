"""The commands that build a bundle's engines with `trtexec`, TensorRT's own tool, on a device without qpert or Python.

They say what `qpert build` does in code: the same profiles, no TF32, and the precision of the graph. Printing them
takes the bundle alone, so that it can be done on another machine.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qpert.exporter.engines.build import sources_of
from qpert.exporter.engines.profiles import profile_of
from qpert.runtime.bundle.folder import GraphBundle
from qpert.runtime.errors import InputError
from qpert.runtime.sessions.gpus import FIRST_WITH
from qpert.runtime.sessions.tensorrt.engines import Profile

FOLDER = "trtexec"
"""Where the engines go, in the bundle. Not below `engines/`: there the runtime expects a record of what each engine was
built from and for, which `trtexec` does not write, and it runs no engine without."""

OPTIONS = ("--stronglyTyped", "--noTF32", "--skipInference")
"""Precision from the graph; float32 products in float32; build, and measure nothing.

`trtexec` of TensorRT 10.0 to 11.1 takes all options used here; 8.6 has no `--stronglyTyped`; from 11.0 on every network
is strongly typed and the option does nothing. Source: `samples/common/sampleOptions.cpp` of NVIDIA/TensorRT, at each
release from 8.6.1 to 11.1.0."""


@dataclass(frozen=True)
class TrtexecCommand:
    """How one graph becomes an engine. Files are relative to the bundle's folder, where `command` is run.

    data: the graph's external data, which must lie beside it. profile: of each input, the smallest, the most common and
    the largest shape.
    """

    graph: str
    onnx: str
    data: tuple[str, ...]
    profile: Profile
    engine: str
    command: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class TrtexecScript:
    """The commands of a bundle's graphs, and what to know before they are run."""

    bundle: str
    precision: str
    notes: tuple[str, ...]
    graphs: tuple[TrtexecCommand, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_shell(self) -> str:
        """A POSIX shell script: notes as comments, then a command for each graph."""
        lines = [f"# {note}" for note in self.notes]
        commands = [shlex.join(graph.command) for graph in self.graphs]
        return "\n".join([*lines, "set -e", shlex.join(["mkdir", "-p", FOLDER]), *commands]) + "\n"


def trtexec_script(bundle: GraphBundle, graphs: Sequence[str] = (), workspace: int | None = None) -> TrtexecScript:
    """The commands for all graphs of a bundle, or for those named.

    Args:
        bundle: the opened bundle.
        graphs: names of graphs; empty for all that engines are built of.
        workspace: most bytes of GPU scratch memory per layer; None for the tool's own limit.

    Raises:
        InputError: the bundle was quantised for the CPU.
    """
    manifest = bundle.manifest
    require_float_or_tensorrt(bundle)
    names = dict.fromkeys(graphs or manifest.graphs)
    return TrtexecScript(
        str(bundle.folder),
        manifest.precision,
        tuple(notes_on(bundle)),
        tuple(trtexec_command(bundle, name, workspace) for name in names),
    )


def trtexec_command(bundle: GraphBundle, name: str, workspace: int | None) -> TrtexecCommand:
    spec = bundle.manifest.graphs[name]
    onnx, *data = sources_of(bundle, spec)
    profile, engine = profile_of(spec), f"{FOLDER}/{name}.engine"
    command = (
        "trtexec",
        f"--onnx={onnx}",
        f"--saveEngine={engine}",
        *OPTIONS,
        *(f"--{end}Shapes={shapes_at(profile, index)}" for index, end in enumerate(("min", "opt", "max"))),
        f"--timingCacheFile={FOLDER}/timings.cache",
        *(() if workspace is None else (f"--memPoolSize=workspace:{workspace}B",)),
    )
    return TrtexecCommand(name, onnx, tuple(data), profile, engine, command)


def shapes_at(profile: Profile, index: int) -> str:
    """`input_ids:64x16,attention_mask:64x16`."""
    return ",".join(f"{name}:{'x'.join(map(str, shapes[index]))}" for name, shapes in profile.items())


def notes_on(bundle: GraphBundle) -> list[str]:
    manifest = bundle.manifest
    capability = FIRST_WITH.get(manifest.precision)
    boxes = any(graph.takes_boxes for graph in manifest.graphs.values())
    return [
        f"Engines of {bundle.folder.resolve().name} ({manifest.precision}) by trtexec of TensorRT 10.0 or later.",
        "Run in the bundle's folder, on the device itself: an engine runs only with the TensorRT that built it, on the "
        "same kind of GPU.",
        "Data files (.data) stay beside their graphs in onnx/.",
        *([f"{manifest.precision} needs a GPU from sm{capability} on."] if capability else []),
        *(["Give an image without boxes one box of weight 0: the engines take at least one."] if boxes else []),
        "Compare the engines' outputs with samples.safetensors before use; where Python and qpert are on the device, "
        "`qpert build` and `qpert verify --provider tensorrt` do it.",
    ]


def require_float_or_tensorrt(bundle: GraphBundle) -> None:
    """Raises InputError for a bundle that was quantised for the CPU. (TensorRT-RTX 1.7.1 parses its text graph and then
    refuses to build it: a quantised table goes through Gather before it is scaled.)
    """
    quantization = bundle.manifest.quantization
    if quantization and quantization.get("target") == "cpu":
        raise InputError(
            f"{bundle.folder} was quantised for the CPU, in a form that TensorRT does not build; quantise "
            "the float bundle with `qpert quantize --target tensorrt`",
            code="quantized-for-cpu",
        )
