"""One graph with every candidate quantised, by either tool."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import onnx

from qpert.calibration.graph_files import copy_graph, load_graph
from qpert.calibration.quantization.candidates import Candidate, find_candidates
from qpert.calibration.quantization.data import CalibrationData
from qpert.calibration.quantization.modelopt import quantize_with_modelopt, taken
from qpert.calibration.quantization.request import QuantizeRequest
from qpert.calibration.quantization.static import FORMATS, quantize_all, tensor_ranges
from qpert.calibration.quantization.tables import fold_weights, quantize_tables
from qpert.calibration.quantization.variants import Form, free_other_readers, variant
from qpert.runtime.bundle.folder import Bundle


@dataclass(frozen=True, eq=False)
class QuantizedGraph:
    """A graph of the bundle: the file of its float form, its fully quantised form, and the quantised products.

    tables: embedding tables stored in 8 bits. left: products that the tool did not quantise.
    """

    name: str
    path: Path
    quantized: onnx.ModelProto
    candidates: tuple[Candidate, ...]
    tables: tuple[str, ...] = ()
    left: tuple[str, ...] = ()

    def without(self, given_up: Collection[str]) -> onnx.ModelProto:
        """The graph with the products of some blocks computing in float, from the 8-bit weights."""
        forms: dict[str, Form] = {c.node: "weights" for c in self.candidates if c.block in given_up}
        return variant(None, self.quantized, self.candidates, forms)


def quantize_graph(
    bundle: Bundle, name: str, request: QuantizeRequest, data: CalibrationData, folder: Path
) -> QuantizedGraph:
    """Quantise every candidate of one graph with the tool for the precision."""
    path = copy_graph(bundle.graph_path(bundle.manifest.graphs[name]), folder)  # the tools write beside their input
    make = QUANTIZERS[request.precision]
    made, candidates = make(path, name, request, data, folder)
    free_other_readers(made, candidates)
    fold_weights(made)
    tables = quantize_tables(made, target=request.target)
    every = find_candidates(onnx.load_model(path, load_external_data=False))
    left = tuple(candidate.node for candidate in every if candidate not in candidates)
    return QuantizedGraph(name, path, made, candidates, tables, left)


Made = tuple[onnx.ModelProto, tuple[Candidate, ...]]


def with_onnxruntime(path: Path, name: str, request: QuantizeRequest, data: CalibrationData, folder: Path) -> Made:
    candidates = find_candidates(onnx.load_model(path, load_external_data=False))
    symmetric = FORMATS[request.target].symmetric
    feeds = data.feeds[name]
    ranges = tensor_ranges(path, feeds, candidates, method=request.ranges, symmetric=symmetric, folder=folder)
    made = quantize_all(load_graph(path), ranges, candidates, target=request.target, reduce_range=request.reduce_range)
    return made, candidates


def with_modelopt(path: Path, name: str, request: QuantizeRequest, data: CalibrationData, folder: Path) -> Made:
    candidates = find_candidates(onnx.load_model(path, load_external_data=False))
    made = quantize_with_modelopt(
        path, data.feeds[name], candidates, precision=request.precision, method=request.ranges, folder=folder
    )
    return made, taken(made, candidates)


QUANTIZERS: dict[str, Callable[[Path, str, QuantizeRequest, CalibrationData, Path], Made]] = {
    "int8": with_onnxruntime,
    "fp8": with_modelopt,
}
