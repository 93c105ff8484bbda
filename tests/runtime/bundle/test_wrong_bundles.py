"""Bundles made wrong on purpose, and the gate that catches each.

A fault is put into the files of a bundle (a graph, its weights, the manifest, the tokenizer) and the hashes are made to
agree again, so nothing but the comparison with what PyTorch recorded can tell. The expected gates are named; where a
fault must be caught by one gate alone, all the others have to pass.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.cli import run
from qpert.runtime.files import sha256_of

GRAPHS = ("vision", "image_query", "text", "itm")


@pytest.fixture(params=["fp32", "fp16"])
def folder(request, copy_of) -> Path:
    """A copy of a small bundle, in either precision: what is wrong must be seen through fp16's wider limits too."""
    return copy_of(request.getfixturevalue({"fp32": "tiny_bundle", "fp16": "half_bundle"}[request.param]))


@pytest.fixture
def single(tiny_bundle, copy_of) -> Path:
    """A copy of a small bundle in float32, for faults that rounding to half precision would hide."""
    return copy_of(tiny_bundle)


@pytest.fixture
def failed_gates(capsys) -> Callable[[Path], list[str]]:
    """Runs `qpert verify --json` on a bundle whose hashes agree; the names of the gates that fail, in order."""

    def verify(folder: Path) -> list[str]:
        assert all(state.ok for state in Bundle.open(folder).check_files()), "the fault must not show in the hashes"
        code = run(["verify", str(folder), "--json"])
        document = json.loads(capsys.readouterr().out)
        failed = [gate["name"] for gate in document["gates"] if not gate["pass"]]
        assert (code, document["verdict"]) == ((1, "fail") if failed else (0, "pass"))
        assert json.loads((folder / "manifest.json").read_text())["verification"]["verdict"] == document["verdict"]
        return failed

    return verify


def rehash(folder: Path, *names: str) -> None:
    path = folder / "manifest.json"
    values = json.loads(path.read_text())
    for name in names:
        values["files"][name] = sha256_of(folder / name)
    path.write_text(json.dumps(values))


# How a graph is edited


def edit_graph(folder: Path, graph: str, change: Callable[[onnx.GraphProto], None]) -> None:
    """Change a graph's nodes; its weights stay where they are."""
    path = folder / "onnx" / f"{graph}.onnx"
    model = onnx.load_model(path, load_external_data=False)
    change(model.graph)
    path.write_bytes(model.SerializeToString())
    rehash(folder, f"onnx/{graph}.onnx")


def constant(graph: onnx.GraphProto, name: str, values: np.ndarray) -> str:
    graph.initializer.append(numpy_helper.from_array(values, name))
    return name


def replace_input(graph: onnx.GraphProto, name: str, *nodes: onnx.NodeProto) -> None:
    """Everything that reads the input `name` reads `wrong` instead, which `nodes` make of it."""
    for node in graph.node:
        for place, given in enumerate(node.input):
            if given == name:
                node.input[place] = "wrong"
    before = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *before])


def replace_output(graph: onnx.GraphProto, make: Callable[[str, str], list[onnx.NodeProto]]) -> None:
    """The graph's output is what `make(sound, name)` makes of what it was."""
    name = graph.output[0].name
    for node in graph.node:
        for place, made in enumerate(node.output):
            if made == name:
                node.output[place] = "sound"
    graph.node.extend(make("sound", name))


def reading(graph: onnx.GraphProto, name: str) -> onnx.NodeProto:
    """The only node that reads a tensor."""
    (node,) = (node for node in graph.node if name in node.input)
    return node


def leads_to(graph: onnx.GraphProto, name: str, goal: onnx.NodeProto) -> bool:
    """Does the tensor's only reader, or the reader of what that makes, lead to `goal` within three steps?"""
    for _ in range(3):
        node = reading(graph, name)
        if node == goal:
            return True
        name = node.output[0]
    return False


def swap_heads(graph: onnx.GraphProto) -> None:
    """Heads 0 and 1 of the first attention change places between softmax · values and the output layer."""
    weights = next(node.output[0] for node in graph.node if node.op_type == "Softmax")
    reader = reading(graph, weights)
    product = reading(graph, reader.output[0]) if reader.op_type == "Cast" else reader
    assert (product.op_type, product.input[1] != weights) == ("MatMul", True)
    place = list(graph.node).index(product)
    order = constant(graph, "swapped_heads", np.array([1, 0]))
    sound, product.output[0] = product.output[0], "unswapped"
    graph.node.insert(place + 1, helper.make_node("Gather", ["unswapped", order], [sound], axis=-3))  # [..., H, L, d]


