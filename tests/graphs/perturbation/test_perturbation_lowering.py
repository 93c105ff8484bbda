"""The lowering in ONNX Runtime against the float64 eigendecomposition, over the battery of `spectra`.

The product of every step is exact to float32 only, and so is C. `ADMITTED` says which cuts float32 can be asked for.
"""

from __future__ import annotations

import functools

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime
import pytest
import torch
from lowered import lowered_model, toy_graph
from spectra import SPECTRA, close_pairs, identical_eigenvalues, power_law, ratio_near, with_spectrum

from qpert.graphs.perturbation.lowering import lower_query_map
from qpert.graphs.perturbation.oracle import KeySubspaces, key_subspaces, query_map
from qpert.graphs.perturbation.purification import PRODUCTS

THRESHOLDS = (0.85, 0.9, 0.95, 0.99)
WIDE = ((96, 8, 0.9), (96, 8, 0.99), (128, 8, 0.95), (200, 4, 0.95))
"""Heads of CoCa L/14 and of InternVL: head dimension, matrices of each spectrum, τ."""
STANDARD_OPERATORS = (
    {"Abs", "Add", "And", "Clip", "Concat", "Div", "Exp", "GreaterOrEqual", "Less", "MatMul", "Max", "Min", "Mul"}
    | {"Neg", "Not", "Or", "ReduceSum", "Reshape", "Shape", "Slice", "Split", "Sqrt", "Sub", "Transpose"}
    | {"Unsqueeze", "Where"}
)  # fmt: skip

ADMITTED = 1e-5
"""Least |c − τ| at the cut, and least gap (λ_p − λ_{p+1}) / λ_1, for which the oracle's rank is asked. C is computed in
float32: its entries are wrong by some 1e-7 λ_1, and its cumulative ratios by as much, so nothing that is computed from
it can tell eigenvectors or ratios apart that are closer."""


@functools.cache
def session(head_dimension: int, threshold: float) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    model = lowered_model(head_dimension, threshold).SerializeToString()
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def lowered(keys: np.ndarray, masks: np.ndarray, weights: np.ndarray, threshold: float) -> np.ndarray:
    feed = {"keys": keys, "object_masks": masks, "box_weights": weights}
    feed = {name: value.astype(np.float32) for name, value in feed.items()}
    return session(keys.shape[-1], threshold).run(None, feed)[0]


def projectors(keys: np.ndarray, threshold: float) -> np.ndarray:
    """P of each of [count, N, d] under one box over everything: M − I with weight 1."""
    masks, weights = np.ones((1, 1, keys.shape[1])), np.ones((1, 1))
    return lowered(keys[None, None], masks, weights, threshold)[0, 0].astype(np.float64) - np.eye(keys.shape[-1])


def oracle(keys: np.ndarray, threshold: float) -> KeySubspaces:
    return key_subspaces(torch.from_numpy(keys)[None, None], torch.ones(1, 1, keys.shape[1]), threshold=threshold)


def errors(found: np.ndarray, expected: KeySubspaces) -> np.ndarray:
    return np.linalg.norm(found - expected.projectors[0, 0, 0].numpy(), axis=(-2, -1))


def assert_finite_and_symmetric(found: np.ndarray) -> None:
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(found, found.swapaxes(-1, -2))


