"""Graphs in ONNX Runtime, on the CPU or on a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from qpert.runtime.bundle.graph_spec import GraphSpec
from qpert.runtime.errors import BundleError, UnavailableError
from qpert.runtime.forks import gpu_forked_error, keep_in_children
from qpert.runtime.libraries import load_cuda_libraries, load_onnxruntime
from qpert.runtime.sessions.device import DeviceArray
from qpert.runtime.sessions.graph_files import FileSession, GraphSource, check_declared
from qpert.runtime.sessions.protocol import Array, Arrays
from qpert.runtime.sessions.providers import Provider

CUDA_OPTIONS = {
    # Products of float32 stay float32: the perturbation needs more than the 10 bits that TF32 leaves of its inputs.
    "use_tf32": "0",
    # Grow by what is asked for; the default doubles, which can ask for gigabytes that nothing uses.
    "arena_extend_strategy": "kSameAsRequested",
}
"""Source: the documentation of ONNX Runtime's CUDA provider. Its CUDA graphs are not used: they need one shape and
fixed addresses for the life of a session, and calls here have many shapes. Engines replay repeated shapes."""

NO_MEMORY = ("Failed to allocate memory", "out of memory", "BFCArena", "CUDA failure 2:")
"""What an error of ONNX Runtime contains where memory ran out."""


class OnnxRuntimeSession(FileSession):
    """A graph in ONNX Runtime."""

    @classmethod
    def open(
        cls, path: Path, spec: GraphSpec, provider: Provider, *, threads: int = 0, spin: bool = True
    ) -> OnnxRuntimeSession:
        """See `qpert.runtime.sessions.open.open_session`."""
        source = GraphSource.of(path, provider.name, threads, spin=spin) if path.is_file() else None
        session = start_onnxruntime(path, provider, threads, spin=spin)
        found = (tuple(i.name for i in session.get_inputs()), tuple(o.name for o in session.get_outputs()))
        check_declared(found, spec, path)
        kind = CudaSession if provider.name == "cuda" else OnnxRuntimeSession
        return kind(spec, session, source)

    def run(self, inputs: Arrays) -> dict[str, np.ndarray]:
        session = self._ready(inputs)
        with errors_explained(self.spec):
            outputs = session.run(list(self.spec.output_names), dict(inputs))
        return dict(zip(self.spec.output_names, outputs, strict=True))


class CudaSession(OnnxRuntimeSession):
    """A graph in ONNX Runtime's CUDA provider: inputs and outputs are bound, so that they can stay in GPU memory.

    memory: where ONNX Runtime puts what stays, in its words.
    """

    memory = "cuda"

    def _open_here(self) -> None:
        raise gpu_forked_error()

    def run(self, inputs: Arrays) -> dict[str, np.ndarray]:
        values = self._run_bound(inputs, "cpu")
        return {name: value.numpy() for name, value in values.items()}

    def run_on_device(self, inputs: Arrays) -> dict[str, DeviceArray]:
        return {name: device_array(value) for name, value in self._run_bound(inputs, self.memory).items()}

    def _run_bound(self, inputs: Arrays, outputs_in: str) -> dict[str, Any]:
        """Outputs as `onnxruntime.OrtValue`, in the memory named."""
        session = self._ready(inputs)
        binding = session.io_binding()
        for name, array in inputs.items():
            self._bind(binding, name, array)
        for name in self.spec.output_names:
            binding.bind_output(name, outputs_in)
        with errors_explained(self.spec):
            session.run_with_iobinding(binding)
        return dict(zip(self.spec.output_names, binding.get_outputs(), strict=True))

    def _bind(self, binding: Any, name: str, array: Array) -> None:
        if isinstance(array, DeviceArray):
            binding.bind_input(name, self.memory, 0, array.dtype, array.shape, array.address)
        else:
            binding.bind_cpu_input(name, np.ascontiguousarray(array))


def device_array(value: Any) -> DeviceArray:
    """An `onnxruntime.OrtValue` of tensors as our own kind; it keeps the value alive."""
    kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}
    dtype = np.dtype(kinds[value.data_type()])
    return DeviceArray(tuple(value.shape()), dtype, value.data_ptr(), value.numpy, value)


@contextlib.contextmanager
def errors_explained(spec: GraphSpec) -> Iterator[None]:
    """Turns ONNX Runtime's errors into ones that say what to do; others pass."""
    try:
        yield
    except Exception as error:
        if any(words in str(error) for words in NO_MEMORY):
            raise UnavailableError(
                f"there is not enough memory to run graph {spec.name!r} ({error}); end other programs, pass fewer "
                "images or texts a call, or export with a smaller --max-batch or --max-text, or with --precision fp16",
                code="out-of-memory",
            ) from error
        if type(error).__module__.startswith("onnxruntime"):
            raise BundleError(
                f"ONNX Runtime loads graph {spec.name!r} and cannot run it ({str(error).strip()}); its file is not "
                "what `qpert export` makes: export the bundle again",
                code="graph-run",
            ) from error
        raise