def take_the_other_logit(graph: onnx.GraphProto) -> None:
    """The Gather that picks class 1 of the head's two logits picks class 0."""
    (gather,) = (node for node in graph.node if node.op_type == "Gather" and leads_to(graph, "itm_head.bias", node))
    gather.input[1] = constant(graph, "class_0", np.array(0))


def shift_masks(graph: onnx.GraphProto) -> None:
    """Every mask moves on by one patch; CLS stays in front."""
    start, one, last, end = (
        constant(graph, f"place_{number}", np.array([number])) for number in (0, 1, -1, np.iinfo(np.int64).max)
    )
    axis = constant(graph, "last_axis", np.array([-1]))
    replace_input(
        graph,
        "object_masks",
        helper.make_node("Slice", ["object_masks", start, one, axis], ["masks_cls"]),
        helper.make_node("Slice", ["object_masks", last, end, axis], ["masks_last"]),
        helper.make_node("Slice", ["object_masks", one, last, axis], ["masks_rest"]),
        helper.make_node("Concat", ["masks_cls", "masks_last", "masks_rest"], ["wrong"], axis=-1),
    )


def ignore_weights(graph: onnx.GraphProto) -> None:
    nothing = constant(graph, "nothing", np.array(0, np.float32))
    replace_input(graph, "box_weights", helper.make_node("Mul", ["box_weights", nothing], ["wrong"]))


def attend_to_padding(graph: onnx.GraphProto) -> None:
    token = constant(graph, "a_token", np.array(1))
    replace_input(graph, "attention_mask", helper.make_node("Max", ["attention_mask", token], ["wrong"]))


def lean_on_neighbours(graph: onnx.GraphProto) -> None:
    """Each row moves by a little towards the mean of the batch: nothing in a batch of one, and never much."""

    def make(sound: str, name: str) -> list[onnx.NodeProto]:
        little = constant(graph, "little", np.array(1.5e-5, np.float32))
        return [
            helper.make_node(
                "ReduceMean", [sound, constant(graph, "batch", np.array([0]))], ["batch_mean"], keepdims=1
            ),
            helper.make_node("Sub", ["batch_mean", sound], ["to_mean"]),
            helper.make_node("Sign", ["to_mean"], ["direction"]),
            helper.make_node("Mul", ["direction", little], ["small_step"]),
            helper.make_node("Add", [sound, "small_step"], [name]),
        ]

    replace_output(graph, make)


# The network


@pytest.mark.parametrize(
    ("graph", "weight"),
    [
        ("vision", "visual_encoder.patch_embed.proj.weight.reshaped.transposed"),
        ("vision", "visual_encoder.blocks.0.attn.qkv.weight.transposed"),
        ("vision", "ln_vision.weight"),
        ("image_query", "Qformer.bert.encoder.layer.0.crossattention.self.key.weight.transposed"),
        ("image_query", "Qformer.bert.encoder.layer.1.output_query.dense.weight.transposed"),
        ("text", "Qformer.bert.encoder.layer.1.intermediate.dense.weight.transposed"),
        ("text", "text_proj.weight"),
        ("itm", "Qformer.bert.encoder.layer.1.crossattention.output.dense.weight.transposed"),
        ("itm", "Qformer.bert.encoder.layer.1.output_query.dense.weight.transposed"),
    ],
)
def test_one_number_among_the_weights_off_by_a_hundredth_is_caught_by_the_difference(
    single, failed_gates, graph, weight
):
    scale_largest_number(single, graph, weight, 1.01)
    failed = failed_gates(single)
    assert f"{graph}: max abs difference" in failed
    assert not any(name.startswith(("tokenizer", "preprocessing", "boxes")) for name in failed)


@pytest.mark.parametrize("graph", ["image_query", "itm"])
def test_a_whole_weight_off_by_a_hundredth_is_caught_where_one_number_of_it_is_not_seen(single, failed_gates, graph):
    """One number of this one moves embeddings by 1e-5 and match logits by as much: less than the limits."""
    weight = "Qformer.bert.encoder.layer.0.crossattention.self.query.weight.transposed"
    with numbers_of(single, graph, weight) as numbers:
        numbers *= np.float32(1.01)
    assert f"{graph}: max abs difference" in failed_gates(single)


def scale_largest_number(folder: Path, graph: str, weight: str, factor: float) -> None:
    with numbers_of(folder, graph, weight) as numbers:
        numbers[np.abs(numbers).argmax()] *= np.float32(factor)


