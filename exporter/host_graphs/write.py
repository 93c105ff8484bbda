"""Writes a bundle's host graphs: `preprocess.onnx`, and `boxes.onnx` where the model takes boxes."""

from __future__ import annotations

from pathlib import Path

import onnx

from qpert.exporter.host_graphs.boxes import boxes_graph, boxes_spec
from qpert.exporter.host_graphs.preprocess import preprocess_graph, preprocess_spec
from qpert.exporter.tracing.onnx_files import check_graph
from qpert.runtime.bundle.graph_spec import GraphSpec
from qpert.runtime.inputs.perturbation import Perturbation
from qpert.runtime.inputs.token_grid import TokenGrid


def write_host_graphs(
    folder: Path, grid: TokenGrid, perturbation: Perturbation, head: GraphSpec
) -> dict[str, GraphSpec]:
    """Write the graphs below `folder`, a bundle, and check them; their specs by name.

    `head`: the query head, which takes the boxes' masks and weights, if it takes any.

    Raises:
        GraphError: a graph differs from its declaration, or ONNX Runtime cannot open it.
    """
    preprocess = preprocess_spec(grid.image)
    save(preprocess_graph(preprocess, grid.image), folder, preprocess)
    if not head.takes_boxes:
        return {preprocess.name: preprocess}
    boxes = boxes_spec(grid)
    write_boxes_graph(folder, boxes, grid, perturbation)
    return {preprocess.name: preprocess, boxes.name: boxes}


def write_boxes_graph(folder: Path, spec: GraphSpec, grid: TokenGrid, perturbation: Perturbation) -> None:
    """Write `boxes.onnx` of a bundle, with these settings. Raises GraphError as `write_host_graphs` does."""
    save(boxes_graph(spec, grid, perturbation), folder, spec)


def save(model: onnx.ModelProto, folder: Path, spec: GraphSpec) -> None:
    path = folder / spec.file
    onnx.save_model(model, path)
    check_graph(path, spec)
