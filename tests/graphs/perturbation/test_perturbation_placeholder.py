"""Tracing leaves one node of the custom operator, with its attribute and with symbolic shapes."""

from __future__ import annotations

import onnx_graphsurgeon as gs
import pytest
import torch

from qpert.graphs.perturbation.oracle import perturb_queries
from qpert.graphs.perturbation.placeholder import DOMAIN, OPERATOR, query_map_placeholder


class Toy(torch.nn.Module):
    """Keys of two layers and three heads from features, and one layer's queries perturbed."""

    def __init__(self, *, preserve_norm: bool) -> None:
        super().__init__()
        self.preserve_norm = preserve_norm

    def forward(self, features, object_masks, box_weights, queries):
        keys = features.unflatten(-1, (2, 3, 8)).permute(0, 2, 3, 1, 4)  # [B, A, H, N, d]
        mapped = query_map_placeholder(keys, object_masks, box_weights, threshold=0.95)
        return perturb_queries(queries, mapped[:, 1], preserve_norm=self.preserve_norm)


@pytest.fixture(scope="module", params=[False, True])
def graph(request) -> gs.Graph:
    features, masks, weights = torch.randn(2, 5, 48), torch.rand(2, 4, 5), torch.rand(2, 4)
    batch, objects = torch.export.Dim("batch"), torch.export.Dim("objects")
    program = torch.onnx.export(
        Toy(preserve_norm=request.param).eval(),
        (features, masks, weights, torch.randn(2, 3, 7, 8)),
        dynamic_shapes=({0: batch}, {0: batch, 1: objects}, {0: batch, 1: objects}, {0: batch}),
        opset_version=20,
        dynamo=True,
        verbose=False,
    )
    return gs.import_onnx(program.model_proto)


def custom_nodes(graph: gs.Graph) -> list[gs.Node]:
    return [node for node in graph.nodes if node.domain not in (None, "", "ai.onnx")]


def test_tracing_leaves_exactly_one_node_for_all_layers_heads_and_boxes(graph):
    (node,) = custom_nodes(graph)
    assert (node.domain, node.op) == (DOMAIN, OPERATOR) == ("qpert", "QueryMap")
    assert node.attrs["threshold"] == pytest.approx(0.95)
    assert len(node.inputs) == 3


def test_the_node_keeps_symbolic_batch_and_boxes(graph):
    (node,) = custom_nodes(graph)
    keys, masks, weights = node.inputs
    (output,) = node.outputs
    batch, objects = masks.shape[:2]
    assert isinstance(batch, str)
    assert isinstance(objects, str)
    assert weights.shape == [batch, objects]
    assert keys.shape == [batch, 2, 3, 5, 8]
    assert output.shape == [batch, 2, 3, 8, 8]
    assert output.dtype == "float32"
