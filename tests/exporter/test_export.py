"""Bundles as they come out of an export, and what an interrupted export leaves."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from tiny_model import TINY, VOCABULARY, tiny_network, tiny_state

import qpert.exporter.export as module
from qpert.exporter.export import ExportRequest
from qpert.graphs.families.blip2.model import Blip2Retrieval
from qpert.graphs.perturbation.choices import GraphPerturbation
from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.bundle.manifest import read_manifest
from qpert.runtime.errors import InputError, QpertError
from qpert.runtime.retrieval.encoder import Encoder

GRAPHS = ("vision", "image_query", "text", "itm")

HANGING = 900
"""Seconds after which a process counts as hanging, whatever else the machine does; it needs two or three."""


def load(folder, graph):
    return onnx.load_model(folder / "onnx" / f"{graph}.onnx", load_external_data=False)


@pytest.fixture(params=["demo", "tiny both", "tiny fp16", "tiny none"])
def any_bundle(request):
    name = {"demo": "demo_bundle", "tiny both": "tiny_bundle", "tiny fp16": "half_bundle", "tiny none": "stock_export"}
    found = request.getfixturevalue(name[request.param])
    return found if isinstance(found, Path) else found.folder


# What is in a bundle


def test_a_bundle_has_the_files_of_the_contract_and_opens(any_bundle):
    found = {path.relative_to(any_bundle).as_posix() for path in any_bundle.rglob("*") if path.is_file()}
    host_graphs = ("preprocess", "boxes") if read_manifest(any_bundle).query_head.takes_boxes else ("preprocess",)
    exported = {name for name in found if not name.startswith("reports/")}  # other tests' commands report on it
    assert exported == {
        *("manifest.json", "tokenizer.json", "samples.safetensors", "onnx/vision.data", "onnx/qformer.data"),
        *(f"onnx/{graph}.onnx" for graph in GRAPHS),
        *(f"onnx/{graph}.onnx" for graph in host_graphs),
    }
    assert all(state.ok for state in Bundle.open(any_bundle).check_files())


# fmt: off
STANDARD = {
    "Abs", "Add", "And", "Cast", "Clip", "Concat", "Constant", "ConstantOfShape", "Conv", "Div", "Einsum",
    "Equal", "Erf", "Exp", "Expand", "Flatten", "Floor", "Gather", "Gelu", "Gemm", "Greater",
    "GreaterOrEqual", "Identity", "LayerNormalization", "Less", "LessOrEqual", "Log", "MatMul", "Max",
    "Min", "Mod", "Mul", "Neg", "Not", "Or", "Pad", "Pow", "Range", "Reciprocal", "ReduceL2", "ReduceMax",
    "ReduceMean", "ReduceSum", "ReduceSumSquare", "Reshape", "Shape", "Sigmoid", "Sign", "Slice",
    "Softmax", "Split", "Sqrt", "Squeeze", "Sub", "Sum", "Tanh", "Tile", "Transpose", "Trilu", "Unsqueeze",
    "Where",
}
# fmt: on
"""Operators of ONNX itself that TensorRT and ONNX Runtime both have. A new one has to be looked up, then added here."""


def nodes_of(graph):
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from nodes_of(attribute.g)


@pytest.mark.parametrize("graph", GRAPHS)
def test_graphs_hold_only_standard_operators_of_opset_20(any_bundle, graph):
    model = load(any_bundle, graph)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 20)]
    assert len(model.functions) == 0
    used = {(node.domain, node.op_type) for node in nodes_of(model.graph)}
    assert {domain for domain, _ in used} == {""}
    assert {name for _, name in used} <= STANDARD
    assert model.ir_version <= 10, "ONNX Runtime 1.22, the least that is supported, reads IR version 10"


@pytest.mark.parametrize("graph", GRAPHS)
def test_graphs_hold_no_stack_traces_and_no_path_of_this_machine(any_bundle, graph):
    model = load(any_bundle, graph)
    assert model.producer_name == "qpert"
    for thing in (model, model.graph, *model.graph.node, *model.graph.initializer):
        assert not thing.doc_string
        assert not thing.metadata_props
    data = (any_bundle / "onnx" / f"{graph}.onnx").read_bytes()
    for leak in (b".py", b"/usr/", b"/home/", b"/work/", b"/tmp/", b"site-packages", str(Path.cwd()).encode()):
        assert leak not in data


def external(model):
    """Weights in data files: (name, location, offset, length)."""
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            place = {entry.key: entry.value for entry in tensor.external_data}
            yield tensor.name, place["location"], int(place["offset"]), int(place["length"])


def test_weights_that_graphs_share_are_stored_once(demo_bundle):
    places, uses = {}, {}
    for graph in GRAPHS:
        for _, location, offset, length in external(load(demo_bundle, graph)):
            assert (demo_bundle / "onnx" / location).parent == demo_bundle / "onnx"
            assert places.setdefault((location, offset), length) == length
            uses.setdefault((location, offset), set()).add(graph)
    shared = [place for place, graphs in uses.items() if len(graphs) > 1]
    assert len(shared) > 40, "image_query, text and itm have most of the Q-Former in common"
    on_disk = sum(path.stat().st_size for path in (demo_bundle / "onnx").glob("*.data"))
    assert on_disk <= 1.05 * sum(places.values())
    bundle = Bundle.open(demo_bundle)
    from qpert.graphs.families.blip2.config import Blip2Config

    with torch.device("meta"):
        network = Blip2Retrieval(Blip2Config.from_dict(bundle.manifest.architecture))
    assert on_disk <= 1.05 * sum(4 * parameter.numel() for parameter in network.parameters())
    small = sum((demo_bundle / "onnx" / f"{graph}.onnx").stat().st_size for graph in GRAPHS)
    assert small < 0.05 * on_disk, "a weight has been left inside a graph's own file"


def test_a_text_encoder_alone_needs_no_vision_weights(demo_bundle):
    for graph in ("image_query", "text", "itm"):
        assert {location for _, location, _, _ in external(load(demo_bundle, graph))} == {"qformer.data"}
    assert {location for _, location, _, _ in external(load(demo_bundle, "vision"))} == {"vision.data"}


def test_half_precision_weights_take_half_and_layer_norms_stay_float32(tiny_bundle, half_bundle):
    halves = {
        tensor.name: tensor.data_type for graph in GRAPHS for tensor in load(half_bundle, graph).graph.initializer
    }
    norms = {name: kind for name, kind in halves.items() if re.search(r"norm|ln_", name, re.IGNORECASE)}
    assert len(norms) > 10
    assert set(norms.values()) == {onnx.TensorProto.FLOAT}
    matrices = {name: kind for name, kind in halves.items() if "dense" in name or "qkv" in name}
    assert len(matrices) > 5
    assert set(matrices.values()) == {onnx.TensorProto.FLOAT16}
    assert load(half_bundle, "vision").graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT16
    for graph in ("image_query", "text", "itm"):
        assert load(half_bundle, graph).graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT


def test_the_manifest_says_where_everything_came_from(demo_bundle, tiny_bundle, tiny_weights):
    demo, tiny = (Bundle.open(folder).manifest for folder in (demo_bundle, tiny_bundle))
    assert (demo.checkpoint.name, demo.precision, demo.perturbation.stages) == ("demo", "fp32", "itc")
    assert (demo.perturbation.alpha, demo.perturbation.beta, demo.perturbation.gamma) == (8, 1, 0)
    assert demo.perturbation.threshold == 0.95
    assert {axis: r.max for axis, r in demo.graphs["image_query"].ranges.items()} == {"B": 8, "O": 32}
    assert {axis: r.max for axis, r in demo.graphs["text"].ranges.items()} == {"T": 64, "L": 35}
    from qpert.runtime.files import sha256_of

    assert tiny.checkpoint.sha256 == sha256_of(tiny_weights)
    assert {key: value for key, value in tiny.architecture.items() if key != "name"} == {
        key: value for key, value in TINY.to_dict().items() if key != "name"
    }
    assert any("eps" in note for note in tiny.notes), "what was assumed of the checkpoint is recorded"


def test_the_graphs_compute_what_the_network_with_the_eigendecomposition_computes(tiny_bundle):
    """Once more than the exporter's own gate, by hand: a network made here, from the numbers of this file."""
    from tiny_model import THRESHOLD

    network = tiny_network(GraphPerturbation(THRESHOLD))
    rng = np.random.default_rng(4)
    pixels = rng.normal(size=(2, 3, 56, 56)).astype(np.float32)
    masks = np.zeros((2, 2, 17), np.float32)
    masks[:, 0, 1:9], masks[0, 1, [6, 7, 10, 11]] = 1, 0.5
    weights = np.array([[3, 1.5], [-2, 0]], np.float32)
    ids = rng.integers(1, 1024, (2, 3, 8))
    tokens = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    boxes = {"object_masks": masks, "box_weights": weights}
    encoder = Encoder(Bundle.open(tiny_bundle), "cpu")
    features = encoder.sessions["vision"].run({"pixel_values": pixels})["image_embeds"]
    queries = encoder.sessions["image_query"].run({"image_embeds": features} | boxes)["query_embeds"]
    scores = encoder.sessions["itm"].run({"image_embeds": features} | tokens | boxes)["itm_scores"]

    def tensors(arrays):
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    expected = network.encode_image(torch.from_numpy(pixels))
    np.testing.assert_allclose(features, expected.numpy(), rtol=0, atol=1e-4)  # the bound of the contract
    np.testing.assert_allclose(queries, network.encode_queries(expected, **tensors(boxes)), rtol=0, atol=1e-4)
    np.testing.assert_allclose(scores, network.match(expected, **tensors(tokens | boxes)), rtol=0, atol=1e-4)


