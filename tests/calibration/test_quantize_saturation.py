"""On CPUs without VNNI 8-bit products saturate: it is found by trying, and `quantize` says so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from evaluation_sets import write_set
from onnx import TensorProto, helper

from qpert.calibration.quantization import build, saturation
from qpert.calibration.quantization.build import quantize_bundle
from qpert.calibration.quantization.request import QuantizeRequest
from qpert.runtime.progress import Silent


def test_what_is_found_is_what_a_graph_of_its_own_shows() -> None:
    values = [helper.make_tensor_value_info(name, kind, [64, 64]) for name, kind in (("a", 2), ("b", 3), ("c", 6))]
    node = helper.make_node("MatMulInteger", ["a", "b"], ["c"])
    graph = helper.make_graph([node], "product", values[:2], values[2:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    assert (TensorProto.UINT8, TensorProto.INT8, TensorProto.INT32) == (2, 3, 6)
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"a": np.full((64, 64), 255, np.uint8), "b": np.full((64, 64), 127, np.int8)})
    assert saturation.products_saturate() == bool((found != 255 * 127 * 64).any())


@pytest.mark.parametrize(("saturates", "reduce_range", "told"), [(True, False, 1), (True, True, 0), (False, False, 0)])
def test_quantize_says_so(
    saturates: bool, reduce_range: bool, told: int, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Listener(Silent):
        def __init__(self) -> None:
            self.lines: list[str] = []

        def say(self, line: str) -> None:
            self.lines.append(line)

    monkeypatch.setattr(build, "products_saturate", lambda: saturates)
    listener = Listener()
    data = write_set(tmp_path / "set", 16, split="val")
    request = QuantizeRequest(
        tiny_bundle, tmp_path / "int8", graphs=("text",), dataset=str(data), samples=16, sensitivity=False
    )
    quantize_bundle(replace(request, reduce_range=reduce_range, max_drop=100.0, min_agreement=0.0), progress=listener)
    assert listener.lines.count(saturation.SATURATION_NOTICE) == told
