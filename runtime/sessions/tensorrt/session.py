"""Graphs as TensorRT engines, with classic TensorRT or TensorRT-RTX: the same calls for both.

Each session has one block of GPU memory and one of page-locked host memory for every input and output, of the size that
the profile's largest call needs, allocated when it is opened: addresses never change and no call allocates. All
sessions of a bundle share one stream. Shapes that come again are replayed as CUDA graphs (`tensorrt_contexts`).
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from qpert.runtime.bundle.folder import GraphBundle
from qpert.runtime.bundle.graph_spec import AxisRange, GraphSpec, TensorSpec
from qpert.runtime.errors import BundleError, UnavailableError
from qpert.runtime.forks import abandon, gpu_forked_error, tell_after_fork
from qpert.runtime.sessions.device import Device, DeviceArray, DeviceMemory, PinnedMemory, Shape, on_host
from qpert.runtime.sessions.protocol import Array, Arrays, check_inputs, closed_error
from qpert.runtime.sessions.tensorrt.contexts import Contexts, make_contexts
from qpert.runtime.sessions.tensorrt.engines import (
    Engine,
    Machine,
    Profile,
    engine_for,
    rebuild_command,
    require_flavor,
)
from qpert.runtime.sessions.tensorrt.libraries import FLAVORS, Flavor, flavor_version, load_flavor
from qpert.runtime.sessions.tensorrt.log import make_log

BOX_INPUTS = ("object_masks", "box_weights")
OUT_OF_MEMORY = ("out of memory", "OutOfMemory", "OUT_OF_MEMORY")


def open_engine_sessions(bundle: GraphBundle, flavor: Flavor, graphs: Sequence[str] = ()) -> dict[str, EngineSession]:
    """Every graph of a bundle, or those named, as an engine of one flavour that runs here: all are open, or none.

    Raises:
        UnavailableError: the library, CUDA, a GPU, an engine for it or memory is missing; the message says what to do.
        BundleError: an engine's file or record was altered.
    """
    library = load_flavor(flavor)
    require_flavor(bundle, flavor)
    device = Device()
    device.join()
    try:
        engine = engine_for(bundle, Machine(flavor, flavor_version(library), device.gpu()))
        with ExitStack() as opened:
            sessions = {}
            for name in graphs or bundle.manifest.graphs:
                sessions[name] = EngineSession(library, device, engine, bundle.manifest.graphs[name])
                opened.callback(sessions[name].close)
            opened.pop_all()
        return sessions
    finally:
        device.leave()  # the sessions have joined for themselves


@dataclass(frozen=True)
class TensorBuffer:
    """Memory for one input or output, large enough for the profile's largest call."""

    spec: TensorSpec
    memory: DeviceMemory
    pinned: PinnedMemory

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self.spec.dtype)

    def on_host(self, shape: Shape) -> np.ndarray:
        """The page-locked memory as an array, which the next call overwrites."""
        return self.pinned.view(shape, self.dtype)

    def close(self) -> None:
        self.memory.close()
        self.pinned.close()


