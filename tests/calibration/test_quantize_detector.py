"""INT8 of detectors: which convolutions, the gate, and the bundle that it lets through."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import stock_detectors
from onnx import TensorProto, helper, numpy_helper
from raw_yolox import export_raw_yolox

from qpert.calibration.detectors.gate import agreement
from qpert.calibration.detectors.quantize import convolutions
from qpert.exporter.detectors.export import DetectorRequest, export_detector
from qpert.runtime.cli import run
from qpert.runtime.detection.bundle import DetectorBundle
from qpert.runtime.inputs.boxes import Boxes

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def detector(made_once: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = made_once("stock-rt_detr_v2", lambda path: stock_detectors.save(stock_detectors.rt_detr_v2(), path))
    out = tmp_path_factory.mktemp("detector") / "fp32"
    return export_detector(DetectorRequest(str(folder), out)).folder


def boxes(rows: list[list[float]], labels: list[str]) -> Boxes:
    return Boxes(rows, (100, 100), scores=[0.9 - 0.1 * place for place in range(len(rows))], labels=labels)


def test_agreement_is_the_f1_of_the_two_sets_by_label_and_overlap() -> None:
    one = boxes([[0, 0, 10, 10], [20, 20, 40, 40], [50, 50, 60, 60]], ["cup", "cup", "star"])
    moved = boxes([[0, 0, 10, 8], [30, 20, 50, 40]], ["cup", "cup"])  # IoU 0.8 and 1/3
    found = agreement([one, None, one], [moved, None, one])
    assert (found.float_boxes, found.quantized_boxes, found.same) == (6, 5, 4)
    assert found.percent == pytest.approx(100 * 2 * 4 / 11)
    assert agreement([one], [boxes([[0, 0, 10, 10]], ["star"])]).same == 0
    twice = boxes([[0, 0, 10, 10], [0, 0, 10, 10]], ["cup", "cup"])
    assert agreement([one], [twice]).same == 1  # each box counts once
    assert agreement([None], [None]).percent == 100
    assert agreement([one], [None]).percent == 0


def test_without_names_the_convolutions_that_give_the_results_stay_in_float() -> None:
    """x → a → relu → b → sigmoid, and a → c: b and c are the last of their ways."""
    weights = [numpy_helper.from_array(np.ones((2, 2, 1, 1), np.float32), f"w{name}") for name in "abc"]
    nodes = [
        helper.make_node("Conv", ["x", "wa"], ["a"], "conv_a"),
        helper.make_node("Relu", ["a"], ["r"], "relu"),
        helper.make_node("Conv", ["r", "wb"], ["b"], "conv_b"),
        helper.make_node("Sigmoid", ["b"], ["y"], "sigmoid"),
        helper.make_node("Conv", ["a", "wc"], ["z"], "conv_c"),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 2, 4, 4]) for name in "xyz"]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], weights)
    assert [one.node for one in convolutions(helper.make_model(graph))] == ["conv_a"]


def test_the_backbone_is_in_8_bits_and_everything_else_in_float(
    detector: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    command = ["quantize", str(detector), "--out", str(tmp_path / "int8"), "--samples", "16", "--json"]
    # random weights are more sensitive than trained ones: this test is about what is quantised, the next about the gate
    assert run([*command, "--min-agreement", "40"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["precision"], document["verification"]) == ("int8", None)
    gate = document["quantization"]["gate"]
    assert gate["pictures"] == 16
    assert gate["agreement"] == pytest.approx(200 * gate["same"] / (gate["float_boxes"] + gate["quantized_boxes"]))
    assert 40 <= gate["agreement"] <= 100
    manifest = DetectorBundle.open(tmp_path / "int8").manifest
    model = onnx.load(tmp_path / "int8" / manifest.graph.file)
    made_by = {name: node for node in model.graph.node for name in node.output}
    in_8_bits, in_float = [], []
    for node in model.graph.node:
        if node.op_type == "Conv":
            source = made_by.get(node.input[1])
            (in_8_bits if source is not None and source.op_type == "DequantizeLinear" else in_float).append(node.name)
    assert len(in_8_bits) == document["quantization"]["convolutions"] == 15
    assert all("/backbone/" in name for name in in_8_bits)
    assert in_float
    assert not any("/backbone/" in name for name in in_float)
    assert sorted(path.name for path in (tmp_path / "int8").rglob("*")) == ["detector.onnx", "manifest.json", "onnx"]
    assert run(["inspect", str(tmp_path / "int8")]) == 0
    assert "convolutions" in capsys.readouterr().out
    assert run(["quantize", str(tmp_path / "int8"), "--out", str(tmp_path / "again")]) == 2
    assert "give the fp32 one" in capsys.readouterr().err


def test_the_gate_refuses_and_nothing_is_written(detector: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    command = ["quantize", str(detector), "--out", str(tmp_path / "int8"), "--samples", "16"]
    assert run([*command, "--min-agreement", "100"]) == 1
    assert "100 % are required" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_quantised_or_judged_is_said(
    detector: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = ["--out", str(tmp_path / "int8")]
    for more, words in {
        ("--precision", "fp8"): "is quantised to int8",
        ("--max-drop", "1"): "--max-drop",
        ("--samples", "3"): "expected at least 16",
        ("--dataset", str(Path(__file__).parents[2] / "examples" / "photos")): "expected 128",
    }.items():
        assert run(["quantize", str(detector), *out, *more]) == 2
        assert words in capsys.readouterr().err
    known = export_raw_yolox(tmp_path / "in", tmp_path / "known")
    assert run(["quantize", str(known), *out, "--samples", "16"]) == 2
    assert "no convolution" in capsys.readouterr().err
    assert not (tmp_path / "int8").exists()
