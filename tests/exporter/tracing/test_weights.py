"""Weights as recipes, on toy graphs."""

import io

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from qpert.exporter.tracing.weights import (
    ALIGNMENT,
    Recipe,
    fold_weights,
    point_to,
    weighted_graph,
    write_weights,
)


class Source:
    """Parameters by name, and how often each was asked for."""

    def __init__(self, **tensors):
        self.tensors, self.asked = tensors, []

    def get(self, name):
        self.asked.append(name)
        return self.tensors[name]


A, B = torch.arange(6.0).reshape(2, 3), torch.arange(6.0).reshape(2, 3) + 10
SOURCE = {"a": A, "b": B}


def model(nodes, outputs, dtype=TensorProto.FLOAT, constants=()):
    """A graph over x [3, 2] and the weights a, b [2, 3]."""
    inputs = [helper.make_tensor_value_info("x", dtype, [3, 2])]
    inputs += [helper.make_tensor_value_info(name, dtype, [2, 3]) for name in ("a", "b")]
    values = [helper.make_tensor_value_info(name, dtype, shape) for name, shape in outputs.items()]
    graph = helper.make_graph(nodes, "toy", inputs, values, list(constants))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def folded(nodes, outputs, **options):
    return fold_weights(weighted_graph(model(nodes, outputs, **options), {"a": "a", "b": "b"}))


def run(weighted, folder, x):
    """Write the weights, and run what comes out in ONNX Runtime."""
    import onnxruntime

    source = Source(**SOURCE)
    with (folder / "w.data").open("wb") as stream:
        stored = write_weights(stream, "w.data", weighted.recipes.values(), source)
    made = gs.export_onnx(weighted.graph)
    point_to(made, weighted.recipes, stored)
    onnx.save_model(made, folder / "w.onnx")
    onnx.checker.check_model(folder / "w.onnx", full_check=True)
    session = onnxruntime.InferenceSession(str(folder / "w.onnx"), providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_inputs()] == ["x"]
    return session.run(None, {"x": x}), source


X = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], np.float32)


def test_a_transposed_weight_becomes_a_recipe_and_the_operator_goes(tmp_path):
    weighted = folded(
        [helper.make_node("Transpose", ["a"], ["t"], perm=[1, 0]), helper.make_node("Add", ["x", "t"], ["y"])],
        {"y": [3, 2]},
    )
    assert [node.op for node in weighted.graph.nodes] == ["Add"]
    (y,), _ = run(weighted, tmp_path, X)
    np.testing.assert_array_equal(y, X + A.numpy().T)


def test_weights_that_are_joined_and_transposed_are_made_when_written(tmp_path):
    nodes = [
        helper.make_node("Concat", ["a", "b"], ["c"], axis=0),  # [4, 3]
        helper.make_node("Transpose", ["c"], ["t"], perm=[1, 0]),  # [3, 4]
        helper.make_node("Transpose", ["x"], ["u"], perm=[1, 0]),
        helper.make_node("MatMul", ["u", "t"], ["y"]),
    ]
    weighted = folded(nodes, {"y": [2, 4]})
    assert [node.op for node in weighted.graph.nodes] == ["Transpose", "MatMul"]
    (y,), source = run(weighted, tmp_path, X)
    np.testing.assert_array_equal(y, X.T @ np.concatenate([A, B]).T)
    assert sorted(source.asked) == ["a", "b"], "a and b themselves are used by nobody"


def test_a_constant_is_joined_with_weights(tmp_path):
    constant = helper.make_tensor("k", TensorProto.FLOAT, [1, 3], [7, 8, 9])
    nodes = [helper.make_node("Concat", ["a", "k"], ["c"], axis=0), helper.make_node("MatMul", ["c", "x"], ["y"])]
    weighted = folded(nodes, {"y": [3, 2]}, constants=[constant])
    assert [node.op for node in weighted.graph.nodes] == ["MatMul"]
    (y,), _ = run(weighted, tmp_path, X)
    np.testing.assert_array_equal(y, np.concatenate([A, [[7, 8, 9]]]) @ X)


def test_two_different_joins_that_begin_alike_stay_different(tmp_path):
    nodes = [
        helper.make_node("Concat", ["a", "b"], ["c"], axis=0),
        helper.make_node("Concat", ["a", "a"], ["d"], axis=0),
        helper.make_node("Concat", ["a", "b"], ["e"], axis=0),
        helper.make_node("MatMul", ["c", "x"], ["y"]),
        helper.make_node("MatMul", ["d", "x"], ["z"]),
        helper.make_node("MatMul", ["e", "x"], ["w"]),
    ]
    weighted = folded(nodes, {"y": [4, 2], "z": [4, 2], "w": [4, 2]})
    (y, z, w), _ = run(weighted, tmp_path, X)
    np.testing.assert_array_equal(y, np.concatenate([A, B]) @ X)
    np.testing.assert_array_equal(z, np.concatenate([A, A]) @ X)
    np.testing.assert_array_equal(w, y)


