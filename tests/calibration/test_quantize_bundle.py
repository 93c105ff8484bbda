"""`qpert quantize` on the demonstration: what it writes, and that it still ranks; what a failing gate leaves."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest
from evaluation_sets import write_set
from onnx import numpy_helper

from qpert.calibration.quantization.build import quantize_bundle
from qpert.calibration.quantization.data import demo_split
from qpert.calibration.quantization.gate import AccuracyError, measure
from qpert.calibration.quantization.request import QuantizeRequest
from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.cli import run
from qpert.runtime.inputs.images import load_image
from qpert.runtime.inputs.perturbation import Perturbation
from qpert.runtime.progress import Silent
from qpert.runtime.retrieval.encoder import Encoder
from qpert.runtime.verification import verify_tensors

pytestmark = pytest.mark.slow

GRAPHS = ("vision", "image_query", "text", "itm")


@pytest.fixture(scope="module")
def request_of(demo_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> QuantizeRequest:
    """16 images, of which every caption is 1.25 points: limits on recall would be limits on luck."""
    out = tmp_path_factory.mktemp("int8") / "bundle"
    return QuantizeRequest(
        demo_bundle, out, samples=16, limit=16, graphs=GRAPHS, sensitivity=False, max_drop=5.0, min_agreement=80.0
    )


@pytest.fixture(scope="module")
def int8_bundle(request_of: QuantizeRequest) -> Bundle:
    return quantize_bundle(request_of)


@pytest.fixture(scope="module")
def tensorrt_bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("tensorrt") / "bundle"
    data = write_set(out.parent / "set", 16, split="val")  # one box each; the tiny bundle takes four
    request = QuantizeRequest(tiny_bundle, out, target="tensorrt", dataset=str(data), samples=16, sensitivity=False)
    return quantize_bundle(replace(request, max_drop=100.0, min_agreement=0.0))


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_the_bundle_takes_at_most_35_percent_of_fp32(demo_bundle: Path, int8_bundle: Bundle) -> None:
    assert folder_bytes(int8_bundle.folder) <= 0.35 * folder_bytes(demo_bundle)


def test_the_bundle_is_an_ordinary_one_whose_files_are_hashed(int8_bundle: Bundle) -> None:
    assert all(state.ok for state in int8_bundle.check_files())
    present = {
        path.relative_to(int8_bundle.folder).as_posix() for path in int8_bundle.folder.rglob("*") if path.is_file()
    }
    assert present == {"manifest.json", *int8_bundle.manifest.files}
    assert not list(int8_bundle.folder.parent.glob(".*"))


def test_the_manifest_says_what_was_done_with_what(int8_bundle: Bundle, demo_bundle: Path) -> None:
    manifest, block = int8_bundle.manifest, int8_bundle.manifest.quantization
    assert manifest.precision == "int8"
    assert manifest.verification is None
    assert {name: graph["products"] for name, graph in block["graphs"].items()} == {
        "vision": 1 + 4 * 4,  # patches; of four blocks qkv, proj, fc1, fc2
        "image_query": 2 * 2 + 4 * 6 + 2 * 2 + 1,  # keys and values; four layers' q, k, v, out, FFN; cross q, out; head
        "text": 4 * 6 + 1,
        "itm": 2 * 2 + 4 * 4 + (3 * 4 + 2) + 2 * 2 + 1,  # queries and texts have FFNs of their own, the last layer one
    }
    assert block["data"]["range_images"] == block["data"]["gate_images"] == 16
    assert len(block["data"]["sha256"]) == 64
    source = Bundle.open(demo_bundle).manifest.files
    assert block["source"] == {f"onnx/{name}.onnx": source[f"onnx/{name}.onnx"] for name in GRAPHS}


def test_host_graphs_are_carried_over(int8_bundle: Bundle, demo_bundle: Path) -> None:
    source = Bundle.open(demo_bundle).manifest
    assert len(source.host_graphs) == 2
    assert int8_bundle.manifest.host_graphs == source.host_graphs
    for graph in source.host_graphs.values():
        assert int8_bundle.manifest.files[graph.file] == source.files[graph.file]


def test_openvino_passes_the_same_gates(int8_bundle: Bundle) -> None:
    """Its sums of 8-bit products are its own: closer to PyTorch or farther, and within the limits for INT8."""
    if find_spec("openvino") is None:  # importing it would start its telemetry
        pytest.skip("needs the extra openvino: pip install 'qpert[openvino]'")
    samples = int8_bundle.samples()
    for provider in ("cpu", "openvino"):
        encoder = Encoder(int8_bundle, provider)
        found = verify_tensors(encoder, samples.cases, samples, reference="recorded", provider=provider)
        encoder.close()
        assert found.passed, [gate for gate in found.gates if not gate.passed]
        assert {gate.name for gate in found.gates} >= {"vision: 1 - cosine", "image_query: 1 - cosine, with boxes"}


def test_images_with_unequal_numbers_of_query_sets_are_measured(demo_bundle: Path) -> None:
    """With a set for every box, images of one split have different numbers of them; 12 images are two calls."""
    split = demo_split("val", 12, Silent())
    each = Perturbation(reduction="each", keep_stock=True)
    encoder = Encoder(Bundle.open(demo_bundle), "cpu", each)
    measured, _ = measure(encoder, split, None, Silent(), "fp32")
    texts, counts = encoder.encode_texts(split.captions), set()
    for row in range(len(split)):
        image = load_image(split.images[row], name=split.names[row])
        sets = encoder.encode_images([image], [split.boxes_of(row, image.size)]).query_sets
        counts.add(len(sets.vectors))
        expected = (sets.vectors.reshape(-1, texts.shape[1]) @ texts.T).max(axis=0)
        assert np.abs(measured.itc[row] - expected).max() < 1e-5  # float32, alone or in a batch of 8
    encoder.close()
    assert len(counts) > 1


def test_no_float_matrix_is_left_in_the_files(int8_bundle: Bundle) -> None:
    """Position embeddings and query tokens are the largest float constants that stay: a tenth of a weight matrix."""
    for name in GRAPHS:
        model = onnx.load_model(int8_bundle.folder / "onnx" / f"{name}.onnx")
        floats = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT and len(t.dims) == 2]
        assert max((np.prod(t.dims) for t in floats), default=0) <= 12_480, name  # 65 × 192 positions


def test_the_perturbation_is_untouched(int8_bundle: Bundle, demo_bundle: Path) -> None:
    def perturbation(folder: Path) -> list[str]:
        graph = onnx.load_model(folder / "onnx" / "image_query.onnx", load_external_data=False).graph
        return sorted(node.SerializeToString() for node in graph.node if node.name.startswith("query_map"))

    assert len(perturbation(demo_bundle)) > 100
    assert perturbation(int8_bundle.folder) == perturbation(demo_bundle)


def test_weights_are_the_nearest_8_bit_numbers_of_their_column(int8_bundle: Bundle, demo_bundle: Path) -> None:
    """Worked by hand: symmetric, scale = largest of the column / 127, so no weight is off by more than half a step."""
    name = "visual_encoder.blocks.0.attn.qkv.weight.transposed"

    def constants(folder: Path) -> dict[str, np.ndarray]:
        graph = onnx.load_model(folder / "onnx" / "vision.onnx").graph
        return {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}

    weight, made = constants(demo_bundle)[name], constants(int8_bundle.folder)
    quantized, scale = made[f"{name}_quantized"], made[f"{name}_scale"]
    assert quantized.dtype == np.int8
    np.testing.assert_allclose(scale, np.abs(weight).max(axis=0) / 127, rtol=1e-2)  # some tools divide by 127.5
    assert np.abs(quantized * scale - weight).max() <= 0.51 * scale.max()
    assert not made[f"{name}_zero_point"].any()


def test_it_passes_verification_against_the_outputs_of_pytorch(int8_bundle: Bundle) -> None:
    encoder = Encoder(int8_bundle, "cpu")
    samples = int8_bundle.samples()
    verification = verify_tensors(encoder, samples.cases, samples, reference="recorded", provider="cpu")
    encoder.close()
    assert [gate.name for gate in verification.gates if not gate.passed] == []
    assert any(gate.value > 1e-5 for gate in verification.gates if "vision: 1 - cosine" in gate.name)  # it is not fp32


def test_graphs_that_share_weights_share_their_8_bit_form(int8_bundle: Bundle) -> None:
    """The Q-Former's three graphs together take little more than the largest of them alone."""

    def places(name: str) -> dict[str, str]:
        graph = onnx.load_model(int8_bundle.folder / "onnx" / f"{name}.onnx", load_external_data=False).graph
        return {
            tensor.name: {entry.key: entry.value for entry in tensor.external_data}.get("offset")
            for tensor in graph.initializer
            if tensor.name.endswith("_quantized")
        }

    text, itm = places("text"), places("itm")
    shared = [name for name in text if name in itm]
    assert len(shared) > 20
    assert all(text[name] == itm[name] for name in shared)


