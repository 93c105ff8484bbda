"""Where the measured work runs: one clock for both sides, which waits for the GPU, and the peak that it is held to."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import numpy as np

from qpert.runtime.benchmark.machine import measure_peaks
from qpert.runtime.errors import UnavailableError
from qpert.runtime.sessions.providers import find_provider

SIDE = 8192
"""Of the square product that measures a GPU: 1.1 TFLOP, which fills the largest of today's GPUs."""
PRODUCTS = 20


class Accelerator:
    """The GPU as PyTorch sees it, or the CPU.

    Timings use the host's clock around a call that ends with `wait`: it waits for every stream of the process, so for
    ONNX Runtime's, TensorRT's and PyTorch's work alike.
    """

    def __init__(self, provider: str) -> None:
        """Raises UnavailableError where the provider needs a GPU that this PyTorch does not have."""
        import torch

        self.torch, self.on_gpu = torch, not find_provider(provider).on_cpu
        if self.on_gpu and not torch.cuda.is_available():
            raise UnavailableError(
                f"PyTorch {torch.__version__} sees no GPU, and the baselines and the clock need it; install a CUDA "
                "build: pip install torch",
                code="torch-without-cuda",
            )

    def wait(self) -> None:
        """Until all queued work of this process is done."""
        if self.on_gpu:
            self.torch.cuda.synchronize()

    def waited(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """The call, ending when its work has ended."""

        def run() -> Any:
            result = call()
            self.wait()
            return result

        return run

    def put(self, array: np.ndarray) -> Any:
        """A tensor of the array where the work runs."""
        tensor = self.torch.from_numpy(np.ascontiguousarray(array))
        return tensor.cuda() if self.on_gpu else tensor

    def peak_flops(self) -> float:
        """FLOP/s of a large product: float16 by tensor cores on a GPU (median of single products between two CUDA
        events), float32 on the CPU."""
        if not self.on_gpu:
            return measure_peaks()["product_gflops"] * 1e9
        torch = self.torch
        left, right = (torch.randn(SIDE, SIDE, device="cuda", dtype=torch.float16) for _ in range(2))
        seconds = []
        for turn in range(PRODUCTS + 3):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            torch.mm(left, right)
            end.record()
            end.synchronize()
            if turn >= 3:  # the first choose a kernel and raise the clock
                seconds.append(start.elapsed_time(end) / 1e3)
        return float(2 * SIDE**3 / statistics.median(seconds))
