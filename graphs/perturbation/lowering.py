"""`qpert::QueryMap` in standard ONNX operators, by density-matrix purification (SP2, Niklasson 2002)."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from qpert.graphs.perturbation.placeholder import DOMAIN, OPERATOR

STEERED, SQUARED, POLISHED = 40, 6, 2


class Builder:
    def __init__(self, graph: gs.Graph, prefix: str) -> None:
        self.graph, self.prefix, self.count = graph, prefix, 0

    def __call__(self, op: str, *inputs, dtype=np.float32, **attrs):
        self.count += 1
        out = gs.Variable(f"{self.prefix}/{op}_{self.count}", dtype=dtype)
        self.graph.nodes.append(gs.Node(op, f"{self.prefix}/{op}_{self.count}_node", attrs, [self.const(i) for i in inputs], [out]))
        return out

    def const(self, value):
        if isinstance(value, gs.Tensor):
            return value
        self.count += 1
        return gs.Constant(f"{self.prefix}/constant_{self.count}", np.asarray(value))


def lower_query_map(graph: gs.Graph) -> gs.Graph:
    for node in [n for n in graph.nodes if n.op == OPERATOR and n.domain == DOMAIN]:
        lower_node(graph, node)
    return graph


def lower_node(graph, node):
    o = Builder(graph, "query_map")
    keys, masks, weights = node.inputs
    d = keys.shape[-1]
    tau = gs.Constant("query_map/threshold", np.array(node.attrs["threshold"], np.float32))
    one, two, half = np.float32(1), np.float32(2), np.float32(0.5)
    eye = gs.Constant("query_map/identity", np.eye(d, dtype=np.float32))
    axes = np.array([-2, -1], np.int64)
    m = o("Unsqueeze", masks, np.array([2, 3, 5], np.int64))  # B,O,1,1,N,1
    k = o("Unsqueeze", keys, np.array([1], np.int64))
    mk = o("Mul", m, k)  # B,O,A,H,N,d
    mt = o("Transpose", mk, perm=[0, 1, 2, 3, 5, 4])
    C = o("MatMul", mt, mk)

    def total(a):
        return o("ReduceSum", a, axes, keepdims=1)

    def trace(a):
        return total(o("Mul", a, eye))

    def square(x):
        return o("MatMul", x, o("Transpose", x, perm=[0, 1, 2, 3, 5, 4]))

    tiny = np.float32(1e-30)
    norm = o("Max", o("Sqrt", total(o("Mul", C, C))), tiny)
    X = o("Div", C, o("Mul", norm, np.float32(1 + 1e-6)))
    W = o("Div", C, o("Max", trace(C), tiny))
    for _ in range(STEERED):
        E = total(o("Mul", W, X))
        above = o("Less", E, tau, dtype=bool)
        Y = square(X)
        a = o("Where", above, -one, np.float32(1 - 5e-7))
        b = o("Where", above, two, np.float32(0))
        X = o("Add", o("Mul", a, Y), o("Mul", b, X))
    for _ in range(SQUARED):
        R = trace(X)
        f = o("Sub", R, o("Floor", R))
        X = o("Where", o("Greater", f, half, dtype=bool), square(X), X)
    D = o("Sub", X, square(X))
    t = trace(D)
    ok = o("Greater", t, np.float32(1e-3), dtype=bool)
    V = o("Where", ok, o("Div", D, o("Where", ok, t, one)), np.float32(0))
    f = total(o("Mul", X, V))
    base = o("Sub", X, o("Mul", f, V))
    eb = o("Add", total(o("Mul", W, base)), total(o("Mul", W, V)))
    inc = o("Or", o("Less", eb, tau, dtype=bool), o("Less", trace(base), half, dtype=bool), dtype=bool)
    P = o("Add", base, o("Where", inc, V, np.float32(0)))
    for _ in range(POLISHED):
        P2 = square(P)
        P = o("Sub", o("Mul", np.float32(3), P2), o("Mul", two, o("MatMul", P2, P)))
    w = o("Unsqueeze", weights, np.array([2, 3, 4, 5], np.int64))
    S = o("ReduceSum", o("Mul", w, P), np.array([1], np.int64), keepdims=0)
    out = node.outputs[0]
    node.outputs.clear()
    graph.nodes.append(gs.Node("Add", "query_map/output", {}, [S, eye], [out]))
