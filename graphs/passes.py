"""The graph passes, in the order in which they run. Each takes a graph-surgeon graph and returns it rewritten."""

from __future__ import annotations

from collections.abc import Callable

import onnx_graphsurgeon as gs

from qpert.graphs.perturbation.lowering import lower_query_map

Pass = Callable[[gs.Graph], gs.Graph]


def strip_traces(graph: gs.Graph) -> gs.Graph:
    """Drop the tracer's debugging metadata: stack traces would leak paths of the exporting machine."""
    for node in graph.nodes:
        if node.attrs and "metadata_props" in node.attrs:
            del node.attrs["metadata_props"]
    graph.doc_string = ""
    return graph


def drop_unused_domains(graph: gs.Graph) -> gs.Graph:
    """Drop imports of unused operator sets: runtimes may reject an unknown domain."""
    used = {node.domain or "" for node in graph.nodes}
    graph.import_domains = [imported for imported in graph.import_domains or [] if imported.domain in used | {""}]
    return graph


PASSES: tuple[Pass, ...] = (strip_traces, lower_query_map, drop_unused_domains)


def run_passes(graph: gs.Graph) -> gs.Graph:
    """Every pass in order, each followed by clean-up and a topological sort."""
    for graph_pass in PASSES:
        graph = graph_pass(graph).cleanup().toposort()
    return graph
