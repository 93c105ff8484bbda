"""The largest product of each query set's 8-bit codes with each text's: whole numbers, so every way gives the same.

Few texts: simsimd's dot products (where it is installed; the extras `cpu` and `gpu` bring it), which take little longer
than reading the codes. More: a matrix product of ONNX Runtime.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from qpert.runtime.benchmark.machine import usable_cores
from qpert.runtime.forks import keep_in_children
from qpert.runtime.libraries import load_onnxruntime

Codes = npt.NDArray[np.uint8]
Texts = npt.NDArray[np.int8]
Products = npt.NDArray[np.int32]

FEW_TEXTS = 3
"""Texts up to which dot products are quicker than the matrix product, with the kernels for AVX2 as well as for VNNI."""
BLOCK_BYTES = 1 << 22
"""Of codes at once: enough that the calls cost nothing beside the work, and few enough that the products of a block, in
float64, stay in a core's cache until their maximum is taken."""
PARTS = 4
"""A thread's share is cut so that one that is kept waiting does not keep all waiting."""
THREADS_FROM = 1 << 22
"""Bytes of codes from which threads are worth their start."""
DOTS_AT_ONCE = 1 << 23
"""int32 products of ONNX Runtime held at once: 32 MB."""


def best_products(codes: Codes, texts: Texts) -> Products:
    """int32 [T, R]: the largest product of a query set's codes with each text's.

    Args:
        codes: uint8 [R, Q, E], 1 to 255, which stand for -127 to 127; may be mapped from a file.
        texts: int8 [E, T] in ±64: two products, 255·64 each, then fit into the 16 bits in which ONNX Runtime adds them
            on processors without VNNI; with ±127 they would saturate there.
    """
    simsimd = _simsimd() if texts.shape[1] <= FEW_TEXTS else None
    return by_matrix_product(codes, texts) if simsimd is None else by_dot_products(simsimd, codes, texts)


def by_dot_products(simsimd: Any, codes: Codes, texts: Texts) -> Products:
    """Unsigned times unsigned, so that the codes are read where they lie: with u = code + 128 and w = text + 128, a row
    of 128s gives code·text = u·w - u·128 - 128·Σtext."""
    count = texts.shape[1]
    rows = np.full((count + 1, texts.shape[0]), 128, np.uint8)
    rows[:count] ^= texts.T.view(np.uint8)
    shift = 128 * texts.sum(axis=0, dtype=np.int32)[:, None]
    best = np.empty((count, len(codes)), np.int32)
    queries, width = codes.shape[1:]
    step = max(1, BLOCK_BYTES // max(1, queries * width))

    def fill(start: int, stop: int) -> None:
        buffer = np.empty((count, step * queries))
        for first in range(start, stop, step):
            last = min(first + step, stop)
            vectors = codes[first:last].reshape(-1, width)
            dots = np.asarray(simsimd.cdist(vectors, rows, "dot")).T  # float64, exact
            products = np.subtract(dots[:count], dots[count], out=buffer[:, : len(vectors)])
            best[:, first:last] = products.reshape(count, last - first, queries).max(axis=2) - shift

    threads = usable_cores() if codes.size >= THREADS_FROM else 1
    if threads == 1:
        fill(0, len(codes))
        return best
    bounds = np.linspace(0, len(codes), threads * PARTS + 1).astype(int)
    with ThreadPoolExecutor(threads) as pool:  # threads of this call alone: none is left over for a forked child
        list(pool.map(fill, bounds[:-1], bounds[1:]))
    return best


def by_matrix_product(codes: Codes, texts: Texts) -> Products:
    session = _session(os.getpid())  # a session works in the process that made it, not in its forked children
    best = np.empty((texts.shape[1], len(codes)), np.int32)
    step = max(64, DOTS_AT_ONCE // (codes.shape[1] * texts.shape[1]))
    for start in range(0, len(codes), step):
        (part,) = session.run(None, {"codes": codes[start : start + step], "texts": texts})
        best[:, start : start + step] = part.T
    return best


@lru_cache(maxsize=1)
def _simsimd() -> Any:
    """The module, or None where it is not installed or does not load: the other way gives the same numbers."""
    try:
        import simsimd
    except ImportError:
        return None
    return simsimd


@lru_cache(maxsize=1)
def _session(process: int) -> Any:
    """The session of SCAN_MODEL that belongs to a process."""
    onnxruntime = load_onnxruntime()
    return keep_in_children(onnxruntime.InferenceSession(SCAN_MODEL, providers=["CPUExecutionProvider"]))


SCAN_MODEL = (
    b'\x08\x08\x12\x00:\xcb\x01\n)\n\x05codes\n\x05texts\n\x04zero\x12\x04dots"\rMatMulInteger\n5\n\x04dots\x12\x04best'
    b'"\tReduceMax*\x0b\n\x04axes@\x01\xa0\x01\x07*\x0f\n\x08keepdims\x18\x00\xa0\x01\x02\x12\x04scan*\x0c\x10\x02*\x02'
    b"\x80\x01B\x04zeroZ\x1e\n\x05codes\x12\x15\n\x13\x08\x02\x12\x0f\n\x03\x12\x01n\n\x03\x12\x01Q\n\x03\x12\x01EZ\x19"
    b"\n\x05texts\x12\x10\n\x0e\x08\x03\x12\n\n\x03\x12\x01E\n\x03\x12\x01Tb\x18\n\x04best\x12\x10\n\x0e\x08\x06\x12\n"
    b"\n\x03\x12\x01n\n\x03\x12\x01TB\x04\n\x00\x10\r"
)
"""A serialised ONNX model: MatMulInteger of uint8 [n, Q, E] (zero point 128) and int8 [E, T], then the maximum over Q,
int32 [n, T]. The runtime has no onnx to make one with; a test builds it again and compares."""