# Requests


@pytest.mark.parametrize(
    ("checkpoint", "precision", "name"),
    [
        ("demo", "fp32", "qpert-blip2-demo-fp32"),
        ("/a/b/blip2.v1.pth", "fp16", "qpert-blip2-blip2.v1-fp16"),
        ("Salesforce/blip2-itm-vit-g", "fp32", "qpert-blip2-blip2-itm-vit-g-fp32"),
        ("folder/", "bf16", "qpert-blip2-folder-bf16"),
        ("x.safetensors", "fp32", "qpert-blip2-x-fp32"),
    ],
)
def test_the_default_name_tells_checkpoint_and_precision(checkpoint, precision, name):
    assert ExportRequest("blip2", checkpoint, precision=precision).target == Path(name)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"precision": "int8"}, "got precision 'int8', expected one of fp32, fp16, bf16"),
        ({"samples": 1}, "got 1 samples, expected at least 2"),
        ({"image_size": 0}, "got image size 0"),
        ({"out": Path(__file__)}, r"test_export\.py exists; pass --force"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused_before_any_work(fields, message):
    with pytest.raises(InputError, match=message):
        ExportRequest("blip2", "demo", **fields).check()


# Interruptions. `export_again` leaves the tracing out, so each of these takes a second.

MOMENTS = ("open_with_progress", "check_graph", "write_graphs", "hash_files")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def stop_at(patch, moment, stop):
    """Let `stop` happen when the step of that name has been done."""
    real = getattr(module, moment)

    def step(*arguments, **options):
        result = real(*arguments, **options)
        stop()
        return result

    patch.setattr(module, moment, step)


@pytest.mark.parametrize("moment", MOMENTS)
def test_ctrl_c_at_any_moment_leaves_nothing(export_again, tmp_path, moment):
    def interrupt():
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, moment, interrupt)
        with pytest.raises(KeyboardInterrupt):
            export_again(tmp_path / "b")
    assert names(tmp_path) == []


