"""Execution contexts: where an engine runs, and how shapes that come again are launched in one go.

Launching a graph of hundreds of small kernels takes the CPU longer than the GPU needs to run them, so that work of a
known shape is recorded once as a CUDA graph and replayed. TensorRT-RTX does it by itself; for classic TensorRT it is
done here.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from qpert.runtime.errors import QpertWarning, UnavailableError
from qpert.runtime.files import cache_folder, write_atomically
from qpert.runtime.sessions.device import Device, Shape
from qpert.runtime.sessions.tensorrt.libraries import captures_by_itself

Shapes = Mapping[str, Shape]
Key = tuple[tuple[str, Shape], ...]

RUNS_BEFORE_CAPTURE = 2
"""A shape is recorded when it comes for the third time: most shapes of an evaluation come once or twice."""
MOST_CAPTURED = 8
"""Recorded shapes kept for one graph; the one that was not used for longest makes room."""
MOST_COUNTED = 256
"""Shapes whose runs are counted."""


class Contexts(Protocol):
    """Runs an engine on the inputs in its buffers."""

    def execute(self, shapes: Shapes) -> None:
        """Queue one run on the device's stream. Raises UnavailableError where the library refuses."""
        ...

    def close(self) -> None: ...


def make_contexts(
    library: Any, device: Device, engine: Any, addresses: Mapping[str, int], log: Any, *, name: str, key: str
) -> Contexts:
    """Contexts as the library wants them.

    Args:
        library: the module `tensorrt` or `tensorrt_rtx`.
        device: where the engine was loaded.
        engine: the library's `ICudaEngine`.
        addresses: of every input's and output's buffer.
        log: the library's log.
        name: the graph's, for errors.
        key: names the engine among all engines: its SHA-256.
    """
    maker = ContextMaker(library, device, engine, addresses, log, name)
    if captures_by_itself(library):
        return SelfCapturing(maker, cache_folder() / "tensorrt-rtx" / f"{key}.kernels")
    return Replaying(maker)


@dataclass(frozen=True)
class ContextMaker:
    """What contexts of one engine have in common."""

    library: Any
    device: Device
    engine: Any
    addresses: Mapping[str, int]
    log: Any
    name: str

    def bound(self, context: Any) -> Any:
        """A context that was just made, with the buffers' addresses. None means that it could not be made."""
        if context is None:
            raise self.device.out_of_memory(self.engine.device_memory_size_v2, f"running graph {self.name!r}")
        for name, address in self.addresses.items():
            self._accepted(context.set_tensor_address(name, address), f"the buffer of {name!r}")
        return context

    def start(self, context: Any, shapes: Shapes) -> None:
        """Queue one run."""
        self.log.forget()
        for name, shape in shapes.items():
            self._accepted(context.set_input_shape(name, shape), f"shape {list(shape)} of {name!r}")
        self._accepted(context.execute_async_v3(int(self.device.stream)), f"the shapes {dict(shapes)}")

    def _accepted(self, accepted: bool, what: str) -> None:
        if not accepted:
            raise UnavailableError(
                f"{self.library.__name__} {self.library.__version__} does not run graph {self.name!r} with {what}: "
                f"{self.log.summary()}; build the engines again with `qpert build --force`, or use --provider cpu",
                code="engine-context",
            )


class SelfCapturing:
    """One context of TensorRT-RTX, which records and replays by itself.

    Kernels are compiled for a shape when it first comes (`EAGER`), not later in the background: `qpert verify` then
    looks at the kernels that will serve, and one input gives one result. What was compiled is kept in the cache folder
    for the next process.
    """

    def __init__(self, maker: ContextMaker, kernels: Path) -> None:
        library = maker.library
        self.maker = maker
        self.kernels = kernels
        config = maker.engine.create_runtime_config()
        config.cuda_graph_strategy = library.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        config.dynamic_shapes_kernel_specialization_strategy = library.DynamicShapesKernelSpecializationStrategy.EAGER
        self.cache = config.create_runtime_cache()
        # The library looks whether they are for this GPU, driver and version, and starts anew where they are not.
        if kernels.is_file() and not self.cache.deserialize(kernels.read_bytes()):
            self.cache.reset()
        config.set_runtime_cache(self.cache)
        self.context = maker.bound(maker.engine.create_execution_context(config))

    def execute(self, shapes: Shapes) -> None:
        self.maker.start(self.context, shapes)

    def close(self) -> None:
        """Keep the compiled kernels; a folder that cannot be written is no reason to fail."""
        cache, self.cache, self.context = self.cache, None, None
        if cache is None:
            return
        compiled = bytes(cache.serialize())
        try:
            if not self.kernels.is_file() or self.kernels.read_bytes() != compiled:
                self.kernels.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(self.kernels, compiled)
        except OSError:
            return


