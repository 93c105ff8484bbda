"""The machine of a benchmark and its peak speed. No names of hosts or users."""

from __future__ import annotations

import datetime
import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from qpert.runtime.errors import UnavailableError
from qpert.runtime.sessions.gpus import find_gpus

LIBRARIES = (
    *("qpert", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt-rtx"),
    *("torch", "transformers", "numpy", "pillow", "tokenizers"),
)
PRODUCT_SIDE = 1536
COPIED_BYTES = 2**27
ATTEMPTS = 5


def describe_machine() -> dict[str, Any]:
    """Names, sizes and versions, and the current load."""
    return {
        "cpu": cpu_name(),
        "gpu": gpu_name(),
        "cores": usable_cores(),
        "memory_gb": memory_gb(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions(),
        "blas": blas_kernels(),
        "load": load(),
        "when": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def measure_peaks() -> dict[str, float]:
    """The CPU's peak, measured now: float32 GFLOP/s of a large product, GB/s read and written of a large copy."""
    rng = np.random.default_rng(0)
    left, right = rng.random((2, PRODUCT_SIDE, PRODUCT_SIDE), dtype=np.float32)
    source = np.ones(COPIED_BYTES, np.uint8)
    target = np.zeros_like(source)
    product = quickest(lambda: left @ right)
    copy = quickest(lambda: np.copyto(target, source))
    return {
        "product_gflops": round(2 * PRODUCT_SIDE**3 / product / 1e9, 1),
        "copy_gb_per_second": round(2 * COPIED_BYTES / copy / 1e9, 1),
    }


def quickest(call: Callable[[], object]) -> float:
    """Seconds of the quickest of several calls: a peak is the best that the machine can do, not the average."""
    best = float("inf")
    for _ in range(ATTEMPTS):
        before = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - before)
    return best


def cpu_name() -> str:
    """The processor's name from Linux, elsewhere from Python."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def gpu_name() -> str | None:
    try:
        return str(find_gpus()[0])
    except UnavailableError:
        return None


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    except (AttributeError, ValueError, OSError):  # not a POSIX system
        return None


def load() -> float | None:
    """Load average of the last minute; well above 0 before the start means that other processes were running."""
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        return None


def blas_kernels() -> list[str]:
    """The BLAS libraries that this process has loaded, NumPy's among them, and the processor that each has chosen its
    kernels for; none without threadpoolctl. A baseline in NumPy is as fast as its kernels, which the environment can
    choose too (`OPENBLAS_CORETYPE`)."""
    try:
        import threadpoolctl
    except ImportError:
        return []
    loaded = [found for found in threadpoolctl.threadpool_info() if found["user_api"] == "blas"]
    return [
        f"{one['internal_api']} {one['version']}, {one.get('architecture', 'kernels unknown')}, "
        f"{one['num_threads']} threads"
        for one in loaded
    ]


def versions() -> dict[str, str]:
    found = {}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found
