"""ONNX nodes written as arithmetic: `(places + 0.5) * scale` adds a Cast-free Add and a Mul to a graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import onnx

from qpert.exporter.tracing.readable import IR_VERSION
from qpert.runtime.bundle.graph_spec import GraphSpec, TensorSpec

OPSET = 18
"""The lowest opset in which the reductions take their axes as an input, as all of them do from then on."""

Operand: TypeAlias = "Value | float | np.ndarray"


class HostGraph:
    """A graph under construction. Constants are stored once; what is given as a number takes the other side's type."""

    def __init__(self, spec: GraphSpec) -> None:
        self.spec = spec
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], onnx.TensorProto] = {}

    def input(self, slot: str) -> Value:
        """The declared input of a slot."""
        tensor = self.spec.input(slot)
        return Value(self, tensor.name, np.dtype(tensor.dtype))

    def output(self, slot: str, value: Value) -> None:
        """Make `value` the declared output of a slot."""
        self._nodes.append(onnx.helper.make_node("Identity", [value.name], [self.spec.output(slot).name]))

    def constant(self, values: Any, dtype: Any) -> Value:
        array = np.asarray(values, dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = onnx.numpy_helper.from_array(array, f"constant_{len(self._constants) + 1}")
        return Value(self, self._constants[key].name, array.dtype)

    def integers(self, *values: int) -> Value:
        """int64 [n]: axes, shapes and bounds."""
        return self.constant(values, np.int64)

    def node(self, op: str, *inputs: Value, dtype: Any = None, **attributes: Any) -> Value:
        """Add one node. `dtype` of its output: None for that of its first input."""
        name = f"{op}_{len(self._nodes) + 1}"
        self._nodes.append(onnx.helper.make_node(op, [i.name for i in inputs], [name], name=name, **attributes))
        return Value(self, name, inputs[0].dtype if dtype is None else np.dtype(dtype))

    def concat(self, *parts: Value) -> Value:
        return self.node("Concat", *parts, axis=0)

    def where(self, condition: Value, yes: Value, no: Operand) -> Value:
        return self.node("Where", condition, yes, yes.beside(no), dtype=yes.dtype)

    def model(self) -> onnx.ModelProto:
        """The finished graph, with the declared inputs and outputs."""
        graph = onnx.helper.make_graph(
            self._nodes,
            self.spec.name,
            [_declared(tensor) for tensor in self.spec.inputs],
            [_declared(tensor) for tensor in self.spec.outputs],
            list(self._constants.values()),
        )
        opsets = [onnx.helper.make_opsetid("", OPSET)]
        return onnx.helper.make_model(graph, producer_name="qpert", opset_imports=opsets, ir_version=IR_VERSION)


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor of a `HostGraph`. Operators add nodes; operands are broadcast as in NumPy."""

    graph: HostGraph
    name: str
    dtype: np.dtype[Any]

    def beside(self, other: Operand) -> Value:
        """`other` as a tensor of the same type."""
        return other if isinstance(other, Value) else self.graph.constant(other, self.dtype)

    def _with(self, op: str, other: Operand, dtype: Any = None) -> Value:
        return self.graph.node(op, self, self.beside(other), dtype=dtype)

    def __add__(self, other: Operand) -> Value:
        return self._with("Add", other)

    def __sub__(self, other: Operand) -> Value:
        return self._with("Sub", other)

    def __mul__(self, other: Operand) -> Value:
        return self._with("Mul", other)

    def __truediv__(self, other: Operand) -> Value:
        """For whole numbers the quotient without its fraction."""
        return self._with("Div", other)

    def __lt__(self, other: Value | float) -> Value:
        return self._with("Less", other, bool)

    def __le__(self, other: Value | float) -> Value:
        return self._with("LessOrEqual", other, bool)

    def __gt__(self, other: Value | float) -> Value:
        return self._with("Greater", other, bool)

    def __ge__(self, other: Value | float) -> Value:
        return self._with("GreaterOrEqual", other, bool)

    def __and__(self, other: Value) -> Value:
        return self._with("And", other, bool)

    def __or__(self, other: Value) -> Value:
        return self._with("Or", other, bool)

    def equals(self, other: Operand) -> Value:
        return self._with("Equal", other, bool)

    def at_least(self, other: Operand) -> Value:
        return self._with("Max", other)

    def at_most(self, other: Operand) -> Value:
        return self._with("Min", other)

    def floor(self) -> Value:
        return self.graph.node("Floor", self)

    def absolute(self) -> Value:
        return self.graph.node("Abs", self)

    def cast(self, dtype: Any) -> Value:
        target = np.dtype(dtype)
        return self.graph.node("Cast", self, dtype=target, to=onnx.helper.np_dtype_to_tensor_dtype(target))

    def reshape(self, *shape: int) -> Value:
        """0 keeps a length."""
        return self.graph.node("Reshape", self, self.graph.integers(*shape))

    def reshape_to(self, shape: Value) -> Value:
        return self.graph.node("Reshape", self, shape)

    def transpose(self, *order: int) -> Value:
        return self.graph.node("Transpose", self, perm=order)

    def unsqueeze(self, axis: int) -> Value:
        return self.graph.node("Unsqueeze", self, self.graph.integers(axis))

    def squeeze(self, axis: int) -> Value:
        return self.graph.node("Squeeze", self, self.graph.integers(axis))

    def part(self, start: int, end: int, *, axis: int) -> Value:
        """`self[start:end]` along an axis."""
        bounds = [self.graph.integers(value) for value in (start, end, axis)]
        return self.graph.node("Slice", self, *bounds)

    def reduce(self, op: str, axis: int, *, keepdims: bool = True) -> Value:
        """`ReduceSum`, `ReduceMin` or `ReduceMax` over one axis."""
        return self.graph.node(op, self, self.graph.integers(axis), keepdims=int(keepdims))


def _declared(tensor: TensorSpec) -> onnx.ValueInfoProto:
    kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype))
    shape: Sequence[int | str] = tensor.file_shape
    return onnx.helper.make_tensor_value_info(tensor.name, kind, list(shape))