@dataclass(frozen=True)
class Captured:
    """A recorded run: the executable CUDA graph, and the context that it was recorded from, which it needs."""

    graph: Any
    context: Any


class Replaying:
    """Contexts of classic TensorRT: one for whatever shape comes, and one for each recorded shape.

    A recorded run is valid only as long as its context is left alone, so each has one of its own; they share one block
    of working memory, since they never run at the same time. Source: "CUDA Graphs" in TensorRT's best practices.
    """

    def __init__(self, maker: ContextMaker) -> None:
        self.maker = maker
        self.size = maker.engine.device_memory_size_v2
        self.scratch = maker.device.allocate(self.size, f"running graph {maker.name!r}")
        self.context = self._new_context()
        self.captures = True
        self.captured: OrderedDict[Key, Captured] = OrderedDict()
        self.runs: OrderedDict[Key, int] = OrderedDict()

    def _new_context(self) -> Any:
        strategy = self.maker.library.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self.maker.bound(self.maker.engine.create_execution_context(strategy))
        context.set_device_memory(self.scratch.address, self.size)
        return context

    def execute(self, shapes: Shapes) -> None:
        key = tuple(sorted(shapes.items()))
        if key in self.captured:
            self.captured.move_to_end(key)
            self.maker.device.call("cudaGraphLaunch", self.captured[key].graph, self.maker.device.stream)
        elif self.captures and self._count(key) > RUNS_BEFORE_CAPTURE:
            self._run_and_capture(key, shapes)
        else:
            self.maker.start(self.context, shapes)

    def _count(self, key: Key) -> int:
        """How often a shape came, this time included."""
        self.runs[key] = self.runs.pop(key, 0) + 1
        if len(self.runs) > MOST_COUNTED:
            self.runs.popitem(last=False)
        return self.runs[key]

    def _run_and_capture(self, key: Key, shapes: Shapes) -> None:
        """Run a shape in a new context, which also resolves what depends on the shape; then record it as a graph."""
        context = self._new_context()
        self.maker.start(context, shapes)
        self.maker.device.synchronize()
        graph = self._capture(context)
        if graph is None:
            self.captures = False
            return
        while len(self.captured) >= MOST_CAPTURED:
            self._drop(self.captured.popitem(last=False)[1])
        self.captured[key] = Captured(graph, context)

    def _capture(self, context: Any) -> Any:
        """The executable graph of one run, which is not run; None, with a warning, where it cannot be recorded."""
        device, cuda = self.maker.device, self.maker.device.cuda
        device.call(
            "cudaStreamBeginCapture", device.stream, cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        )
        queued = context.execute_async_v3(int(device.stream))
        status, graph = cuda.cudaStreamEndCapture(device.stream)
        if not queued or status != cuda.cudaError_t.cudaSuccess:
            warnings.warn(
                f"graph {self.maker.name!r} cannot be recorded as a CUDA graph ({status.name}; "
                f"{self.maker.log.summary()}): its kernels are launched one by one, slower and with the same result",
                QpertWarning,
                stacklevel=2,
            )
            return None
        executable = device.call("cudaGraphInstantiate", graph, 0)
        device.call("cudaGraphDestroy", graph)
        return executable

    def _drop(self, captured: Captured) -> None:
        self.maker.device.synchronize()
        self.maker.device.call("cudaGraphExecDestroy", captured.graph)

    def close(self) -> None:
        while self.captured:
            self._drop(self.captured.popitem()[1])
        self.context = None
        self.scratch.close()
