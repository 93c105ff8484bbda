"""Sessions: one protocol for whatever runs a graph, and the table of what can.

The checks that every session shares live in `check_inputs`, driven by the graph's declared inputs: names, then dtypes,
then shapes, then ranges. A backend is only what differs: `onnx_session` for ONNX Runtime, `tensorrt_session` for
engines.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.bundle.manifest import GRAPH_NAMES, GraphSpec
from qpert.runtime.errors import InputError, LimitError
from qpert.runtime.libraries import load_onnxruntime
from qpert.runtime.sessions.device import DeviceArray
from qpert.runtime.sessions.tensorrt.libraries import FLAVORS

Array = np.ndarray | DeviceArray
Arrays = Mapping[str, Array]

AXIS_MEANING = {
    "B": ("images", "--max-batch"),
    "I": ("images", "--max-batch"),
    "O": ("boxes an image", "--max-boxes"),
    "T": ("texts", "--max-text"),
    "L": ("tokens a text", "--max-length"),
}


class Session(Protocol):
    """Runs one graph. A context manager; after `close` it cannot run.

    Inputs may also be what `run_on_device` of another session of the same provider left in GPU memory.
    """

    spec: GraphSpec

    def run(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """Inputs and outputs by name, as `spec` declares them. Raises InputError or LimitError where they differ."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class DeviceSession(Protocol):
    """A session on a GPU, which can leave its outputs there."""

    def run_on_device(self, inputs: Arrays) -> dict[str, DeviceArray]: ...


def run_on_device(session: Session, inputs: Arrays) -> Mapping[str, Array]:
    """Run a graph and leave its outputs where it ran: in GPU memory, or on the host where the session is no GPU's."""
    return session.run_on_device(inputs) if isinstance(session, DeviceSession) else session.run(inputs)


@dataclass(frozen=True)
class Provider:
    """What runs graphs: a provider of ONNX Runtime (its name there), or engines of a TensorRT flavour.

    ONNX Runtime has providers for TensorRT too. They compile engines of their own at the first run, without fingerprint
    or profile, so they are not offered: `tensorrt` and `rtx` mean engines that `qpert build` made.
    """

    name: str
    advice: str
    onnxruntime: str = ""
    flavor: str = ""


PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (
        Provider("cpu", "pip install 'qpert[cpu]'", onnxruntime="CPUExecutionProvider"),
        Provider(
            "cuda",
            "an NVIDIA GPU, its driver, and pip install 'qpert[gpu]'",
            onnxruntime="CUDAExecutionProvider",
        ),
        Provider("tensorrt", "an NVIDIA GPU, its driver, and pip install 'qpert[trt]'", flavor="classic"),
        Provider("rtx", "an NVIDIA GPU, its driver, and pip install 'qpert[rtx]'", flavor="rtx"),
    )
}


def find_provider(name: str) -> Provider:
    if not isinstance(name, str) or name not in PROVIDERS:
        raise InputError(f"got provider {name!r}, expected one of {', '.join(PROVIDERS)}", code="provider")
    return PROVIDERS[name]


def available_providers() -> list[str]:
    """Names of the providers whose libraries are installed (a GPU may still be missing: opening a bundle tells)."""
    try:
        found = load_onnxruntime().get_available_providers()
    except ImportError:
        found = []
    return [provider.name for provider in PROVIDERS.values() if has_library(provider, found)]


def has_library(provider: Provider, onnxruntime_has: Iterable[str]) -> bool:
    if provider.flavor:
        return importlib.util.find_spec(FLAVORS[provider.flavor].module) is not None
    return provider.onnxruntime in onnxruntime_has


def open_sessions(bundle: Bundle, provider: str = "cpu", *, threads: int = 0) -> dict[str, Session]:
    """Every graph of a bundle on exactly the provider that was asked for; all are open, or none.

    Args:
        bundle: the opened bundle.
        provider: `cpu` or `cuda` (ONNX Runtime), `tensorrt` or `rtx` (engines in the bundle).
        threads: CPU threads for one operator; 0 leaves it to ONNX Runtime.

    Raises:
        UnavailableError: the provider is not there or did not start, or the bundle has no engine for this machine.
            Nothing else is used in its place.
        BundleError: a file is not the graph that the manifest describes.
    """
    chosen = find_provider(provider)
    if chosen.flavor:
        from qpert.runtime.sessions.tensorrt.session import open_engine_sessions

        return dict(open_engine_sessions(bundle, FLAVORS[chosen.flavor]))
    sessions: dict[str, Session] = {}
    try:
        for name in GRAPH_NAMES:
            graph = bundle.manifest.graphs[name]
            sessions[name] = open_session(bundle.graph_path(graph), graph, provider, threads=threads)
    except BaseException:
        for session in sessions.values():
            session.close()
        raise
    return sessions


def open_session(path: Path, spec: GraphSpec, provider: str = "cpu", *, threads: int = 0) -> Session:
    """Open one ONNX file in ONNX Runtime on exactly the provider that was asked for, `cpu` or `cuda`.

    Raises:
        UnavailableError: the provider is not there or did not start. Nothing else is used in its place.
        BundleError: the file is not the graph that `spec` describes.
        InputError: the provider is none of ONNX Runtime's.
    """
    from qpert.runtime.sessions.onnx import OnnxRuntimeSession

    chosen = find_provider(provider)
    if not chosen.onnxruntime:
        raise InputError(f"provider {provider!r} runs the engines of a bundle, not {path}; open the bundle with it")
    return OnnxRuntimeSession.open(path, spec, chosen, threads=threads)


def check_inputs(spec: GraphSpec, inputs: Arrays) -> None:
    """Names, dtypes, shapes and ranges of `inputs` against `spec`; axes of one name must have one length.

    Raises:
        InputError: a name, dtype or shape differs.
        LimitError: an axis is longer or shorter than the bundle was exported for.
    """
    if set(inputs) != set(spec.input_names):
        raise InputError(f"graph {spec.name!r} got inputs {sorted(inputs)}, expected {sorted(spec.input_names)}")
    lengths: dict[str, int] = {}
    for tensor in spec.inputs:
        array = inputs[tensor.name]
        got, expected = f"{array.dtype} {list(array.shape)}", f"{tensor.dtype} {list(tensor.shape)}"
        message = f"input {tensor.name!r} of graph {spec.name!r} is {got}, expected {expected}"
        if array.dtype != np.dtype(tensor.dtype) or array.ndim != len(tensor.shape):
            raise InputError(message)
        for length, axis in zip(array.shape, tensor.shape, strict=True):
            wanted = lengths.setdefault(axis, length) if isinstance(axis, str) else axis
            if length != wanted:
                raise InputError(f"{message} with {axis} = {wanted}" if isinstance(axis, str) else message)
    for axis, length in lengths.items():
        check_range(spec, axis, length)


def check_range(spec: GraphSpec, axis: str, length: int) -> None:
    allowed = spec.ranges[axis]
    if allowed.min <= length <= allowed.max:
        return
    what, option = AXIS_MEANING.get(axis, (axis, "the profile's upper end"))
    raise LimitError(
        f"graph {spec.name!r} got {length} {what}, expected {allowed.min} to {allowed.max}; "
        f"pass fewer, or export again with a larger {option}"
    )


def closed_error(spec: GraphSpec) -> InputError:
    return InputError(f"the session of graph {spec.name!r} is closed; open the bundle again", code="session-closed")
