"""GPU memory: the one place where CUDA is called, through NVIDIA's `cuda-bindings`.

A `Device` is a GPU with one stream that all sessions of a bundle share, so that what one graph leaves in GPU memory can
go into the next without waiting and without a copy to the host. Every block of memory frees itself when it is closed or
forgotten. Nothing of CUDA is imported before a `Device` is opened.
"""

from __future__ import annotations

import ctypes
import math
import os
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qpert.runtime.errors import UnavailableError
from qpert.runtime.forks import gpu_forked_error, tell_after_fork
from qpert.runtime.sessions.gpus import Gpu

Shape = tuple[int, ...]
OUT_OF_MEMORY = "cudaErrorMemoryAllocation"


@dataclass(frozen=True, eq=False)
class DeviceArray:
    """An array in GPU memory, as another session takes it; `numpy` makes a copy of it on the host, and pickling one
    gives that copy.

    address: of the first element in GPU memory. copy: how the copy is made. owner: whatever keeps the memory alive.
    """

    shape: Shape
    dtype: np.dtype[Any]
    address: int
    copy: Callable[[], np.ndarray]
    owner: object
    process: int = field(default_factory=os.getpid)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def numpy(self) -> np.ndarray:
        """A copy on the host. Raises UnavailableError in a forked child."""
        if self.process != os.getpid():
            raise gpu_forked_error()
        return self.copy()

    def __reduce__(self) -> tuple[Callable[[np.ndarray], np.ndarray], tuple[np.ndarray]]:
        return np.asarray, (self.numpy(),)

    def rows(self, start: int, stop: int) -> DeviceArray:
        """`array[start:stop]`, in the same memory; 0 ≤ start ≤ stop ≤ length."""
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        shape, address = (stop - start, *self.shape[1:]), self.address + start * row_bytes
        return DeviceArray(shape, self.dtype, address, lambda: self.numpy()[start:stop], self)


def on_host(array: np.ndarray | DeviceArray) -> np.ndarray:
    """The array itself where it is on the host, else a copy of it."""
    return array.numpy() if isinstance(array, DeviceArray) else array


def load_cuda() -> Any:
    """The module `cuda.bindings.runtime`.

    Raises:
        UnavailableError: it is not installed.
    """
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise UnavailableError(
            f"engines need cuda-bindings, not installed here ({error}); pip install 'qpert[rtx]' or 'qpert[trt]'",
            code="cuda-bindings-missing",
        ) from error
    return runtime


