"""Inputs that one row may serve for all rows of the others: one image's tokens for several sets of boxes.

Such a graph computes what depends on the image alone once, and broadcasts it. Nothing changes but names of axes: with
one name for both lengths, a runtime might plan one buffer for tensors of different sizes.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from qpert.runtime.bundle.graph_spec import GraphSpec, either_length


def name_shared_rows(graph: gs.Graph, spec: GraphSpec) -> gs.Graph:
    """Give everything that depends on no other input than the shared one its own name for the first axis.

    The exporter may take a length from any input that has it. Where a reshape of shared values takes the number of rows
    from another input, it is changed to keep the number of rows of its data.
    """
    for tensor in spec.inputs:
        if not tensor.shared:
            continue
        (axis, *_) = tensor.shape
        dependent = _dependent(graph, {one.name for one in spec.inputs if not one.shared})
        for node in graph.nodes:
            if node.op == "Reshape" and node.inputs[0].name not in dependent and node.inputs[1].name in dependent:
                _keep_rows(node, axis)
        for variable in graph.tensors().values():
            if isinstance(variable, gs.Variable) and variable.shape and variable.name not in dependent:
                variable.shape = [either_length(axis) if length == axis else length for length in variable.shape]
    return graph


def _keep_rows(node: gs.Node, axis: int | str) -> None:
    """Reshape to the declared shape, with -1 for the number of rows."""
    (output,) = node.outputs
    rows, *rest = output.shape or [None]
    if rows == axis and all(isinstance(length, int) for length in rest):
        node.inputs[1] = gs.Constant(f"{node.name}/kept_rows", np.array([-1, *rest], np.int64))


def _dependent(graph: gs.Graph, inputs: set[str]) -> set[str]:
    """Names of the variables that are computed from any of the named inputs; a reshape from its data alone."""
    reached = [variable for variable in graph.inputs if variable.name in inputs]
    dependent = {variable.name for variable in reached}
    while reached:
        variable = reached.pop()
        for node in variable.outputs:
            if node.op == "Reshape" and node.inputs[0].name != variable.name:
                continue
            for output in node.outputs:
                if output.name not in dependent:
                    dependent.add(output.name)
                    reached.append(output)
    return dependent
