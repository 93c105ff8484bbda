"""A graph with the inputs and outputs of a published YOLOX, 64 px and 3 classes, of known raw outputs."""

from __future__ import annotations

from math import log
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

PLACES = 64 + 16 + 4
LABELS = ("cup", "star", "bus")
Form = Literal["plain", "reshaped", "fixed"]


def raw_rows() -> np.ndarray:
    """float32 [84,8]: x, y, w, h, objectness, three class scores of each place. By hand, in pixels of the letterbox:

    - place 0: box (0, 0, 16, 16), a cup of 0.9 · 0.8 = 0.72.
    - place 1: the same box, a cup of 0.5 · 0.9 = 0.45, which suppression within the class takes out.
    - place 2: the same box, a star of 0.6 · 0.9 = 0.54.
    - place 64: box (24, 28, 40, 36), a bus of (0.7 + 0.1 · brightest byte / 255) · 0.9.
    - place 80: box (0, 0, 64, 64), a cup of 0.1 · 0.05 = 0.005, below YOLOX's floor.
    """
    rows = np.zeros((PLACES, 8), np.float32)
    rows[0] = [1, 1, log(2), log(2), 0.9, 0.8, 0.1, 0.2]
    rows[1] = [0, 1, log(2), log(2), 0.5, 0.9, 0.1, 0.2]
    rows[2] = [-1, 1, log(2), log(2), 0.6, 0.1, 0.9, 0.2]
    rows[64] = [2, 2, 0, log(0.5), 0.7, 0.1, 0.2, 0.9]
    rows[80] = [1, 1, log(2), log(2), 0.1, 0.05, 0, 0]
    return rows


def write_raw_yolox(path: Path, form: Form = "plain", opset: int = 11) -> Path:
    """`reshaped`: a reshape writes the batch of 1; `fixed`: one that cannot take another batch at all."""
    mask = np.zeros((1, PLACES, 8), np.float32)
    mask[0, 64, 4] = 0.1 / 255
    constants = {"rows": raw_rows()[None], "mask": mask, "column": np.array([-1, 1, 1])}
    constants |= {"one": np.array([1, PLACES, -1]), "none": np.array([PLACES, 8]), "axes": np.array([1, 2, 3])}
    maximum = ["images"] if opset < 18 else ["images", "axes"]
    attributes = {"axes": [1, 2, 3]} if opset < 18 else {}
    nodes = [
        helper.make_node("ReduceMax", maximum, ["brightest"], keepdims=0, **attributes),
        helper.make_node("Reshape", ["brightest", "column"], ["brightest3"]),
        helper.make_node("Mul", ["brightest3", "mask"], ["term"]),
        helper.make_node("Add", ["rows", "term"], ["output" if form == "plain" else "sum"]),
    ]
    if form == "fixed":
        nodes.append(helper.make_node("Reshape", ["sum", "none"], ["flat"]))
    if form != "plain":
        nodes.append(helper.make_node("Reshape", ["flat" if form == "fixed" else "sum", "one"], ["output"]))
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes,
        "yolox",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, 64, 64])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [1, PLACES, 8])],
        [numpy_helper.from_array(values, name) for name, values in constants.items() if name in used],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    model.ir_version = 8
    onnx.save(model, path)
    return path


def export_raw_yolox(folder: Path, out: Path, form: Form = "plain", **fields: object) -> Path:
    """A detector bundle of such a graph."""
    from qpert.exporter.detectors.export import DetectorRequest, export_detector

    folder.mkdir(exist_ok=True)
    labels = folder / "labels.txt"
    labels.write_text("\n".join(LABELS) + "\n", encoding="utf-8")
    file = write_raw_yolox(folder / "yolox_tiny.onnx", form)
    return export_detector(DetectorRequest(str(file), out, labels, **fields)).folder
