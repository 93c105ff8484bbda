"""Traces a stage of the network to a graph: `torch.onnx.export`, without weights.

The traced module has no values (its parameters are uninitialised memory that is never touched), so tracing costs the
same for four million and for a billion parameters. Parameters become graph inputs before onnxscript's optimiser runs:
it can then simplify shapes and constants, but cannot embed a weight.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from qpert.exporter.families.base import Family
from qpert.exporter.tracing.weights import WeightedGraph, weighted_graph
from qpert.graphs.layers import LayerNorm
from qpert.graphs.perturbation.choices import GraphPerturbation
from qpert.graphs.perturbation.placeholder import query_map_placeholder
from qpert.runtime.bundle.graph_spec import GraphSpec

OPSET = 20
"""The first opset with Gelu as one operator; TensorRT 10 and 11, TensorRT-RTX and ONNX Runtime ≥ 1.17 read it."""

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TRACE_LENGTHS = {"B": 2, "I": 2, "O": 3, "T": 4, "L": 7}
"""Lengths of the dummy inputs: different numbers above 1, so that no two axes are mistaken for one."""


def network_without_weights(
    family: Family, config: Any, perturbation: GraphPerturbation | None, precision: str
) -> nn.Module:
    """The network with the placeholder for the query map, and parameters of the right shapes and dtypes without values.

    LayerNorm parameters stay float32: LayerNorm runs in float32 in every precision.
    """
    with torch.device("meta"):
        network = family.network(config, perturbation, query_map_placeholder)
    network = network.to(PRECISIONS[precision])
    for module in network.modules():
        if isinstance(module, LayerNorm):
            module.float()
    return network.to_empty(device="cpu").eval()


def dummy_inputs(spec: GraphSpec) -> tuple[Tensor, ...]:
    """Zeros in the declared dtypes. Named axes have the `TRACE_LENGTHS`."""
    return tuple(
        torch.zeros(
            [TRACE_LENGTHS[axis] if isinstance(axis, str) else axis for axis in tensor.shape],
            dtype=getattr(torch, tensor.dtype),
        )
        for tensor in spec.inputs
    )


def dynamic_shapes(spec: GraphSpec) -> tuple[dict[int, Any], ...]:
    """The declared named axes in `torch.export`'s form. The same name is the same dimension in every input."""
    dims = {axis: torch.export.Dim(axis, min=max(1, length.min)) for axis, length in spec.ranges.items()}
    return tuple(
        {place: dims[axis] for place, axis in enumerate(tensor.shape) if isinstance(axis, str)}
        for tensor in spec.inputs
    )


@dataclass(frozen=True)
class TracedStage:
    """A traced stage: the serialised graph, whose parameters are inputs, and their names, input → checkpoint.

    Plain data, so that one process can trace for another (`qpert.exporter.tracing.processes`).
    """

    model: bytes
    parameters: Mapping[str, str]

    def weighted(self) -> WeightedGraph:
        """The graph with inputs and outputs as declared, its weights as placeholders named like the checkpoint's
        tensors."""
        return weighted_graph(onnx.load_model_from_string(self.model), self.parameters)


def trace_stage(stage: nn.Module, spec: GraphSpec) -> TracedStage:
    """Trace the stage of the graph that `spec` describes; its parameters are those of its `model`."""
    with collector_paused():
        ir_model = _export(stage, spec).model
        parameters = {name: name.removeprefix("model.") for name, _ in stage.named_parameters()}
        parameters = {name: plain for name, plain in parameters.items() if name in ir_model.graph.initializers}
        _initializers_to_inputs(ir_model, parameters)
        return TracedStage(_optimised(ir_model).SerializeToString(deterministic=True), parameters)


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """No cyclic garbage collection inside: tracing makes millions of objects that live until its end, and looking
    through them again and again takes a seventh of its time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _export(stage: nn.Module, spec: GraphSpec) -> Any:
    exporter_log = logging.getLogger("torch.onnx")
    level = exporter_log.level
    exporter_log.setLevel(logging.ERROR)  # it warns that torchvision, which is not used here, is missing
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            return torch.onnx.export(
                stage,
                dummy_inputs(spec),
                dynamo=True,
                input_names=list(spec.input_names),
                output_names=list(spec.output_names),
                dynamic_shapes=dynamic_shapes(spec),
                opset_version=OPSET,
                optimize=False,
                verbose=False,
            )
    finally:
        exporter_log.setLevel(level)


def _initializers_to_inputs(ir_model: Any, names: dict[str, str]) -> None:
    for name in names:
        value = ir_model.graph.initializers.pop(name)
        value.const_value = None
        ir_model.graph.inputs.append(value)


def _optimised(ir_model: Any) -> onnx.ModelProto:
    """onnxscript's clean-up: constant folding of shape arithmetic, common subexpressions, dead nodes."""
    import onnx_ir
    import onnxscript.optimizer

    with contextlib.redirect_stdout(sys.stderr):  # onnxscript 0.6 prints; stdout is for results
        onnxscript.optimizer.optimize(ir_model)
    return onnx_ir.to_proto(ir_model)
