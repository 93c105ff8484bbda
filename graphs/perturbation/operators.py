"""A concise way to add standard ONNX operators to a graph-surgeon graph."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import onnx_graphsurgeon as gs


class Operators:
    """Appends nodes to `graph`; names of nodes and tensors start with `prefix`. Tensors are float32 by default.

    `size` is d, the side of the matrices.
    """

    def __init__(self, graph: gs.Graph, prefix: str, size: int) -> None:
        self.size = size
        self._graph = graph
        self._path = [prefix]
        self._constants: dict[str, gs.Constant] = {}
        self._uses: dict[str, int] = {}
        self._rows: dict[str, gs.Tensor] = {}
        self._diagonal = {"start": 0, "end": size**2, "axis": 5, "step": size + 1}

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Add `name` to the names of everything added inside."""
        self._path.append(name)
        try:
            yield
        finally:
            self._path.pop()

    def constant(self, name: str, values: object, dtype: type = np.float32) -> gs.Constant:
        """The initializer `prefix/name`, created once."""
        full = f"{self._path[0]}/{name}"
        if full not in self._constants:
            self._constants[full] = gs.Constant(full, np.asarray(values, dtype))
        return self._constants[full]

    def __call__(self, op: str, *inputs: gs.Tensor | float, dtype: type = np.float32, **attrs: object) -> gs.Variable:
        """Add one node; Python numbers become float32 scalar initializers."""
        name = "/".join([*self._path, op])
        self._uses[name] = self._uses.get(name, 0) + 1
        name = f"{name}_{self._uses[name]}"
        output = gs.Variable(f"{name}:0", dtype)
        tensors = [self.constant(f"scalar_{i!r}", i) if isinstance(i, int | float) else i for i in inputs]
        self._graph.nodes.append(gs.Node(op, name, dict(attrs), tensors, [output]))
        return output

    def split(self, tensor: gs.Tensor, sizes: gs.Constant, *, axis: int) -> list[gs.Variable]:
        """Split `tensor` along `axis` into parts of these lengths."""
        first = self("Split", tensor, sizes, axis=axis)
        (node,) = first.inputs
        rest = [gs.Variable(f"{node.name}:{i}", np.float32) for i in range(1, len(sizes.values))]
        node.outputs.extend(rest)
        if tensor.shape is not None:
            for part, length in zip(node.outputs, sizes.values.tolist(), strict=True):
                part.shape = [*tensor.shape[:axis], length, *tensor.shape[axis + 1 :]]
        return [first, *rest]

    def dot(self, left: gs.Tensor, right: gs.Tensor) -> gs.Variable:
        """⟨A, B⟩ = Σ_ij a_ij b_ij, which is tr(AB) of symmetric matrices: [B, A, H, O, d, d] twice to [..., 1, 1].

        A row times a column reads both and writes only the result; Mul and ReduceSum would write d² numbers first.
        """
        with self.scope("dot"):
            return self("MatMul", self._row(left), self._column(right))

    def trace(self, matrices: gs.Tensor) -> gs.Variable:
        """tr A: [B, A, H, O, d, d] to [..., 1, 1]. Every (d+1)-th number of the row is on the diagonal."""
        with self.scope("trace"):
            bounds = [self.constant(f"diagonal_{name}", [value], np.int64) for name, value in self._diagonal.items()]
            diagonal = self("Slice", self._row(matrices), *bounds)  # [B, A, H, O, 1, d]
            return self("ReduceSum", diagonal, self.constant("last_axis", [5], np.int64), keepdims=1)

    def _row(self, matrices: gs.Tensor) -> gs.Tensor:
        """[B, A, H, O, d, d] as [B, A, H, O, 1, d²]; all lengths are explicit because O may be 0."""
        if matrices.name not in self._rows:
            shape = self.constant("row_shape", [0, 0, 0, 0, 1, self.size**2], np.int64)
            self._rows[matrices.name] = self("Reshape", matrices, shape)
        return self._rows[matrices.name]

    def _column(self, matrices: gs.Tensor) -> gs.Tensor:
        """The row, transposed: ONNX Runtime then uses its kernel for products of two rows."""
        return self("Transpose", self._row(matrices), perm=[0, 1, 2, 3, 5, 4])

    def combine(self, a: gs.Tensor, left: gs.Tensor, b: gs.Tensor, right: gs.Tensor) -> gs.Variable:
        """a · left + b · right, elementwise."""
        return self("Add", self("Mul", a, left), self("Mul", b, right))

    def less(self, left: gs.Tensor | float, right: gs.Tensor | float) -> gs.Variable:
        return self("Less", left, right, dtype=bool)