def start_onnxruntime(path: Path, provider: Provider, threads: int, *, spin: bool = True) -> Any:
    """An `onnxruntime.InferenceSession` that really uses `provider`.

    ONNX Runtime falls back to the CPU in silence when a provider cannot start, so what it uses is compared with what
    was asked for.
    """
    try:
        onnxruntime = load_onnxruntime()
    except ImportError as error:
        raise UnavailableError(
            "ONNX Runtime is not installed; pip install 'qpert[cpu]' or 'qpert[gpu]'", code="no-onnxruntime"
        ) from error
    known = onnxruntime.get_available_providers()
    if provider.onnxruntime not in known:
        raise UnavailableError(
            f"provider {provider.name!r} was asked for, this ONNX Runtime {onnxruntime.__version__} has "
            f"{', '.join(known)}; it needs {provider.advice}",
            code="provider-not-in-build",
        )
    if provider.name == "cuda":
        load_cuda_libraries()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    if not spin:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    chosen = (provider.onnxruntime, CUDA_OPTIONS if provider.name == "cuda" else {})
    try:
        session = load_session(path, options, chosen)
    except Exception as error:
        raise load_error(path, provider, error) from error
    if provider.onnxruntime not in session.get_providers():
        raise UnavailableError(
            f"provider {provider.name!r} was asked for and could not start, ONNX Runtime would use "
            f"{', '.join(session.get_providers())} in its place; it needs {provider.advice}",
            code="provider-not-started",
        )
    return keep_in_children(session)


def load_session(path: Path, options: Any, provider: tuple[str, dict[str, str]]) -> Any:
    """An `onnxruntime.InferenceSession`. ONNX Runtime 1.31 moves FP8 numbers in front of operators that take none, then
    refuses its own graph; such a graph is loaded without its rewriting of Q/DQ, and computes the same.
    """
    onnxruntime = load_onnxruntime()
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=[provider])
    except Exception as error:
        if "tensor(float8" not in str(error):
            raise
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        return onnxruntime.InferenceSession(str(path), options, providers=[provider])


def load_error(path: Path, provider: Provider, error: Exception) -> UnavailableError | BundleError:
    """What to raise where ONNX Runtime does not load a graph."""
    if any(words in str(error) for words in NO_MEMORY):
        return UnavailableError(
            f"there is not enough memory to load {path} with provider {provider.name!r} ({error}); end other programs, "
            "or export with --precision fp16",
            code="out-of-memory",
        )
    if "NOT_IMPLEMENTED" in str(error):
        return UnavailableError(
            f"provider {provider.name!r} lacks an operator that {path} needs ({error}); bfloat16 runs on GPUs only:"
            " use another provider, or export with --precision fp32 or fp16",
            code="operator-missing",
        )
    return BundleError(f"ONNX Runtime cannot load {path}: {error}", code="graph-unreadable")