def test_a_failing_gate_exits_1_and_leaves_nothing(
    request_of: QuantizeRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """All weights of one block wrecked: the sign of every column's scale turned round."""
    import qpert.calibration.quantization.build as module

    quantize = module.quantize_graph

    def wrecked(bundle, name, *arguments):
        graph = quantize(bundle, name, *arguments)
        for tensor in graph.quantized.graph.initializer:
            if name == "text" and tensor.name.endswith("weight.transposed_scale"):
                values = numpy_helper.to_array(tensor)
                tensor.CopyFrom(numpy_helper.from_array(-values, tensor.name))
        return graph

    monkeypatch.setattr(module, "quantize_graph", wrecked)
    out = tmp_path / "out"
    arguments = ["quantize", str(request_of.bundle), "--out", str(out), "--samples", "16", "--limit", "16"]
    arguments += ["--graphs", "text", "--no-sensitivity", "--max-drop", "5", "--json"]
    assert run(arguments) == 1
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report["verdict"] == "fail"
    assert any(not gate["pass"] for gate in report["gates"])
    assert "nothing was written" in captured.err
    assert list(tmp_path.iterdir()) == []


def test_blocks_are_given_up_until_the_gate_passes(
    request_of: QuantizeRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The keys' activations are cut to a hundredth of their range: with that block in float all is well again."""
    import qpert.calibration.quantization.quantized as module

    ranges_of = module.tensor_ranges

    def cut(path, feeds, candidates, **settings):
        ranges = ranges_of(path, feeds, candidates, **settings)
        (head,) = [candidate for candidate in candidates if candidate.block == "text_proj"]
        low, high = ranges[head.activation].range_value
        ranges[head.activation].lowest, ranges[head.activation].highest = low / 100, high / 100
        return ranges

    monkeypatch.setattr(module, "tensor_ranges", cut)
    request = replace(request_of, out=tmp_path / "out", graphs=("text",), sensitivity=True)
    with pytest.raises(AccuracyError):
        quantize_bundle(replace(request, sensitivity=False))
    bundle = quantize_bundle(request)
    report = json.loads(bundle.path("reports/quantize.json").read_text())
    worst = report["sensitivity"][0]
    assert (worst["graph"], worst["block"]) == ("text", "text_proj")
    assert bundle.manifest.quantization["graphs"]["text"]["blocks_weights_only"] == ["text_proj"]
    assert "text_proj" in bundle.path("reports/quantize.html").read_text()


def test_for_tensorrt_zero_points_are_zero_and_the_residual_stays_in_float(tensorrt_bundle: Bundle) -> None:
    """Only products read rounded activations: LayerNorm's output goes to a residual sum as well."""
    graph = onnx.load_model(tensorrt_bundle.folder / "onnx" / "text.onnx").graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    pairs = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    assert len(pairs) == 2 * 4 + 1  # inputs of q/k/v, of out, of both FFN matrices in two layers; of the projection
    assert all(constants[node.input[2]].dtype == np.int8 and not constants[node.input[2]].any() for node in pairs)
    rounded = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    tables = {node.input[0] for node in graph.node if node.op_type == "Gather"}
    readers = {node.op_type for node in graph.node if set(node.input) & (rounded - tables)}
    assert readers == {"MatMul", "Gemm"}
