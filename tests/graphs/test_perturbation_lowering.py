"""The lowering in ONNX Runtime against the `eigh` oracle, over the battery of spectra.

Where the definition itself is undecided in float32, nothing can be asserted but sanity. The Gram matrix is computed in
float32, with an error of about 1e-7 of its largest eigenvalue; so

- a cut whose cumulative ratio lies within 1e-5 of the threshold is a tie (rank undefined);
- a cut whose two eigenvalues lie within 1e-4 of the largest one has eigenvectors with an error of 1e-7 / 1e-4 = 1e-3.

Elsewhere the rank must be the oracle's. The projector's error limit is 1e-3, or NOISE / resolution where that is more:
the pivot of the method hovers at a distance of `resolution` from 0 and 1, and rounding mixes it with its neighbours in
inverse proportion (see the module's text).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime
import pytest
import torch

from qpert.graphs.perturbation.lowering import lower_query_map
from qpert.graphs.perturbation.oracle import key_subspaces, query_map
from qpert.graphs.perturbation.placeholder import DOMAIN, OPERATOR

sys.path.insert(0, str(Path(__file__).parent))
from spectra import SPECTRA

STANDARD_OPERATORS = {
    *("Add", "Div", "Less", "MatMul", "Max", "Mul", "Or", "ReduceSum", "Sqrt", "Sub", "Transpose", "Unsqueeze", "Where")
}
THRESHOLDS = (0.85, 0.9, 0.95, 0.99)
COUNT = 24  # matrices a spectrum and threshold
TIE, LEAST_GAP, NOISE = 1e-5, 1e-4, 3e-5
UNRESOLVED = {"nearly equal eigenvalues", "close pairs"}
"""Neighbours within 1 % of each other: 24 adaptive steps separate by 1.24^24 = 170 ×, which is not enough for these."""


def lowered_model(head_dim: int, threshold: float) -> onnx.ModelProto:
    keys = gs.Variable("keys", np.float32, ["B", "A", "H", "N", head_dim])
    masks = gs.Variable("object_masks", np.float32, ["B", "O", "N"])
    weights = gs.Variable("box_weights", np.float32, ["B", "O"])
    output = gs.Variable("query_map", np.float32, ["B", "A", "H", head_dim, head_dim])
    node = gs.Node(OPERATOR, "map", {"threshold": threshold}, [keys, masks, weights], [output], domain=DOMAIN)
    graph = gs.Graph([node], [keys, masks, weights], [output], opset=20)
    model = gs.export_onnx(lower_query_map(graph).cleanup().toposort())
    model.ir_version = 10
    return model


@pytest.fixture(scope="module")
def run() -> Iterator:
    sessions: dict[tuple[int, float], onnxruntime.InferenceSession] = {}

    def run_lowered(keys, masks, weights, threshold):
        key = (keys.shape[-1], threshold)
        if key not in sessions:
            sessions[key] = onnxruntime.InferenceSession(
                lowered_model(*key).SerializeToString(), providers=["CPUExecutionProvider"]
            )
        (name,) = (output.name for output in sessions[key].get_outputs())
        inputs = {"keys": keys, "object_masks": masks, "box_weights": weights}
        return sessions[key].run([name], {name: array.astype(np.float32) for name, array in inputs.items()})[0]

    yield run_lowered
    sessions.clear()


def assert_projectors(
    found: np.ndarray, keys: np.ndarray, masks: np.ndarray, threshold: float, *, resolved=True
) -> int:
    """`found` [H, d, d] of one image, one layer, one box against the oracle; returns how many were decided."""
    cut = key_subspaces(torch.from_numpy(keys), torch.from_numpy(masks), threshold=threshold)
    expected = cut.projectors[0, 0, 0].numpy()
    ranks, margins, gaps = (value[0, 0, 0].numpy() for value in (cut.ranks, cut.margins, cut.gaps))
    assert np.isfinite(found).all()
    assert np.abs(found - found.swapaxes(-1, -2)).max() < 1e-4
    if not resolved:
        assert np.linalg.eigvalsh(found.astype(np.float64)).min() > -0.1
        assert np.linalg.eigvalsh(found.astype(np.float64)).max() < 1.1
        return 0
    decided = (margins > TIE) & (gaps > LEAST_GAP)
    traces = np.trace(found, axis1=-2, axis2=-1)
    np.testing.assert_array_equal(np.rint(traces)[decided], ranks[decided])
    gram = np.einsum(
        "hnd,hne->hde", (keys[0, 0] * masks[0, 0][:, None]).astype(np.float64), keys[0, 0] * masks[0, 0][:, None]
    )
    eigenvalues = np.clip(np.linalg.eigvalsh(gram)[:, ::-1], 0, None)
    after = np.take_along_axis(np.pad(eigenvalues, ((0, 0), (0, 1))), ranks[:, None], 1)[:, 0]
    share = after / np.maximum(eigenvalues.sum(1), 1e-300)
    resolution = np.minimum(np.minimum(margins, 1) / np.maximum(share, 1e-12), np.minimum(gaps, 1))
    limit = np.maximum(1e-3, NOISE / np.maximum(resolution, 1e-12))
    error = np.linalg.norm(found - expected, axis=(-2, -1))
    assert (error < limit)[decided].all(), (error / limit)[decided].max()
    idempotent = np.abs(found @ found - found).max(axis=(-2, -1))
    assert idempotent[decided].max(initial=0) < 1e-4
    return int(decided.sum())


@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("head_dim", [64, 16])
def test_projectors_of_every_spectrum_are_the_oracles(run, spectrum: str, threshold: float, head_dim: int):
    rng = np.random.default_rng([head_dim, *spectrum.encode(), round(100 * threshold)])
    keys = SPECTRA[spectrum](rng, COUNT, head_dim)[None, None]  # [1, 1, H, N, d]
    masks = np.ones((1, 1, keys.shape[3]), np.float32)
    found = run(keys, masks, np.ones((1, 1)), threshold)[0, 0] - np.eye(head_dim, dtype=np.float32)
    decided = assert_projectors(found, keys, masks, threshold, resolved=spectrum not in UNRESOLVED)
    if spectrum in ("power law", "steep, falling by a million", "dominant mean direction", "one key", "rank three"):
        assert decided >= COUNT // 4, "a battery in which everything is excluded would show nothing"


@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize(("head_dim", "tokens"), [(64, 8), (64, 30), (64, 300), (24, 16), (16, 26), (32, 50)])
def test_fractional_masks_give_the_oracles_projectors(run, head_dim: int, tokens: int, threshold: float):
    rng = np.random.default_rng([head_dim, tokens, round(100 * threshold)])
    keys = rng.standard_normal((1, 1, 48, tokens, head_dim)) + 1.5 * rng.standard_normal((1, 1, 48, 1, head_dim))
    masks = rng.uniform(0, 1, (1, 1, tokens)) * (rng.uniform(0, 1, (1, 1, tokens)) > 0.3)
    keys, masks = keys.astype(np.float32), masks.astype(np.float32)
    found = run(keys, masks, np.ones((1, 1)), threshold)[0, 0] - np.eye(head_dim, dtype=np.float32)
    assert assert_projectors(found, keys, masks, threshold) > 10


@pytest.mark.parametrize("boxes", [1, 8, 32])
def test_the_map_sums_weighted_projectors_over_boxes_padding_included(run, boxes: int):
    rng = np.random.default_rng(boxes)
    keys = rng.standard_normal((2, 2, 3, 40, 32)).astype(np.float32) * np.linspace(3, 0.2, 32, dtype=np.float32)
    masks = (rng.uniform(0, 1, (2, boxes, 40)) > 0.5).astype(np.float32)
    weights = rng.uniform(-3, 8, (2, boxes)).astype(np.float32)
    masks[1, boxes // 2 :], weights[1, boxes // 2 :] = 0, 0  # the second image has fewer boxes
    cut = key_subspaces(torch.from_numpy(keys), torch.from_numpy(masks), threshold=0.9)
    undecided = torch.minimum(cut.margins, cut.gaps).flatten(2).amin(-1) < 2e-4  # ties are tested elsewhere
    weights[undecided.numpy()] = 0
    expected = query_map(*(torch.from_numpy(a) for a in (keys, masks, weights)), threshold=0.9).numpy()
    found = run(keys, masks, weights, 0.9)
    # Each projector within 1e-3, weights up to 8: the bound of the sum; measured 1e-4.
    assert np.abs(found - expected).max() < 1e-3 * max(1, np.abs(weights).sum(1).max())
    assert np.abs(expected - np.eye(32)).max() > 0.5


def test_no_boxes_give_exactly_the_identity(run):
    keys = np.random.default_rng(0).standard_normal((3, 2, 2, 20, 16))
    found = run(keys, np.zeros((3, 0, 20)), np.zeros((3, 0)), 0.95)
    np.testing.assert_array_equal(found, np.broadcast_to(np.eye(16, dtype=np.float32), found.shape))


def test_zero_weights_give_exactly_the_identity(run):
    rng = np.random.default_rng(0)
    found = run(rng.standard_normal((1, 2, 2, 20, 16)), rng.uniform(0, 1, (1, 5, 20)), np.zeros((1, 5)), 0.95)
    np.testing.assert_array_equal(found, np.broadcast_to(np.eye(16, dtype=np.float32), found.shape))


@pytest.mark.parametrize("what", ["mask", "keys"])
def test_an_empty_subspace_gives_exactly_the_identity(run, what: str):
    keys, masks = np.ones((1, 1, 2, 20, 16)), np.ones((1, 1, 20))
    (masks if what == "mask" else keys)[:] = 0
    np.testing.assert_array_equal(run(keys, masks, np.full((1, 1), 8.0), 0.95)[0, 0, 0], np.eye(16, dtype=np.float32))


def test_one_key_gives_the_projector_onto_it(run):
    key = np.random.default_rng(3).standard_normal(32)
    keys = np.zeros((1, 1, 1, 4, 32))
    keys[..., 1, :] = key
    found = run(keys, np.ones((1, 1, 4)), np.ones((1, 1)), 0.95)[0, 0, 0] - np.eye(32)
    np.testing.assert_allclose(found, np.outer(key, key) / (key @ key), atol=1e-5)


def test_a_box_over_the_whole_image_and_a_single_token_both_work(run):
    rng = np.random.default_rng(9)
    keys = (rng.standard_normal((1, 1, 8, 257, 64)) * np.linspace(2, 0.1, 64)).astype(np.float32)
    for masks in (np.ones((1, 1, 257), np.float32), np.eye(257, dtype=np.float32)[None, 100:101]):
        found = run(keys, masks, np.ones((1, 1)), 0.95)[0, 0] - np.eye(64, dtype=np.float32)
        assert assert_projectors(found, keys, masks, 0.95) > 0


def test_the_graph_holds_standard_operators_only_and_passes_the_checker():
    model = lowered_model(64, 0.95)
    assert {node.op_type for node in model.graph.node} <= STANDARD_OPERATORS
    assert {node.domain for node in model.graph.node} == {""}
    assert [(opset.domain, opset.version) for opset in model.opset_import if opset.domain == ""] == [("", 20)]
    onnx.checker.check_model(model, full_check=True)


def test_the_threshold_is_a_named_constant_that_can_be_changed():
    model = lowered_model(64, 0.85)
    (threshold,) = (tensor for tensor in model.graph.initializer if tensor.name == "query_map/threshold")
    assert onnx.numpy_helper.to_array(threshold) == np.float32(0.85)


def test_a_graph_without_the_placeholder_is_left_alone():
    x, y = gs.Variable("x", np.float32, [2]), gs.Variable("y", np.float32, [2])
    graph = lower_query_map(gs.Graph([gs.Node("Neg", inputs=[x], outputs=[y])], [x], [y], opset=20))
    assert [node.op for node in graph.nodes] == ["Neg"]