class EngineSession:
    """One graph as an engine. `spec` has the engine's own limits where they are narrower than the bundle's."""

    def __init__(self, library: Any, device: Device, engine: Engine, graph: GraphSpec) -> None:
        """Raises UnavailableError where the library or the GPU cannot take the engine, BundleError where it is not the
        engine of this graph."""
        self.device = device
        self.bundle = engine.bundle.absolute()
        self.flavor = engine.record.flavor
        self.inherited = False
        self.profile = engine.record.graphs[graph.name].profile
        self.spec = within_profile(graph, self.profile)
        self._log = make_log(library)
        self._contexts: Contexts | None = None
        self._closing = ExitStack()  # what was opened last is closed first
        device.join()
        self._closing.callback(device.leave)
        tell_after_fork(self)
        try:
            self._runtime, self._engine = load_engine(library, device, engine, graph.name, self._log)
            self._closing.callback(self._forget_engine)
            check_tensors(library, self._engine, self.spec, engine.path(graph.name))
            self._buffers = self._allocate()
            self._contexts = self._prepare(library, engine)
        except BaseException:
            self.close()
            raise

    def _allocate(self) -> dict[str, TensorBuffer]:
        """Buffers of all inputs and outputs."""
        buffers = {}
        for tensor in (*self.spec.inputs, *self.spec.outputs):
            nbytes = largest_bytes(tensor, self.spec)
            purpose = f"{tensor.name!r} of graph {self.spec.name!r}"
            buffers[tensor.name] = TensorBuffer(
                tensor, self.device.allocate(nbytes, purpose), PinnedMemory(self.device, nbytes)
            )
            self._closing.callback(buffers[tensor.name].close)
        return buffers

    def _prepare(self, library: Any, engine: Engine) -> Contexts:
        addresses = {name: buffer.memory.address for name, buffer in self._buffers.items()}
        key = engine.record.graphs[self.spec.name].sha256
        contexts = make_contexts(library, self.device, self._engine, addresses, self._log, name=self.spec.name, key=key)
        self._closing.callback(contexts.close)
        return contexts

    def run(self, inputs: Arrays) -> dict[str, np.ndarray]:
        with self.device.lock:
            shapes = self._execute(inputs)
            for name, shape in shapes.items():
                buffer = self._buffers[name]
                nbytes = math.prod(shape) * buffer.dtype.itemsize
                self.device.copy(buffer.pinned.address, buffer.memory.address, nbytes, "DeviceToHost")
            self.device.synchronize()
            return {name: self._buffers[name].on_host(shape).copy() for name, shape in shapes.items()}

    def run_on_device(self, inputs: Arrays) -> dict[str, DeviceArray]:
        """As `run`; the outputs stay in GPU memory of their own, until they are forgotten."""
        with self.device.lock:
            outputs = {
                name: copy_on_device(self.device, self._buffers[name], shape)
                for name, shape in self._execute(inputs).items()
            }
            self.device.synchronize()
            return outputs

    def _execute(self, inputs: Arrays) -> dict[str, Shape]:
        """Queue the inputs and the engine; returns the outputs' shapes. Buffers hold them once the stream is done."""
        if self.inherited:
            raise gpu_forked_error()
        if self._contexts is None:
            raise closed_error(self.spec)
        check_inputs(self.spec, inputs)
        given = with_least_boxes(self.spec, inputs, self.profile)
        for name, array in given.items():
            self._upload(self._buffers[name], array)
        self._contexts.execute({name: tuple(array.shape) for name, array in given.items()})
        lengths = axis_lengths(self.spec, given)
        return {tensor.name: shape_with(tensor, lengths) for tensor in self.spec.outputs}

    def _upload(self, buffer: TensorBuffer, array: Array) -> None:
        if isinstance(array, DeviceArray):
            self.device.copy(buffer.memory.address, array.address, array.nbytes, "DeviceToDevice")
            return
        # The last run has ended with the stream, so nothing reads the page-locked memory any more.
        buffer.on_host(array.shape)[...] = array
        self.device.copy(buffer.memory.address, buffer.pinned.address, array.nbytes, "HostToDevice")

    def close(self) -> None:
        """Free everything; a second call does nothing."""
        with self.device.lock:
            self._contexts = None
            self._closing.close()

    def after_fork(self) -> None:
        """In a forked child: nothing of the library or of CUDA is called or destroyed any more."""
        abandon(dict(vars(self)))
        self._contexts, self._closing, self.inherited = None, ExitStack(), True

    def __reduce__(self) -> tuple[Callable[..., EngineSession], tuple[object, ...]]:
        if self.inherited:
            raise gpu_forked_error()
        if self._contexts is None:
            raise closed_error(self.spec)
        return reopened, (self.bundle, self.flavor, self.spec.name)

    def _forget_engine(self) -> None:
        self._engine = self._runtime = None

    def __enter__(self) -> EngineSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def reopened(bundle: Path, flavor: str, graph: str) -> EngineSession:
    """What a pickled or copied session becomes: one of the same bundle's engine, on a device of its own."""
    from qpert.runtime.detection.opening import open_bundle

    return open_engine_sessions(open_bundle(bundle), FLAVORS[flavor], (graph,))[graph]


def load_engine(library: Any, device: Device, engine: Engine, graph: str, log: Any) -> tuple[Any, Any]:
    """The library's runtime and the engine, read from its file without a copy in between."""
    path = engine.require(graph)
    runtime = library.Runtime(log)
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as plan:
        loaded = runtime.deserialize_cuda_engine(plan)
    if loaded is not None:
        return runtime, loaded
    if any(words in log.summary() for words in OUT_OF_MEMORY):
        raise device.out_of_memory(path.stat().st_size, f"the engine of graph {graph!r}")
    raise UnavailableError(
        f"{engine.record.title} cannot open {path}: {log.summary()}; build it again: "
        f"{rebuild_command(engine.bundle, engine.record)}",
        code="engine-unreadable",
    )