def test_two_transposes_of_one_weight_stay_different(tmp_path):
    nodes = [
        helper.make_node("Transpose", ["a"], ["t"], perm=[1, 0]),
        helper.make_node("Transpose", ["a"], ["same"], perm=[0, 1]),
        helper.make_node("Add", ["x", "t"], ["y"]),
        helper.make_node("MatMul", ["same", "x"], ["z"]),
    ]
    (y, z), _ = run(folded(nodes, {"y": [3, 2], "z": [2, 2]}), tmp_path, X)
    np.testing.assert_array_equal(y, X + A.numpy().T)
    np.testing.assert_array_equal(z, A.numpy() @ X)


def test_what_depends_on_the_input_is_not_folded(tmp_path):
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=[1, 0]),
        helper.make_node("Concat", ["t", "a"], ["y"], axis=0),
    ]
    weighted = folded(nodes, {"y": [4, 3]})
    assert [node.op for node in weighted.graph.nodes] == ["Transpose", "Concat"]
    assert set(weighted.recipes) == {"a"}
    (y,), _ = run(weighted, tmp_path, X)
    np.testing.assert_array_equal(y, np.concatenate([X.T, A]))


def test_operators_on_constants_alone_are_left_to_others():
    constant = helper.make_tensor("k", TensorProto.FLOAT, [3, 2], range(6))
    nodes = [
        helper.make_node("Concat", ["k", "k"], ["c"], axis=0),
        helper.make_node("MatMul", ["c", "a"], ["m"]),
        helper.make_node("MatMul", ["m", "x"], ["y"]),
    ]
    assert [node.op for node in folded(nodes, {"y": [6, 2]}, constants=[constant]).graph.nodes] == [
        "Concat",
        "MatMul",
        "MatMul",
    ]


def parameter(name, shape=(2, 3), dtype=TensorProto.FLOAT):
    return Recipe("parameter", name, dtype, shape)


def test_equal_recipes_are_written_once_whatever_they_are_called():
    transposed = [
        Recipe("Transpose", name, TensorProto.FLOAT, (3, 2), (parameter("a"),), (("perm", [1, 0]),))
        for name in ("in one graph", "in another")
    ]
    assert transposed[0].key == transposed[1].key
    source, stream = Source(**SOURCE), io.BytesIO()
    stored = write_weights(stream, "w", [*transposed, parameter("a"), parameter("a")], source)
    assert len(stored) == 2
    assert source.asked == ["a", "a"]
    assert sum(place.length for place in stored.values()) == 2 * 24


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 3000)), min_size=1, max_size=6))
def test_every_weight_lies_at_its_aligned_place_and_no_two_overlap(shapes):
    shapes = {f"{name}{count}": count for name, count in shapes}
    source = Source(**{name: torch.arange(count) + float(count) for name, count in shapes.items()})
    stream, written = io.BytesIO(), []
    recipes = [parameter(name, (count,)) for name, count in shapes.items()]
    stored = write_weights(stream, "w", recipes, source, on_bytes=written.append)
    data, end = stream.getvalue(), 0
    for recipe in recipes:
        place = stored[recipe.key]
        assert place.offset % ALIGNMENT == 0
        assert place.offset >= end
        end = place.offset + place.length
        found = np.frombuffer(data, np.float32, place.length // 4, place.offset)
        np.testing.assert_array_equal(found, source.tensors[recipe.name].numpy())
    assert sum(written) == sum(place.length for place in stored.values())


@pytest.mark.parametrize(
    ("dtype", "torch_dtype"), [(TensorProto.FLOAT16, torch.float16), (TensorProto.BFLOAT16, torch.bfloat16)]
)
def test_weights_are_stored_in_the_graphs_precision(dtype, torch_dtype):
    values = torch.tensor([[1.0, 1 / 3], [1e-3, -7.7]])
    stream = io.BytesIO()
    write_weights(stream, "w", [parameter("a", (2, 2), dtype)], Source(a=values))
    found = torch.frombuffer(bytearray(stream.getvalue()), dtype=torch_dtype)
    assert torch.equal(found, values.to(torch_dtype).flatten())


def test_recipes_that_differ_in_anything_have_different_keys():
    recipes = [
        parameter("a"),
        parameter("b"),
        parameter("a", (3, 2)),
        parameter("a", dtype=TensorProto.FLOAT16),
        Recipe("constant", "a", TensorProto.FLOAT, (2, 3), values=bytes(24)),
        Recipe("constant", "a", TensorProto.FLOAT, (2, 3), values=bytes(23) + b"\1"),
        Recipe("Concat", "c", TensorProto.FLOAT, (4, 3), (parameter("a"), parameter("b")), (("axis", 0),)),
        Recipe("Concat", "c", TensorProto.FLOAT, (4, 3), (parameter("b"), parameter("a")), (("axis", 0),)),
    ]
    assert len({recipe.key for recipe in recipes}) == len(recipes)
    assert recipes[-1].parameters() == {"a", "b"}
    assert recipes[4].parameters() == set()
