"""The graphs' inputs and outputs against the contract's table."""

from dataclasses import replace
from functools import partial

import pytest
from tiny_model import TINY

from qpert.exporter.families.blip2.graph_specs import graph_specs
from qpert.exporter.families.declare import Limits
from qpert.graphs.families.blip2.config import CONFIGS
from qpert.runtime.errors import InputError

GRAPH_NAMES = ("vision", "image_query", "text", "itm")


def shapes(tensors):
    return {tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors}


BOXES = {"object_masks": ("float32", ("I", "O", 677)), "box_weights": ("float32", ("I", "O"))}


@pytest.mark.parametrize("stages", ["itc", "both", "none"])
def test_the_graphs_are_those_of_the_contract(stages):
    graphs = graph_specs(CONFIGS["coco"], precision="fp32", stages=stages, limits=Limits())
    assert tuple(graphs) == GRAPH_NAMES
    assert shapes(graphs["vision"].inputs) == {"pixel_values": ("float32", ("B", 3, 364, 364))}
    assert shapes(graphs["vision"].outputs) == {"image_embeds": ("float32", ("B", 677, 1408))}
    expected = {"image_embeds": ("float32", ("B", 677, 1408))}
    if stages != "none":
        expected |= {name: (dtype, ("B", *shape[1:])) for name, (dtype, shape) in BOXES.items()}
    assert shapes(graphs["image_query"].inputs) == expected
    assert shapes(graphs["image_query"].outputs) == {"query_embeds": ("float32", ("B", 32, 256))}
    tokens = ("input_ids", "attention_mask")
    assert shapes(graphs["text"].inputs) == dict.fromkeys(tokens, ("int64", ("T", "L")))
    assert shapes(graphs["text"].outputs) == {"text_embeds": ("float32", ("T", 256))}
    expected = {"image_embeds": ("float32", ("I", 677, 1408))} | dict.fromkeys(tokens, ("int64", ("I", "T", "L")))
    assert shapes(graphs["itm"].inputs) == expected | (BOXES if stages == "both" else {})
    assert shapes(graphs["itm"].outputs) == {"itm_scores": ("float32", ("I", "T"))}
    assert [name for name, graph in graphs.items() if graph.takes_boxes] == {
        "itc": ["image_query"],
        "both": ["image_query", "itm"],
        "none": [],
    }[stages]


def test_every_named_axis_has_its_range_and_no_other_has():
    graphs = graph_specs(TINY, precision="fp32", stages="both", limits=Limits(3, 4, 6, 12))
    for graph in graphs.values():
        axes = {axis for tensor in graph.inputs for axis in tensor.shape if isinstance(axis, str)}
        assert set(graph.ranges) == axes
        assert {axis for tensor in graph.outputs for axis in tensor.shape if isinstance(axis, str)} <= axes
    ranges = {axis: (r.min, r.max) for axis, r in graphs["itm"].ranges.items()}
    assert ranges == {"I": (1, 3), "T": (1, 6), "L": (2, 12), "O": (0, 4)}
    assert (graphs["vision"].ranges["B"].min, graphs["vision"].ranges["B"].max) == (1, 3)


@pytest.mark.parametrize(("precision", "features"), [("fp32", "float32"), ("fp16", "float16"), ("bf16", "float32")])
def test_only_image_features_follow_the_precision(precision, features):
    graphs = graph_specs(TINY, precision=precision, stages="both", limits=Limits(length=12))
    for graph in graphs.values():
        for tensor in (*graph.inputs, *graph.outputs):
            named = {"image_embeds": features, "input_ids": "int64", "attention_mask": "int64"}
            assert tensor.dtype == named.get(tensor.name, "float32"), (graph.name, tensor.name)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (Limits(batch=0), "--max-batch is 0"),
        (Limits(boxes=0), "--max-boxes is 0"),
        (Limits(texts=0), "--max-text is 0"),
        (Limits(length=2), "--max-length is 2, expected at least 3"),
        (Limits(length=41), "--max-length is 41, .* 40 position embeddings"),
    ],
)
def test_limits_that_no_graph_can_have_are_refused(limits, message):
    config = with_positions(40)
    too_long = limits.length is not None and limits.length > 40
    refuse = partial(graph_specs, config, precision="fp32", stages="itc", limits=limits) if too_long else limits.check
    with pytest.raises(InputError, match=message):
        refuse()


def test_limits_at_their_ends_pass():
    Limits(1, 1, 1, 3).check()
    graphs = graph_specs(with_positions(40), precision="fp32", stages="itc", limits=Limits(length=40))
    assert graphs["text"].ranges["L"].max == 40


def with_positions(count):
    return replace(TINY, qformer=replace(TINY.qformer, max_positions=count))
