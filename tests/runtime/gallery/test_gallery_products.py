"""Products in 8 bits, by either library, are those of NumPy in 64 bits."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from qpert.runtime.gallery import products
from qpert.runtime.gallery.products import FEW_TEXTS, best_products, by_dot_products, by_matrix_product
from qpert.runtime.gallery.scan import TEXT_LEVELS

simsimd = pytest.importorskip("simsimd")


def expected(codes: np.ndarray, texts: np.ndarray) -> np.ndarray:
    return ((codes.astype(np.int64) - 128) @ texts.astype(np.int64)).max(axis=1).T


def both(codes: np.ndarray, texts: np.ndarray) -> list[np.ndarray]:
    return [by_dot_products(simsimd, codes, texts), by_matrix_product(codes, texts)]


@pytest.mark.parametrize("width", [1, 7, 32, 48, 100, 256, 768])  # whole registers and parts of one
@pytest.mark.parametrize("texts", [1, 3])
def test_both_libraries_give_the_whole_numbers(width: int, texts: int) -> None:
    rng = np.random.default_rng(width)
    codes = rng.integers(1, 256, (203, 5, width), dtype=np.uint8)
    rows = rng.integers(-TEXT_LEVELS, TEXT_LEVELS + 1, (width, texts)).astype(np.int8)
    for found in both(codes, rows):
        np.testing.assert_array_equal(found, expected(codes, rows))
        assert found.dtype == np.int32


@pytest.mark.parametrize("width", [64, 1024])
def test_products_do_not_saturate_at_the_ends_of_the_codes(width: int) -> None:
    """Adjacent products of 255·64 are the largest that 16 bits can add."""
    codes = np.full((2, 1, width), 255, np.uint8)
    codes[1] = 1
    texts = np.full((width, 2), TEXT_LEVELS, np.int8)
    texts[:, 1] *= -1
    for found in both(codes, texts):
        np.testing.assert_array_equal(found, np.array([[127, -127], [-127, 127]]) * 64 * width)


def test_the_kernels_for_every_processor_give_the_whole_numbers() -> None:
    """Those of this one and, one after the other, those that an older one would choose; at the ends of both ranges."""
    rng = np.random.default_rng(3)
    kinds = [name for name, usable in simsimd.get_capabilities().items() if usable and name != "serial"]
    try:
        for kind in [None, *reversed(kinds)]:  # the newest first: an older one is chosen where the newer are missing
            if kind is not None:
                simsimd.disable_capability(kind)
            for width in (1, 31, 64, 100, 768):
                codes = rng.integers(1, 256, (50, 5, width), dtype=np.uint8)
                codes[0], codes[1] = 255, 1
                texts = rng.integers(-128, 128, (width, 3)).astype(np.int8)
                texts[:, 0], texts[:, 1] = 127, -128
                np.testing.assert_array_equal(by_dot_products(simsimd, codes, texts), expected(codes, texts))
    finally:
        for kind in kinds:
            simsimd.enable_capability(kind)
    assert [name for name, usable in simsimd.get_capabilities().items() if usable] == ["serial", *kinds]


def test_threads_share_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "THREADS_FROM", 0)
    monkeypatch.setattr(products, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(products, "usable_cores", lambda: 3)
    rng = np.random.default_rng(1)
    for count in (0, 1, 5, 1000):  # fewer rows than parts, and blocks that do not divide them
        codes = rng.integers(1, 256, (count, 4, 32), dtype=np.uint8)
        texts = rng.integers(-64, 65, (32, 2)).astype(np.int8)
        np.testing.assert_array_equal(by_dot_products(simsimd, codes, texts), expected(codes, texts).reshape(2, count))


def test_few_texts_take_the_dot_products_and_many_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    monkeypatch.setattr(products, "by_dot_products", lambda *_: taken.append("dots"))
    monkeypatch.setattr(products, "by_matrix_product", lambda *_: taken.append("matrix"))
    codes = np.ones((3, 2, 8), np.uint8)
    for texts in (1, FEW_TEXTS, FEW_TEXTS + 1):
        best_products(codes, np.ones((8, texts), np.int8))
    assert taken == ["dots", "dots", "matrix"]


def test_without_simsimd_the_numbers_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    codes = rng.integers(1, 256, (50, 4, 32), dtype=np.uint8)
    texts = rng.integers(-64, 65, (32, 1)).astype(np.int8)
    monkeypatch.setitem(sys.modules, "simsimd", None)
    products._simsimd.cache_clear()
    try:
        assert products._simsimd() is None
        np.testing.assert_array_equal(best_products(codes, texts), expected(codes, texts))
    finally:
        products._simsimd.cache_clear()


def test_the_serialised_scan_is_what_onnx_makes_of_it() -> None:
    from onnx import TensorProto, checker, helper

    inputs = [
        helper.make_tensor_value_info("codes", TensorProto.UINT8, ["n", "Q", "E"]),
        helper.make_tensor_value_info("texts", TensorProto.INT8, ["E", "T"]),
    ]
    best = helper.make_tensor_value_info("best", TensorProto.INT32, ["n", "T"])
    nodes = [
        helper.make_node("MatMulInteger", ["codes", "texts", "zero"], ["dots"]),
        helper.make_node("ReduceMax", ["dots"], ["best"], axes=[1], keepdims=0),
    ]
    zero = helper.make_tensor("zero", TensorProto.UINT8, [], [128])
    graph = helper.make_graph(nodes, "scan", inputs, [best], [zero])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8, producer_name="")
    checker.check_model(model, full_check=True)
    assert model.SerializeToString(deterministic=True) == products.SCAN_MODEL