def check_tensors(library: Any, engine: Any, spec: GraphSpec, path: Path) -> None:
    """The engine's inputs and outputs must be the graph's, of the same dtypes.

    Raises:
        BundleError: they are others.
    """
    found: dict[Any, dict[str, str]] = {library.TensorIOMode.INPUT: {}, library.TensorIOMode.OUTPUT: {}}
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        found[engine.get_tensor_mode(name)][name] = dtype_name(library, engine.get_tensor_dtype(name))
    declared = [{tensor.name: tensor.dtype for tensor in tensors} for tensors in (spec.inputs, spec.outputs)]
    if list(found.values()) != declared:
        raise BundleError(
            f"{path} has inputs and outputs {list(found.values())}, the manifest declares {declared} for graph "
            f"{spec.name!r}; build the engines again with `qpert build --force`",
            code="engine-signature",
        )


def dtype_name(library: Any, dtype: Any) -> str:
    try:
        return np.dtype(library.nptype(dtype)).name
    except TypeError:  # NumPy has none such, bfloat16 for instance
        return str(dtype)


def within_profile(graph: GraphSpec, profile: Profile) -> GraphSpec:
    """The graph's declaration with the engine's ranges.

    Boxes are an exception: an engine may start at one box where the graph starts at none, since `with_least_boxes`
    handles that case.

    Raises:
        BundleError: the profile is not one of this graph.
    """
    message = f"the engine's record has the profile {profile} for graph {graph.name!r}, which takes {graph.inputs}"
    if set(profile) != set(graph.input_names):
        raise BundleError(f"{message}; build the engines again with `qpert build --force`", code="engine-record-values")
    ranges = dict(graph.ranges)
    for tensor in graph.inputs:
        try:
            for axis, least, _, most in zip(tensor.shape, *profile[tensor.name], strict=True):
                if isinstance(axis, str):
                    low = graph.ranges[axis].min if axis == "O" else max(ranges[axis].min, least)
                    ranges[axis] = AxisRange(low, min(ranges[axis].max, most))
                elif (least, most) != (axis, axis):
                    raise ValueError(f"axis of {axis} is {least} to {most}")
        except ValueError as error:
            raise BundleError(
                f"{message} ({error}); build the engines again with `qpert build --force`", code="engine-record-values"
            ) from error
    return replace(graph, ranges=ranges)


def with_least_boxes(spec: GraphSpec, inputs: Arrays, profile: Profile) -> Mapping[str, Array]:
    """`inputs` with boxes of weight zero appended up to the fewest that the engine takes: stock BLIP-2 exactly."""
    if not spec.takes_boxes:
        return inputs
    least = profile["object_masks"][0][1]
    given = dict(inputs)
    for name in BOX_INPUTS:
        missing = least - given[name].shape[1]
        if missing > 0:
            array = on_host(given[name])
            given[name] = np.pad(array, [(0, missing if axis == 1 else 0) for axis in range(array.ndim)])
    return given


def axis_lengths(spec: GraphSpec, inputs: Arrays) -> dict[str, int]:
    """The length of every named axis of a call."""
    return {
        axis: length
        for tensor in spec.inputs
        for axis, length in zip(tensor.shape, inputs[tensor.name].shape, strict=True)
        if isinstance(axis, str)
    }


def shape_with(tensor: TensorSpec, lengths: Mapping[str, int]) -> Shape:
    return tuple(lengths[axis] if isinstance(axis, str) else axis for axis in tensor.shape)


def largest_bytes(tensor: TensorSpec, spec: GraphSpec) -> int:
    """What the largest call of a graph needs for one input or output."""
    longest = {axis: length.max for axis, length in spec.ranges.items()}
    return math.prod(shape_with(tensor, longest)) * np.dtype(tensor.dtype).itemsize


def copy_on_device(device: Device, buffer: TensorBuffer, shape: Shape) -> DeviceArray:
    """What a buffer holds, in memory of its own; the copy is queued."""
    nbytes = math.prod(shape) * buffer.dtype.itemsize
    memory = device.allocate(nbytes, f"keeping {buffer.spec.name!r} in GPU memory")
    device.copy(memory.address, buffer.memory.address, nbytes, "DeviceToDevice")

    def download() -> np.ndarray:
        array = np.empty(shape, buffer.dtype)
        device.download(memory.address, array)
        return array

    return DeviceArray(shape, buffer.dtype, memory.address, download, memory)
