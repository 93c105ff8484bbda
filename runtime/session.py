"""Sessions: one protocol for whatever runs a graph, and the ONNX Runtime backend.

The checks that every backend shares live in `check_inputs`, driven by the graph's declared inputs: names, then dtypes,
then shapes, then ranges. A backend is only what differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from qpert.runtime.errors import BundleError, InputError, LimitError, UnavailableError
from qpert.runtime.manifest import GraphSpec

Arrays = Mapping[str, np.ndarray]

AXIS_MEANING = {
    "B": ("images", "--max-batch"),
    "I": ("images", "--max-batch"),
    "O": ("boxes an image", "--max-boxes"),
    "T": ("texts", "--max-text"),
    "L": ("tokens a text", "--max-length"),
}


class Session(Protocol):
    """Runs one graph. A context manager; after `close` it cannot run."""

    spec: GraphSpec

    def run(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """Inputs and outputs by name, as `spec` declares them. Raises InputError or LimitError where they differ."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Provider:
    """What the user calls a provider, and how ONNX Runtime does."""

    name: str
    onnxruntime: str
    advice: str


PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (
        Provider("cpu", "CPUExecutionProvider", "pip install 'qpert[cpu]'"),
        Provider("cuda", "CUDAExecutionProvider", "an NVIDIA GPU, its driver, and pip install 'qpert[gpu]'"),
        Provider(
            "tensorrt",
            "TensorrtExecutionProvider",
            "an NVIDIA GPU, its driver, pip install 'qpert[gpu]' and TensorRT 10",
        ),
        Provider("rtx", "NvTensorRTRTXExecutionProvider", "an RTX GPU and an ONNX Runtime built with TensorRT-RTX"),
    )
}


def find_provider(name: str) -> Provider:
    if name not in PROVIDERS:
        raise InputError(f"got provider {name!r}, expected one of {', '.join(PROVIDERS)}")
    return PROVIDERS[name]


def available_providers() -> list[str]:
    """Names of the providers that the installed ONNX Runtime has (a GPU may still be missing: `open_session` tells)."""
    try:
        import onnxruntime
    except ImportError:
        return []
    found = onnxruntime.get_available_providers()
    return [provider.name for provider in PROVIDERS.values() if provider.onnxruntime in found]


def open_session(path: Path, spec: GraphSpec, provider: str = "cpu", *, threads: int = 0) -> Session:
    """Open one graph on exactly the provider that was asked for.

    Args:
        path: the ONNX file.
        spec: its declared inputs and outputs.
        provider: `cpu`, `cuda`, `tensorrt` or `rtx`.
        threads: CPU threads for one operator; 0 leaves it to ONNX Runtime.

    Raises:
        UnavailableError: the provider is not there or did not start. Nothing else is used in its place.
        BundleError: the file is not the graph that `spec` describes.
    """
    return OnnxRuntimeSession(path, spec, find_provider(provider), threads=threads)


class OnnxRuntimeSession:
    """A graph in ONNX Runtime."""

    def __init__(self, path: Path, spec: GraphSpec, provider: Provider, *, threads: int = 0) -> None:
        self.spec = spec
        self.provider = provider
        self._session: Any = start_onnxruntime(path, provider, threads)
        check_declared(self._session, spec, path)

    def run(self, inputs: Arrays) -> dict[str, np.ndarray]:
        if self._session is None:
            raise InputError(f"the session of graph {self.spec.name!r} is closed; open the bundle again")
        check_inputs(self.spec, inputs)
        outputs = self._session.run(list(self.spec.output_names), dict(inputs))
        return dict(zip(self.spec.output_names, outputs, strict=True))

    def close(self) -> None:
        self._session = None

    def __enter__(self) -> OnnxRuntimeSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def start_onnxruntime(path: Path, provider: Provider, threads: int) -> Any:
    """An `onnxruntime.InferenceSession` that really uses `provider`.

    ONNX Runtime falls back to the CPU in silence when a provider cannot start, so what it uses is compared with what
    was asked for.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise UnavailableError("ONNX Runtime is not installed; pip install 'qpert[cpu]' or 'qpert[gpu]'") from error
    known = onnxruntime.get_available_providers()
    if provider.onnxruntime not in known:
        raise UnavailableError(
            f"provider {provider.name!r} was asked for, this ONNX Runtime {onnxruntime.__version__} has "
            f"{', '.join(known)}; it needs {provider.advice}"
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=[provider.onnxruntime])
    except Exception as error:
        if "NOT_IMPLEMENTED" in str(error):
            raise UnavailableError(
                f"provider {provider.name!r} lacks an operator that {path} needs ({error}); bfloat16 runs on GPUs only:"
                " use another provider, or export with --precision fp32 or fp16"
            ) from error
        raise BundleError(f"ONNX Runtime cannot load {path}: {error}") from error
    if provider.onnxruntime not in session.get_providers():
        raise UnavailableError(
            f"provider {provider.name!r} was asked for and could not start, ONNX Runtime would use "
            f"{', '.join(session.get_providers())} in its place; it needs {provider.advice}"
        )
    return session


def check_declared(session: Any, spec: GraphSpec, path: Path) -> None:
    """The file's inputs and outputs must be the manifest's."""
    found = (tuple(i.name for i in session.get_inputs()), tuple(o.name for o in session.get_outputs()))
    declared = (spec.input_names, spec.output_names)
    if found != declared:
        raise BundleError(f"{path} has inputs and outputs {found}, the manifest declares {declared}; export it again")


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