def assert_projector(found: np.ndarray) -> None:
    assert_finite_and_symmetric(found)
    np.testing.assert_allclose(found @ found, found, atol=1e-4)


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize(
    ("head_dimension", "count", "threshold"),
    [*((64, 16, threshold) for threshold in THRESHOLDS), (32, 16, 0.95), (16, 16, 0.9), (16, 16, 0.99), *WIDE],
)
def test_every_spectrum_gives_the_projector_of_the_eigendecomposition(name, threshold, head_dimension, count):
    rng = np.random.default_rng([7, list(SPECTRA).index(name), int(100 * threshold), head_dimension])
    keys = SPECTRA[name](rng, count, head_dimension)
    found, expected = projectors(keys, threshold), oracle(keys, threshold)
    assert_projector(found)
    admitted = ((expected.margins > ADMITTED) & (expected.gaps > ADMITTED))[0, 0, 0].numpy()
    assert (np.trace(found, axis1=-2, axis2=-1)[admitted].round() == expected.ranks[0, 0, 0].numpy()[admitted]).all()
    assert (errors(found, expected)[admitted] < 1e-3).all()


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("head_dimension", [16, 64, 96, 200])
def test_ratios_close_to_the_threshold_are_decided(head_dimension, rank):
    """Down to 3e-5 from τ: then X is steered by one direction of which only a little is left, or missing."""
    count = 1000 if head_dimension <= 64 else 100
    keys = ratio_near(np.random.default_rng([11, head_dimension, rank]), count, head_dimension, 0.95, rank=rank)
    found, expected = projectors(keys, 0.95), oracle(keys, 0.95)
    assert_projector(found)
    assert expected.gaps.min() > ADMITTED
    assert errors(found, expected).max() < 1e-3


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_cuts_between_close_eigenvalues_are_found(threshold):
    """Pairs 1e-5 to 1e-2 of λ_1 apart. Ranks are asked down to 1e-5; the error of 1e-3 only from gaps of 1e-3 on.

    By perturbation theory an error ε λ_1 in C, or in a step, turns the vectors at the cut by ε / gap. The next test
    works a case in which C alone does that; 34 steps in float32 add to it.
    """
    keys = close_pairs(np.random.default_rng([8, int(100 * threshold)]), 40, 64)
    found, expected = projectors(keys, threshold), oracle(keys, threshold)
    assert_finite_and_symmetric(found)
    margins, gaps, ranks = (x[0, 0, 0].numpy() for x in (expected.margins, expected.gaps, expected.ranks))
    admitted = (margins > ADMITTED) & (gaps > ADMITTED)
    assert (np.trace(found, axis1=-2, axis2=-1)[admitted].round() == ranks[admitted]).all()
    assert (errors(found, expected)[admitted] < np.maximum(1e-3, 3e-6 / gaps[admitted])).all()


def test_float32_gram_matrices_cannot_resolve_gaps_of_1e_5():
    """Eigenvalues from 1 down to 0.75 but for λ_40 − λ_41 = 1.1e-5 λ_1; the cut lies there. An exact eigendecomposition
    of the float32 C, which every lowering starts from, misses the projector of the same keys by more than 1e-3."""
    d, p = 64, 40
    eigenvalues = np.linspace(1, 0.75, d)
    eigenvalues[p] = eigenvalues[p - 1] - 1.1e-5
    keys = with_spectrum(np.random.default_rng(0), np.repeat(eigenvalues[None], 20, 0), 256)
    exact = keys.astype(np.float64)
    single, double = (
        np.linalg.eigh(C.astype(np.float64))[1][..., ::-1][..., :p]
        for C in (keys.swapaxes(-1, -2) @ keys, exact.swapaxes(-1, -2) @ exact)
    )
    missed = np.linalg.norm(single @ single.swapaxes(-1, -2) - double @ double.swapaxes(-1, -2), axis=(-2, -1))
    assert missed.max() > 1e-3


@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("head_dimension", [16, 64])
def test_identical_eigenvalues_are_kept_in_part(threshold, head_dimension):
    """C = c I: no choice of directions is right, so none is made. Nothing leaves [0, 1] by more than a hundredth."""
    keys = identical_eigenvalues(np.random.default_rng(9), 8, head_dimension)
    found = projectors(keys, threshold)
    assert_finite_and_symmetric(found)
    eigenvalues = np.linalg.eigvalsh(found)
    assert eigenvalues.min() > -1e-2
    assert eigenvalues.max() < 1 + 1e-2


def test_only_standard_operators_remain_and_the_model_is_valid():
    model = lowered_model(64, 0.95)
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} == {""}
    assert {node.op_type for node in model.graph.node} <= STANDARD_OPERATORS
    assert [entry.version for entry in model.opset_import if entry.domain == ""] == [20]


@pytest.mark.parametrize("heads", [("A", "H"), (6, 12)])
def test_the_size_of_every_matrix_is_known(heads):
    """Else ONNX Runtime reuses no memory, and takes long to find that out."""
    inferred = onnx.shape_inference.infer_shapes(lowered_model(64, 0.95, heads))
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in inferred.graph.value_info
    }
    products = [node.output[0] for node in inferred.graph.node if node.op_type == "MatMul" and "steered" in node.name]
    assert len(products) > 24
    for name in products:
        assert shapes[name][0] == "B", name
        assert shapes[name][3] == "O", name
        assert shapes[name][4:] in ([64, 64], [1, 1]), name


def test_the_number_of_matrix_products_is_the_stated_one():
    """Traces are products too, but of a row and a column: their names say `dot`."""
    products = [node for node in lowered_model(64, 0.95).graph.node if node.op_type == "MatMul"]
    assert len([node for node in products if "/dot/" not in node.name]) == PRODUCTS + 1 == 41  # and one for C


