"""Inputs that one row may serve for all rows of the others: one image's tokens for several sets of boxes.

Such a graph computes what depends on the image alone once, and broadcasts it. Nothing changes but names of axes: with
one name for both lengths, a runtime might plan one buffer for tensors of different sizes.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from qpert.runtime.bundle.graph_spec import GraphSpec, either_length


def name_shared_rows(graph: gs.Graph, spec: GraphSpec) -> gs.Graph:
    """Give everything that depends on no other input than the shared one its own name for the first axis."""
    for tensor in spec.inputs:
        if not tensor.shared:
            continue
        (axis, *_) = tensor.shape
        others = {one.name for one in spec.inputs if not one.shared}
        for variable in _independent(graph, others):
            if variable.shape:
                variable.shape = [either_length(axis) if length == axis else length for length in variable.shape]
    return graph


def _independent(graph: gs.Graph, inputs: set[str]) -> list[gs.Variable]:
    """Variables that are not computed from any of the named inputs."""
    reached = [variable for variable in graph.inputs if variable.name in inputs]
    dependent = {variable.name for variable in reached}
    while reached:
        for node in reached.pop().outputs:
            for output in node.outputs:
                if output.name not in dependent:
                    dependent.add(output.name)
                    reached.append(output)
    return [
        variable
        for variable in graph.tensors().values()
        if isinstance(variable, gs.Variable) and variable.name not in dependent
    ]