def export_and_die(export_again, target, moment):
    """Runs in a forked child; one thread, because the parent's thread pools did not come along."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, moment, lambda: os.kill(os.getpid(), signal.SIGKILL))
        export_again(target)


def opens(folder):
    try:
        Bundle.open(folder)
    except QpertError:
        return False
    return True


@pytest.mark.parametrize("moment", ["write_graphs", "hash_files"])
def test_a_killed_export_leaves_nothing_that_opens_and_the_next_one_cleans_up(export_again, tmp_path, moment):
    child = multiprocessing.get_context("fork").Process(
        target=export_and_die, args=(export_again, tmp_path / "b", moment)
    )
    child.start()
    child.join(HANGING)
    if child.is_alive():
        child.kill()
    assert child.exitcode == -signal.SIGKILL
    assert names(tmp_path) == [f".b.partial-{child.pid}"]
    assert not opens(tmp_path / f".b.partial-{child.pid}")
    assert opens(export_again(tmp_path / "b"))
    assert names(tmp_path) == ["b"]


def test_a_kill_from_outside_in_the_middle_of_tracing_leaves_nothing_that_opens(tiny_weights, tmp_path):
    program = [sys.executable, "-c", "from qpert.runtime.cli import main; main()", "export", "blip2"]
    program += ["--checkpoint", str(tiny_weights), "--tokenizer", str(VOCABULARY), "--vision-heads", "2"]
    program += ["--qformer-heads", "2", "--max-length", "12", "--out", str(tmp_path / "b")]
    process = subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + HANGING
        while not list(tmp_path.glob(".b.partial-*/tokenizer.json")):
            assert process.poll() is None, process.stderr.read().decode()
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.kill()
        process.communicate()
    assert names(tmp_path) == [f".b.partial-{process.pid}"]
    assert not opens(tmp_path / f".b.partial-{process.pid}")


def test_force_replaces_a_bundle_and_without_it_nothing_happens(export_again, tiny_bundle, copy_of):
    folder = copy_of(tiny_bundle)
    (folder / "reports").mkdir()
    (folder / "reports" / "old.html").write_text("old")
    with pytest.raises(InputError, match="exists; pass --force"):
        export_again(folder)
    assert (folder / "reports" / "old.html").exists()
    export_again(folder, force=True)
    assert not (folder / "reports").exists()
    assert opens(folder)


def test_two_exports_of_one_checkpoint_are_the_same_but_for_the_time(export_again, tiny_bundle, tmp_path):
    again = export_again(tmp_path / "b")
    first, second = (json.loads((folder / "manifest.json").read_text()) for folder in (tiny_bundle, again))
    assert first.pop("created")
    assert second.pop("created")
    assert first == second


def test_a_graph_that_does_not_come_out_as_declared_makes_no_bundle(export_again, tmp_path, monkeypatch):
    from qpert.exporter.tracing.onnx_files import GraphError

    def write(folder, *others):
        real(folder, *others)
        model = onnx.load_model(folder / "text.onnx", load_external_data=False)
        model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 99
        onnx.save_model(model, folder / "text.onnx")

    real = module.write_graphs
    monkeypatch.setattr(module, "write_graphs", write)
    with pytest.raises((GraphError, onnx.checker.ValidationError, onnx.shape_inference.InferenceError)):
        export_again(tmp_path / "b")
    assert names(tmp_path) == []


def test_the_tiny_checkpoint_is_what_was_exported(tiny_bundle):
    """The numbers in the data file are the checkpoint's."""
    state = tiny_state()
    for name, location, offset, length in external(load(tiny_bundle, "text")):
        if name in state:
            found = np.fromfile(tiny_bundle / "onnx" / location, np.float32, length // 4, offset=offset)
            np.testing.assert_array_equal(found, state[name].numpy().ravel())