def test_added_names_start_with_the_prefix_and_the_threshold_has_its_own():
    graph = gs.import_onnx(lowered_model(64, 0.95))
    given = {"keys", "object_masks", "box_weights", "query_map"}
    names = {node.name for node in graph.nodes} | (set(graph.tensors()) - given)
    assert all(name.startswith("query_map/") for name in names)
    threshold = graph.tensors()["query_map/threshold"]
    assert isinstance(threshold, gs.Constant)
    assert threshold.values == np.float32(0.95)


def test_overwriting_the_threshold_changes_the_cut():
    keys = power_law(np.random.default_rng(1), 6, 64)
    model = onnx.ModelProto()
    model.CopyFrom(lowered_model(64, 0.85))
    (initializer,) = [each for each in model.graph.initializer if each.name == "query_map/threshold"]
    initializer.CopyFrom(onnx.numpy_helper.from_array(np.array(0.99, np.float32), initializer.name))
    changed = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    masks, weights = np.ones((1, 1, keys.shape[1]), np.float32), np.ones((1, 1), np.float32)
    feed = {"keys": keys[None, None], "object_masks": masks, "box_weights": weights}
    np.testing.assert_array_equal(
        changed.run(None, feed)[0][0, 0].astype(np.float64) - np.eye(64), projectors(keys, 0.99)
    )


def test_two_nodes_are_lowered_side_by_side():
    first, second = toy_graph(16, 0.85), toy_graph(16, 0.99)
    for tensor in [*second.tensors().values()]:
        tensor.name += "_2"
    both = gs.Graph(first.nodes + second.nodes, first.inputs + second.inputs, first.outputs + second.outputs, opset=20)
    model = gs.export_onnx(lower_query_map(both))
    model.ir_version = 10
    onnx.checker.check_model(model, full_check=True)
    keys = power_law(np.random.default_rng(2), 3, 16)[None, None]
    feed = {"keys": keys, "object_masks": np.ones((1, 1, 96), np.float32), "box_weights": np.ones((1, 1), np.float32)}
    feed |= {f"{name}_2": value for name, value in feed.items()}
    results = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(
        None, feed
    )
    for result, threshold in zip(results, (0.85, 0.99), strict=True):
        np.testing.assert_array_equal(result[0, 0].astype(np.float64) - np.eye(16), projectors(keys[0, 0], threshold))


def test_a_head_dimension_that_is_not_a_number_is_refused():
    graph = toy_graph(16, 0.9)
    graph.inputs[0].shape[-1] = graph.outputs[0].shape[-1] = "d"
    with pytest.raises(ValueError, match="fixed last dimension"):
        lower_query_map(graph)


@pytest.fixture(scope="module")
def images() -> dict[str, np.ndarray]:
    """Two images, two layers, two heads, 40 tokens."""
    keys = power_law(np.random.default_rng(3), 8, 64, 40).reshape(2, 2, 2, 40, 64)
    return {"keys": keys}


