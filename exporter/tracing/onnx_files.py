"""Writes graphs as ONNX files, with shared weights written once, and checks every file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx
import onnx_graphsurgeon as gs

from qpert.exporter.tracing.readable import IR_VERSION, GraphError, check_versions, open_graph
from qpert.exporter.tracing.weights import Recipe, Stored, TensorSource, WeightedGraph, point_to, write_weights
from qpert.runtime.bundle.graph_spec import GraphSpec
from qpert.runtime.progress import Progress


def write_graphs(
    folder: Path,
    graphs: Mapping[str, WeightedGraph],
    weight_files: Mapping[str, str],
    source: TensorSource,
    progress: Progress,
) -> None:
    """Write `folder/<name>.onnx` and the data files; memory holds one weight at a time.

    `weight_files`: graph name → data file. Graphs with the same file share equal weights.
    """
    folder.mkdir()
    stored: dict[str, dict[str, Stored]] = {}
    total = sum(recipe_bytes(recipe) for recipe in distinct(graphs).values())
    with progress.stage("writing weights", total=total, unit="B") as advance:
        for location in dict.fromkeys(weight_files[name] for name in graphs):
            recipes = distinct({name: graph for name, graph in graphs.items() if weight_files[name] == location})
            with (folder / location).open("wb") as stream:
                stored[location] = write_weights(stream, location, recipes.values(), source, on_bytes=advance)
    for name, weighted in graphs.items():
        model = gs.export_onnx(weighted.graph, do_type_check=True)
        model.producer_name, model.ir_version = "qpert", IR_VERSION
        point_to(model, weighted.recipes, stored[weight_files[name]])
        onnx.save_model(model, folder / f"{name}.onnx")


def distinct(graphs: Mapping[str, WeightedGraph]) -> dict[str, Recipe]:
    """The recipes of some graphs by key, without duplicates."""
    return {recipe.key: recipe for graph in graphs.values() for recipe in graph.recipes.values()}


def recipe_bytes(recipe: Recipe) -> int:
    count = onnx.helper.tensor_dtype_to_np_dtype(recipe.dtype).itemsize
    for length in recipe.shape:
        count *= length
    return count


def check_graph(path: Path, spec: GraphSpec) -> None:
    """Check a file with onnx.checker and strict shape inference, and its inputs and outputs against the declaration.

    Then open it in ONNX Runtime.

    Raises:
        GraphError: the traced graph differs from its declaration, or a supported ONNX Runtime cannot read it.
    """
    onnx.checker.check_model(path, full_check=True)
    model = onnx.load_model(path, load_external_data=False)
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True).graph
    for declared, found in ((spec.inputs, inferred.input), (spec.outputs, inferred.output)):
        described = [describe(value) for value in found]
        wanted = [(tensor.name, tensor.dtype, list(tensor.file_shape)) for tensor in declared]
        if described != wanted:
            raise GraphError(
                f"graph {spec.name!r} has {described}, expected {wanted} as declared; please report this",
                code="graph-declaration",
            )
    check_versions(model, spec.name)
    open_graph(path, spec.name)


def describe(value: onnx.ValueInfoProto) -> tuple[str, str, list[int | str]]:
    """Name, dtype and shape (numbers or axis names) of a graph's input or output."""
    tensor = value.type.tensor_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    return value.name, dtype, [dim.dim_param or dim.dim_value for dim in tensor.shape.dim]
