"""Graphs in Intel's OpenVINO, on the CPU, in float32.

OpenVINO chooses a precision by the CPU: where that has bfloat16 it computes float graphs in it and says nothing, which
moves query embeddings by up to 0.1. Here float32 is requested, and the compiled graph is asked whether it uses it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np

from qpert.runtime.bundle.graph_spec import GraphSpec
from qpert.runtime.errors import BundleError, UnavailableError
from qpert.runtime.forks import keep_in_children
from qpert.runtime.libraries import load_openvino
from qpert.runtime.sessions.graph_files import FileSession, GraphSource, check_declared
from qpert.runtime.sessions.protocol import Arrays
from qpert.runtime.sessions.providers import Provider

PROPERTIES: dict[str, Any] = {
    "INFERENCE_PRECISION_HINT": "f32",
    # Activations of products with 8-bit weights stay as the graph has them.
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
    "PERFORMANCE_HINT": "LATENCY",
    # Sessions and processes that each pin their threads to the first cores would share those and leave others idle.
    "ENABLE_CPU_PINNING": False,
}
"""Source: "CPU device" in OpenVINO's documentation."""

_started_in: set[int] = set()
"""The process that OpenVINO was started in; a forked child inherits the number."""


class CompiledGraph:
    """A compiled model behind the call that ONNX Runtime's session has. Several threads may call it."""

    def __init__(self, compiled: Any) -> None:
        self.compiled = compiled
        self._idle: SimpleQueue[Any] = SimpleQueue()  # a request serves one call at a time

    def run(self, names: Sequence[str], inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Outputs by name, in arrays of their own."""
        try:
            request = self._idle.get_nowait()
        except Empty:
            request = self.compiled.create_infer_request()
        feeds = {name: np.asarray(array, order="C") for name, array in inputs.items()}
        found = request.infer(feeds, share_inputs=True)
        outputs = [found[name] for name in names]
        self._idle.put(request)
        return outputs

    def signature(self, spec: GraphSpec) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The names of inputs and outputs. A port also has the names of what OpenVINO found to be equal to it; of these
        the one that `spec` declares counts."""
        ports = (self.compiled.inputs, spec.input_names), (self.compiled.outputs, spec.output_names)
        inputs, outputs = (tuple(declared_name(port, names) for port in group) for group, names in ports)
        return inputs, outputs


class OpenVinoSession(FileSession):
    """A graph in OpenVINO."""

    @classmethod
    def open(cls, path: Path, spec: GraphSpec, provider: Provider, *, threads: int = 0) -> OpenVinoSession:
        """See `qpert.runtime.sessions.open.open_session`."""
        compiled = start_openvino(path, provider, threads)
        check_declared(compiled.signature(spec), spec, path)
        return cls(spec, compiled, GraphSource.of(path, provider.name, threads))

    def run(self, inputs: Arrays) -> dict[str, np.ndarray]:
        compiled: CompiledGraph = self._ready(inputs)
        names = self.spec.output_names
        try:
            outputs = compiled.run(names, dict(inputs))  # type: ignore[arg-type]  # no GPU's arrays reach it
        except MemoryError as error:
            raise memory_error(f"run graph {self.spec.name!r}", error) from error
        except Exception as error:
            if not is_openvinos(error):
                raise
            raise BundleError(
                f"OpenVINO loads graph {self.spec.name!r} and cannot run it ({one_line(error)}); its file is not what "
                "`qpert export` makes: export the bundle again",
                code="openvino-run",
            ) from error
        return dict(zip(names, outputs, strict=True))


def start_openvino(model: Path | bytes, provider: Provider, threads: int) -> CompiledGraph:
    """Compile one ONNX file, or a small model given as its bytes, on exactly the provider's device.

    Args:
        model: the file, with its external data in the same folder.
        provider: whose device is used.
        threads: CPU threads; 0 leaves it to OpenVINO, which takes one a physical core.

    Raises:
        UnavailableError: OpenVINO is not installed, was started before this process was forked, lacks memory, or would
            not compute in float32.
        BundleError: the file is no graph that OpenVINO can compile.
    """
    openvino = required_openvino(provider)
    name = model if isinstance(model, Path) else "a model"
    properties = PROPERTIES | ({"INFERENCE_NUM_THREADS": threads} if threads else {})
    try:
        compiled = openvino.Core().compile_model(read_onnx(openvino, model), provider.openvino, properties)
    except MemoryError as error:
        raise memory_error(f"load {name}", error) from error
    except Exception as error:
        if not is_openvinos(error):
            raise
        raise BundleError(
            f"OpenVINO cannot load {name}: {one_line(error)}; export the bundle again, or use --provider cpu",
            code="openvino-unreadable",
        ) from error
    precision = compiled.get_property("INFERENCE_PRECISION_HINT")
    if precision != openvino.Type.f32:
        raise UnavailableError(
            f"OpenVINO {openvino.__version__} was told to compute in float32 and would compute in {precision}; use "
            "--provider cpu, or another version of OpenVINO",
            code="openvino-precision",
        )
    return CompiledGraph(keep_in_children(compiled))


def required_openvino(provider: Provider) -> Any:
    """The module. Raises UnavailableError where it is not installed, or cannot work in this process."""
    try:
        openvino = load_openvino()
    except ImportError as error:
        raise UnavailableError(f"OpenVINO is not installed; {provider.advice}", code="no-openvino") from error
    if _started_in - {os.getpid()}:
        raise UnavailableError(
            "this process was forked from one that runs graphs with OpenVINO, whose threads do not exist here; use "
            "--provider cpu, or start processes with the method 'spawn' (multiprocessing, torch DataLoader) or without "
            "preloading (gunicorn)",
            code="forked-openvino",
        )
    _started_in.add(os.getpid())
    return openvino


def read_onnx(openvino: Any, model: Path | bytes) -> Any:
    """The model by the ONNX reader alone; `Core.read_model` tries those of six other formats too."""
    if isinstance(model, bytes):
        return openvino.Core().read_model(model)
    reader = openvino.frontend.FrontEndManager().load_by_framework("onnx")
    return reader.convert(reader.load(str(model)))


def describe_device(provider: Provider) -> str:
    """`OpenVINO 2026.4.1 on AMD EPYC, in float32`."""
    openvino = required_openvino(provider)
    name = str(openvino.Core().get_property(provider.openvino, "FULL_DEVICE_NAME")).strip()
    return f"OpenVINO {openvino.__version__.split('-')[0]} on {name}, in float32"


def memory_error(what: str, error: Exception) -> UnavailableError:
    return UnavailableError(
        f"there is not enough memory to {what} with OpenVINO ({error}); end other programs, or pass fewer images or "
        "texts a call",
        code="openvino-memory",
    )


def declared_name(port: Any, declared: Sequence[str]) -> str:
    known = port.get_names()
    return next((name for name in declared if name in known), port.any_name)


def is_openvinos(error: Exception) -> bool:
    """Its core raises RuntimeError, whatever went wrong; its readers raise classes of their own."""
    return isinstance(error, RuntimeError) or type(error).__module__.startswith("openvino")


def one_line(error: Exception) -> str:
    """OpenVINO's words without the places in its source."""
    lines = (line.strip(" :") for line in str(error).splitlines())
    return "; ".join(line for line in lines if line and not line.startswith("Exception from")) or repr(error)