def boxes(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Fractional masks without CLS, and weights of either sign."""
    masks = rng.uniform(size=(2, count, 40)) * (rng.uniform(size=(2, count, 40)) < 0.5)
    masks[..., 0] = 0
    return masks.astype(np.float32), rng.uniform(-2, 8, (2, count)).astype(np.float32)


@pytest.mark.parametrize("count", [1, 8, 32])
def test_boxes_add_up_as_in_the_oracle(images, count):
    masks, weights = boxes(np.random.default_rng(count), count)
    subspaces = key_subspaces(torch.from_numpy(images["keys"]), torch.from_numpy(masks), threshold=0.95)
    assert min(subspaces.margins.min(), subspaces.gaps.min()) > ADMITTED  # else the sum could not be compared
    expected = np.eye(64) + np.einsum("bo,boahij->bahij", weights, subspaces.projectors.numpy())
    found = lowered(images["keys"], masks, weights, 0.95)
    # Each box may contribute its weight times its own error, 1e-3 at most.
    np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(weights).sum(1).max())


@pytest.mark.parametrize(("layers", "heads", "parts"), [(4, 12, 2), (5, 12, 3), (6, 12, 3), (6, 4, 1)])
def test_layers_beyond_24_heads_are_computed_in_parts_and_come_out_in_order(layers, heads, parts):
    model = lowered_model(16, 0.9, (layers, heads))
    scopes = {node.name.split("/")[1] for node in model.graph.node if "/steered_00/" in node.name}
    assert scopes == {f"part_{number}" for number in range(parts)}
    keys = power_law(np.random.default_rng(10), 2 * layers * heads, 16, 40).reshape(2, layers, heads, 40, 16)
    masks, weights = boxes(np.random.default_rng(11), 3)
    in_parts = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found = in_parts.run(None, {"keys": keys, "object_masks": masks, "box_weights": weights})[0]
    # The same numbers go through the same operators; a library may add up shorter tensors in another order.
    np.testing.assert_allclose(found, lowered(keys, masks, weights, 0.9), atol=1e-4)
    none = {"keys": keys, "object_masks": masks[:, :0], "box_weights": weights[:, :0]}
    assert np.array_equal(in_parts.run(None, none)[0], np.broadcast_to(np.eye(16, dtype=np.float32), found.shape))


@pytest.mark.parametrize(("heads", "stacks"), [(24, 0), (12, 3)])
def test_layers_that_were_stacked_are_taken_as_they_were(heads, stacks):
    """As in BLIP-2's graphs: the keys of six layers in one Concat, of which nothing is left."""
    layers = [gs.Variable(f"keys_{i}", np.float32, ["B", 1, heads, "N", 16]) for i in range(6)]
    graph = toy_graph(16, 0.9, (6, heads))
    keys, *others = graph.inputs
    graph.nodes.append(gs.Node("Concat", "stack", {"axis": 1}, layers, [keys]))
    graph.inputs = [*layers, *others]
    model = gs.export_onnx(lower_query_map(graph))
    model.ir_version = 10
    names = {layer.name for layer in layers}
    assert sum(node.op_type == "Concat" and names >= set(node.input) for node in model.graph.node) == stacks
    assert not any(node.op_type == "Split" for node in model.graph.node)
    values = power_law(np.random.default_rng(10), 2 * 6 * heads, 16, 40).reshape(2, 6, heads, 40, 16)
    masks, weights = boxes(np.random.default_rng(11), 3)
    feed = {f"keys_{i}": values[:, i : i + 1] for i in range(6)} | {"object_masks": masks, "box_weights": weights}
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    # The same numbers go through the same operators; a library may add up shorter tensors in another order.
    np.testing.assert_allclose(session.run(None, feed)[0], lowered(values, masks, weights, 0.9), atol=1e-4)


@pytest.mark.parametrize("count", [0, 1, 8])
def test_no_boxes_or_zero_weights_give_exactly_the_identity(images, count):
    masks, weights = boxes(np.random.default_rng(count), count)
    found = lowered(images["keys"], masks, weights * 0, 0.95)
    assert np.array_equal(found, np.broadcast_to(np.eye(64, dtype=np.float32), (2, 2, 2, 64, 64)))
    queries = np.random.default_rng(0).standard_normal((2, 2, 2, 32, 64)).astype(np.float32)
    assert np.array_equal(queries @ found, queries)


def test_an_empty_mask_adds_nothing(images):
    masks, weights = boxes(np.random.default_rng(4), 3)
    kept = lowered(images["keys"], masks[:, :2], weights[:, :2], 0.95)
    masks[:, 2] = 0
    np.testing.assert_array_equal(lowered(images["keys"], masks, weights, 0.95), kept)


def test_padding_boxes_change_nothing(images):
    """The first image has three boxes, the second one; its padding rows have weight 0, whatever their mask."""
    masks, weights = boxes(np.random.default_rng(5), 3)
    weights[1, 1:] = 0
    padded = lowered(images["keys"], masks, weights, 0.95)
    alone = lowered(images["keys"][1:], masks[1:, :1], weights[1:, :1], 0.95)
    np.testing.assert_allclose(padded[1:], alone, atol=1e-6)


def test_a_box_over_the_whole_image_is_the_subspace_of_all_keys(images):
    masks = np.ones((2, 1, 40), np.float32)
    found = lowered(images["keys"], masks, np.ones((2, 1)), 0.9)
    expected = query_map(*(torch.from_numpy(x) for x in (images["keys"], masks, np.ones((2, 1)))), threshold=0.9)
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_keys_that_are_not_finite_reach_no_other_box():
    keys = power_law(np.random.default_rng(6), 2, 16)[None, None].copy()
    keys[0, 0, 0, 3] = np.inf
    masks = np.ones((1, 1, 96), np.float32)
    found = lowered(keys, masks, np.ones((1, 1)), 0.9)
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(found[0, 0, 0], np.eye(16))