class Device:
    """The GPU that CUDA calls device 0 (`CUDA_VISIBLE_DEVICES` chooses), and a stream on it.

    `lock` is held by whoever uses the stream. Sessions share a device: each calls `join` when it is opened and `leave`
    when it is closed, and the last one out destroys the stream.
    """

    def __init__(self, cuda: Any = None) -> None:
        """Raises UnavailableError where CUDA does not start; `cuda` is the module of `load_cuda`."""
        self.cuda = load_cuda() if cuda is None else cuda
        self.lock = threading.RLock()
        self.users = 0
        self.inherited = False
        tell_after_fork(self)
        self._check_present()
        self.stream: Any = self.call("cudaStreamCreateWithFlags", self.cuda.cudaStreamNonBlocking)

    def _check_present(self) -> None:
        if not self.call("cudaGetDeviceCount"):
            raise UnavailableError(
                "CUDA sees no GPU; is CUDA_VISIBLE_DEVICES set? `qpert doctor` shows what is here", code="gpu-missing"
            )

    def call(self, name: str, *arguments: Any) -> Any:
        """Call one function of CUDA's runtime; returns its results without the status.

        Raises:
            UnavailableError: it failed, in CUDA's words, or this is a forked child of the process that opened CUDA.
        """
        if self.inherited:
            raise gpu_forked_error()
        status, *values = getattr(self.cuda, name)(*arguments)
        if status != self.cuda.cudaError_t.cudaSuccess:
            _, text = self.cuda.cudaGetErrorString(status)
            words = text.decode() if isinstance(text, bytes) else str(text)
            raise UnavailableError(
                f"{name} failed with {status.name}: {words}; `qpert doctor` shows the GPU, its driver and what is "
                "missing",
                code="cuda-call",
            )
        return values[0] if len(values) == 1 else values

    def gpu(self) -> Gpu:
        """Name and compute capability; in the place of the driver's number, the newest CUDA that it knows."""
        properties = self.call("cudaGetDeviceProperties", 0)
        version = self.call("cudaDriverGetVersion")
        name = properties.name.decode() if isinstance(properties.name, bytes) else str(properties.name)
        driver = f"for CUDA {version // 1000}.{version % 1000 // 10}"
        return Gpu(name.rstrip("\0"), driver, f"{properties.major}.{properties.minor}")

    def free_bytes(self) -> tuple[int, int]:
        """Free and all GPU memory."""
        free, total = self.call("cudaMemGetInfo")
        return free, total

    def allocate(self, nbytes: int, purpose: str) -> DeviceMemory:
        """GPU memory. Raises UnavailableError where there is not enough; `purpose` says in its message what for."""
        try:
            return DeviceMemory(self, nbytes)
        except UnavailableError as error:
            if OUT_OF_MEMORY in str(error):
                raise self.out_of_memory(nbytes, purpose) from error
            raise

    def out_of_memory(self, nbytes: int, purpose: str) -> UnavailableError:
        """The error to raise: what was needed, what there is, what to do."""
        free, total = self.free_bytes()
        return UnavailableError(
            f"GPU memory is too small: {purpose} needs {mebibytes(nbytes)}, {mebibytes(free)} of {mebibytes(total)} "
            "are free; end other programs on this GPU, or export with a smaller --max-batch or --max-text, or with "
            "--precision fp16",
            code="gpu-memory",
        )

    def copy(self, target: int, source: int, nbytes: int, kind: str) -> None:
        """Queue a copy; `kind` is `HostToDevice`, `DeviceToHost` or `DeviceToDevice`."""
        if nbytes:
            direction = getattr(self.cuda.cudaMemcpyKind, f"cudaMemcpy{kind}")
            self.call("cudaMemcpyAsync", target, source, nbytes, direction, self.stream)

    def download(self, source: int, array: np.ndarray) -> None:
        """Fill a contiguous array from GPU memory that no queued work writes any more."""
        kind = self.cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self.call("cudaMemcpy", array.ctypes.data, source, array.nbytes, kind)

    def synchronize(self) -> None:
        """Wait for everything that was queued; errors of queued work appear here."""
        self.call("cudaStreamSynchronize", self.stream)

    def join(self) -> None:
        with self.lock:
            self.users += 1

    def leave(self) -> None:
        with self.lock:
            self.users -= 1
            if self.users <= 0:
                self.close()

    def after_fork(self) -> None:
        """In a forked child: CUDA is not called any more, and a lock that a thread of the parent held is open."""
        self.lock = threading.RLock()
        self.inherited = True
        self.stream = None

    def close(self) -> None:
        """Destroy the stream; memory is freed by whoever has it."""
        if self.stream is not None:
            stream, self.stream = self.stream, None
            self.call("cudaStreamDestroy", stream)


class CudaMemory:
    """A block of memory that CUDA gave and takes back: when it is closed, forgotten, or the process ends."""

    def __init__(self, nbytes: int, address: int, free: Callable[[int], object]) -> None:
        self.nbytes = nbytes
        self.address = address
        # Its status is not looked at: at the end of a process the driver may be gone already, and the memory with it.
        self.close = weakref.finalize(self, free, address)
        tell_after_fork(self)

    def after_fork(self) -> None:
        """In a forked child: the memory is the parent's, who frees it."""
        self.close.detach()


class DeviceMemory(CudaMemory):
    """A block of GPU memory."""

    def __init__(self, device: Device, nbytes: int) -> None:
        super().__init__(nbytes, int(device.call("cudaMalloc", max(1, nbytes))), device.cuda.cudaFree)


class PinnedMemory(CudaMemory):
    """A block of page-locked host memory, which copies to and from the GPU without a detour."""

    def __init__(self, device: Device, nbytes: int) -> None:
        address = int(device.call("cudaHostAlloc", max(1, nbytes), device.cuda.cudaHostAllocDefault))
        super().__init__(nbytes, address, device.cuda.cudaFreeHost)

    def view(self, shape: Shape, dtype: np.dtype[Any]) -> np.ndarray:
        """The first bytes as an array; valid as long as this object."""
        nbytes = math.prod(shape) * dtype.itemsize
        raw = (ctypes.c_uint8 * nbytes).from_address(self.address)
        return np.ctypeslib.as_array(raw).view(dtype).reshape(shape)


def mebibytes(nbytes: int) -> str:
    return f"{nbytes / 2**20:,.0f} MiB"
