"""Traced graphs: dynamic axes are dynamic, weights are named and none is baked in."""

import onnx
import onnx_graphsurgeon as gs
import pytest
import torch
from tiny_model import TINY, tiny_state

from qpert.exporter.families.blip2.family import FAMILY
from qpert.exporter.families.blip2.graph_specs import graph_specs
from qpert.exporter.families.declare import Limits
from qpert.exporter.tracing.trace import TRACE_LENGTHS, dummy_inputs, dynamic_shapes, network_without_weights
from qpert.graphs.perturbation.choices import GraphPerturbation
from qpert.runtime.bundle.folder import Bundle

SPECS = graph_specs(TINY, precision="fp16", stages="both", limits=Limits(3, 4, 6, 12))


def test_dummy_inputs_have_the_declared_dtypes_and_lengths_that_cannot_be_confused():
    for spec in SPECS.values():
        for tensor, dummy in zip(spec.inputs, dummy_inputs(spec), strict=True):
            assert str(dummy.dtype) == f"torch.{tensor.dtype}"
            assert list(dummy.shape) == [TRACE_LENGTHS.get(axis, axis) for axis in tensor.shape]
    together = [TRACE_LENGTHS[axis] for axis in ("I", "O", "T", "L")]
    assert len(set(together)) == len(together)
    assert min(TRACE_LENGTHS.values()) > 1, "a length of 1 is broadcast, and its axis no longer dynamic"


def test_a_named_axis_is_one_dimension_in_every_input():
    embeds, ids, mask, masks, weights = dynamic_shapes(SPECS["itm"])
    assert embeds[0] is ids[0] is mask[0] is masks[0] is weights[0]
    assert ids[1] is mask[1]
    assert ids[2] is mask[2]
    assert masks[1] is weights[1]
    assert set(embeds) == {0}


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)]
)
def test_a_network_without_weights_has_shapes_and_dtypes_and_layer_norms_in_float32(precision, dtype):
    hollow = dict(network_without_weights(FAMILY, TINY, GraphPerturbation(), precision).named_parameters())
    assert {name: tuple(p.shape) for name, p in hollow.items()} == {n: tuple(t.shape) for n, t in tiny_state().items()}
    for name, parameter in hollow.items():
        norm = "norm" in name.lower() or name.startswith("ln_")
        assert parameter.dtype == (torch.float32 if norm else dtype), name


@pytest.mark.parametrize("graph", ["vision", "image_query", "text", "itm"])
def test_every_weight_of_a_graph_is_a_parameter_of_the_checkpoint_or_made_of_some(traced, tiny_bundle, graph):
    weighted, names = traced["both", "fp32"][graph], set(tiny_state())
    used = set().union(*(recipe.parameters() for recipe in weighted.recipes.values()))
    assert used <= names
    prefixes = {"vision": ("visual_encoder.", "ln_vision.")}.get(
        graph, ("Qformer.", "query_tokens", "text_proj", "vision_proj", "itm_head")
    )
    assert all(name.startswith(prefixes) for name in used)
    constants = [tensor for tensor in weighted.graph.tensors().values() if isinstance(tensor, gs.Constant)]
    baked = [tensor.name for tensor in constants if tensor.name not in weighted.recipes and tensor.values.size > 256]
    assert baked == [], "numbers that are neither parameters nor small constants"


def test_together_the_graphs_use_every_parameter(traced, tiny_bundle):
    used = {
        name
        for weighted in traced["both", "fp32"].values()
        for recipe in weighted.recipes.values()
        for name in recipe.parameters()
    }
    assert set(tiny_state()) - used == set()


def test_named_axes_are_named_in_the_files(tiny_bundle):
    for spec in Bundle.open(tiny_bundle).manifest.graphs.values():
        found = onnx.load_model(tiny_bundle / spec.file, load_external_data=False).graph
        for declared, values in ((spec.inputs, found.input), (spec.outputs, found.output)):
            for tensor, value in zip(declared, values, strict=True):
                dims = value.type.tensor_type.shape.dim
                assert [dim.dim_param or dim.dim_value for dim in dims] == list(tensor.file_shape)


def test_keys_and_values_of_an_image_are_projected_once_for_all_texts(tiny_bundle):
    """Each weight [C, H·d] is the factor of one product with the features of an image, however many texts there are."""
    for graph in ("image_query", "itm"):
        model = onnx.load_model(tiny_bundle / "onnx" / f"{graph}.onnx", load_external_data=False)
        products = [node for node in model.graph.node if "image_embeds" in node.input]
        assert {node.op_type for node in products} == {"MatMul"}
        weights = [node.input[1] for node in products]
        assert len(weights) == len(set(weights)) == 2 * len(TINY.qformer.cross_layers)
        for kind in ("key", "value"):
            assert sum(f"crossattention.self.{kind}.weight" in name for name in weights) == len(weights) // 2
