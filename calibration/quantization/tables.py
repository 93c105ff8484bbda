"""Stored weights: embedding tables in 8 bits with a scale per row, constant weights as their 8-bit numbers."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

TABLE_ROWS = 256
"""Tables with fewer rows (position embeddings) stay in float: they are too small to matter."""


def quantize_tables(model: onnx.ModelProto, *, target: str) -> tuple[str, ...]:
    """Store embedding tables as s8 with a scale for each row; returns their names.

    On the CPU rows are gathered in 8 bits and then scaled, so that a call pays only for its own words. TensorRT
    dequantises the constant table when it builds, and has no 8-bit gather.
    """
    tables = {
        tensor.name: tensor
        for tensor in model.graph.initializer
        if len(tensor.dims) == 2 and tensor.dims[0] >= TABLE_ROWS and tensor.data_type == TensorProto.FLOAT
    }
    done = []
    for node in list(model.graph.node):
        if node.op_type == "Gather" and node.input[0] in tables:
            table = tables[node.input[0]]
            quantized, scales = rows_in_8_bits(numpy_helper.to_array(table))
            rewrite = gather_then_scale if target == "cpu" else scale_then_gather
            rewrite(model.graph, node, table.name, quantized, scales)
            done.append(table.name)
    for name in done:
        if not any(name in node.input for node in model.graph.node):
            model.graph.initializer.remove(tables[name])
    return tuple(done)


def rows_in_8_bits(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 [V, C] and float32 [V]: each row's largest number becomes 127; a row of zeros has scale 1."""
    largest = np.abs(table).max(axis=1)
    scales = np.where(largest > 0, largest / 127, 1).astype(np.float32)
    return np.rint(table / scales[:, None]).astype(np.int8), scales


def gather_then_scale(
    graph: onnx.GraphProto, node: onnx.NodeProto, name: str, quantized: np.ndarray, scales: np.ndarray
) -> None:
    graph.initializer.append(numpy_helper.from_array(quantized, f"{name}_quantized"))
    graph.initializer.append(numpy_helper.from_array(scales[:, None], f"{name}_scale"))
    words, ids, output = f"{node.name}/in_8_bits", node.input[1], node.output[0]
    new = [
        helper.make_node("Gather", [f"{name}_quantized", ids], [words], f"{node.name}/words", axis=0),
        helper.make_node("Cast", [words], [f"{words}/cast"], f"{node.name}/cast", to=TensorProto.FLOAT),
        helper.make_node("Gather", [f"{name}_scale", ids], [f"{words}/scale"], f"{node.name}/scale", axis=0),
        helper.make_node("Mul", [f"{words}/cast", f"{words}/scale"], [output], node.name),
    ]
    replace(graph, node, new)


def scale_then_gather(
    graph: onnx.GraphProto, node: onnx.NodeProto, name: str, quantized: np.ndarray, scales: np.ndarray
) -> None:
    for suffix, array in (("quantized", quantized), ("scale", scales), ("zero_point", np.zeros(len(scales), np.int8))):
        graph.initializer.append(numpy_helper.from_array(array, f"{name}_{suffix}"))
    inputs = [f"{name}_quantized", f"{name}_scale", f"{name}_zero_point"]
    table = helper.make_node("DequantizeLinear", inputs, [f"{name}_float"], f"{node.name}/table", axis=0)
    gather = helper.make_node("Gather", [f"{name}_float", node.input[1]], list(node.output), node.name, axis=0)
    replace(graph, node, [table, gather])


def replace(graph: onnx.GraphProto, node: onnx.NodeProto, new: list[onnx.NodeProto]) -> None:
    """Replace one node by several, keeping the topological order."""
    place = next(index for index, other in enumerate(graph.node) if other.name == node.name)
    graph.node.remove(node)
    for offset, one in enumerate(new):
        graph.node.insert(place + offset, one)


def fold_weights(model: onnx.ModelProto) -> None:
    """Compute QuantizeLinear of constants now, so that a file contains the 8-bit weights instead of the float ones."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in list(model.graph.node):
        if node.op_type != "QuantizeLinear" or node.input[0] not in constants:
            continue
        axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)
        values, scale = (numpy_helper.to_array(constants[name]) for name in node.input[:2])
        stored = in_8_bits(values, scale, axis, constants[node.input[2]].data_type)
        stored.name = node.output[0]
        model.graph.initializer.append(stored)
        model.graph.node.remove(node)
    read = {name for node in model.graph.node for name in node.input}
    for tensor in [tensor for tensor in model.graph.initializer if tensor.name not in read]:
        model.graph.initializer.remove(tensor)


def in_8_bits(values: np.ndarray, scale: np.ndarray, axis: int, dtype: int) -> onnx.TensorProto:
    """ONNX's QuantizeLinear without zero point, as onnx's reference evaluator computes it."""
    from onnx.reference import ReferenceEvaluator

    node = helper.make_node("QuantizeLinear", ["x", "s", "z"], ["y"], axis=axis)
    zero = helper.make_tensor("z", dtype, scale.shape, [0] * scale.size)
    graph = helper.make_graph(
        [node],
        "quantize",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, values.shape)],
        [helper.make_tensor_value_info("y", dtype, values.shape)],
        [numpy_helper.from_array(scale, "s"), zero],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    (result,) = ReferenceEvaluator(model).run(None, {"x": values})
    return numpy_helper.from_array(result, "stored")