@contextmanager
def numbers_of(folder: Path, graph: str, weight: str) -> Iterator[np.ndarray]:
    """Of a weight in the file of weights, float32, to be changed in place."""
    model = onnx.load_model(folder / "onnx" / f"{graph}.onnx", load_external_data=False)
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == weight)
    assert tensor.data_type == TensorProto.FLOAT
    place = {entry.key: entry.value for entry in tensor.external_data}
    file = folder / "onnx" / place["location"]
    numbers = np.memmap(file, np.float32, "r+", int(place["offset"]), (int(np.prod(tensor.dims)),))
    yield numbers
    numbers.flush()
    rehash(folder, f"onnx/{place['location']}")


@pytest.mark.parametrize("graph", GRAPHS)
def test_two_swapped_heads_are_caught_in_every_graph(folder, failed_gates, graph):
    edit_graph(folder, graph, swap_heads)
    expected = f"{graph}: max abs difference" if graph == "itm" else f"{graph}: 1 - cosine"
    failed = failed_gates(folder)
    assert expected in failed
    assert all(name.startswith(f"{graph}: ") for name in failed)


def test_the_wrong_logit_is_caught_by_the_match_scores(folder, failed_gates):
    edit_graph(folder, "itm", take_the_other_logit)
    assert failed_gates(folder) == ["itm: max abs difference", "itm: effect of boxes, relative difference"]


@pytest.mark.parametrize("fault", [shift_masks, ignore_weights])
@pytest.mark.parametrize("graph", ["image_query", "itm"])
def test_masks_shifted_by_one_patch_and_ignored_weights_are_caught_by_what_boxes_change(
    folder, failed_gates, graph, fault
):
    """In half precision by nothing else: here the whole effect of boxes is smaller than what rounding may cost."""
    edit_graph(folder, graph, fault)
    failed = failed_gates(folder)
    assert f"{graph}: effect of boxes, relative difference" in failed
    assert f"{graph}: 1 - cosine" not in failed, "without boxes nothing has changed"
    assert all(name.startswith(f"{graph}: ") for name in failed)
    if Bundle.open(folder).manifest.precision == "fp32":
        assert f"{graph}: max abs difference" in failed


@pytest.mark.parametrize("graph", ["text", "itm"])
def test_padding_that_is_attended_to_is_caught_in_texts_of_different_lengths(folder, failed_gates, graph):
    edit_graph(folder, graph, attend_to_padding)
    assert ("itm: max abs difference" if graph == "itm" else "text: 1 - cosine") in failed_gates(folder)


@pytest.mark.parametrize("graph", GRAPHS)
def test_a_row_that_leans_on_its_neighbours_is_caught_even_within_the_tolerance(single, failed_gates, graph):
    edit_graph(single, graph, lean_on_neighbours)
    assert failed_gates(single) == [f"{graph}: rows independent of neighbours"]


# What stands around the network


@pytest.mark.parametrize(
    "change",
    [
        {"resample": "bilinear"},
        {"resample": "lanczos"},
        {"mean": [0.5, 0.5, 0.5]},
        {"std": [0.27, 0.26130258, 0.27577711]},
    ],
)
def test_another_resize_filter_or_normalisation_is_caught_by_the_pixels(folder, edit_manifest, failed_gates, change):
    edit_manifest(folder, lambda values: values["preprocessing"].update(change))
    assert failed_gates(folder) == ["preprocessing: max abs difference"]


@pytest.mark.parametrize(
    ("change", "gate"),
    [
        ({"coverage": "binary"}, "boxes: masks, max abs difference"),
        ({"coverage": "dilated"}, "boxes: masks, max abs difference"),
        ({"alpha": 8.08}, "boxes: weights, max abs difference"),
        ({"reduction": "mean"}, "boxes: weights, max abs difference"),
        ({"beta": 0.0, "gamma": 1.0}, "boxes: weights, max abs difference"),
    ],
)
def test_other_box_semantics_are_caught_by_masks_or_weights(folder, edit_manifest, failed_gates, change, gate):
    edit_manifest(folder, lambda values: values["perturbation"].update(change))
    assert failed_gates(folder) == [gate]


def test_two_words_that_change_places_in_the_vocabulary_are_caught_by_the_ids(folder, failed_gates):
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text())
    vocabulary = values["model"]["vocab"]
    vocabulary["man"], vocabulary["dog"] = vocabulary["dog"], vocabulary["man"]
    path.write_text(json.dumps(values))
    rehash(folder, "tokenizer.json")
    assert failed_gates(folder) == ["tokenizer: captions with other ids"]


def test_a_shorter_limit_of_tokens_is_caught_by_the_ids(folder, edit_manifest, failed_gates):
    """Captions would be cut earlier than where PyTorch cut them."""
    edit_manifest(folder, lambda values: values["tokenizer"].update(max_length=8))
    assert "tokenizer: captions with other ids" in failed_gates(folder)
