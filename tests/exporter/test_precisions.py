"""Half-precision exports of a small model: what they cost, and that LayerNorm survives large activations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from tiny_model import OPTIONS, THRESHOLD, VOCABULARY, tiny_state

from qpert.exporter.export import ExportRequest, export_bundle
from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.cli import run
from qpert.runtime.inputs.perturbation import Perturbation
from qpert.runtime.verification import batch_axes, cosine_distance, select

pytestmark = pytest.mark.slow

COSINE = {"fp16": 0.9999, "bf16": 0.999}
SCALE = 100.0


def scaled_state(scale: float) -> dict[str, torch.Tensor]:
    """The tiny model with what enters its first LayerNorms `scale` times as large."""
    state = tiny_state()
    for name in (
        "visual_encoder.pos_embed",
        "visual_encoder.cls_token",
        "visual_encoder.patch_embed.proj.weight",
        "visual_encoder.patch_embed.proj.bias",
        "query_tokens",
        "Qformer.bert.embeddings.word_embeddings.weight",
        "Qformer.bert.embeddings.position_embeddings.weight",
    ):
        state[name] = state[name] * scale
    return state


@pytest.fixture(scope="module", params=["fp16", "bf16"])
def precision(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def export(precision: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[float], Bundle]:
    def make(scale: float) -> Bundle:
        folder = tmp_path_factory.mktemp(precision)
        torch.save({"model": scaled_state(scale)}, folder / "tiny.pth")
        request = ExportRequest(
            family="blip2",
            checkpoint=str(folder / "tiny.pth"),
            tokenizer=str(VOCABULARY),
            out=folder / "bundle",
            precision=precision,
            options=OPTIONS,
            perturbation=Perturbation.paper(threshold=THRESHOLD),
        )
        request = replace(request, limits=replace(request.limits, batch=2, boxes=6, texts=4, length=8))
        return export_bundle(request)

    return make


@pytest.fixture(scope="module")
def plain(export: Callable[[float], Bundle]) -> Bundle:
    return export(1.0)


@pytest.fixture(scope="module")
def loud(export: Callable[[float], Bundle]) -> Bundle:
    return export(SCALE)


def outputs(bundle: Bundle) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Every recorded case's output and the float32 reference's, by ONNX's own evaluator (it knows bfloat16)."""
    samples = bundle.samples()
    found = {}
    for name, spec in bundle.manifest.graphs.items():
        evaluator = ReferenceEvaluator(onnx.load(bundle.graph_path(spec)))
        for case in (case for case in samples.cases if case.graph == name):
            whole = {axis: np.arange(rows) for axis, rows in batch_axes(spec, case).items()}
            inputs = {tensor.name: select(case.inputs[tensor.name], tensor, whole) for tensor in spec.inputs}
            (output,) = evaluator.run(None, inputs)
            (expected,) = case.expected.values()
            found[f"{name}/{case.name}"] = (output.astype(np.float64), expected.astype(np.float64))
    return found


def test_every_embedding_keeps_its_direction(plain: Bundle, precision: str) -> None:
    for name, (found, expected) in outputs(plain).items():
        if not name.startswith("itm"):  # scores are numbers, not directions
            assert 1 - cosine_distance(found, expected) >= COSINE[precision], name


def test_large_activations_at_a_layer_norm_overflow_nowhere(loud: Bundle, precision: str) -> None:
    # 100 × activations of about 2: their squares sum to 1e6 over a row, beyond float16's largest number, 65,504.
    for name, (found, expected) in outputs(loud).items():
        assert np.isfinite(found).all(), name
        if not name.startswith(("itm", "image_query/many", "image_query/one")):
            assert 1 - cosine_distance(found, expected) >= COSINE[precision], name


def test_layer_norm_softmax_and_perturbation_are_float32(plain: Bundle, precision: str) -> None:
    half = {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}[precision]
    for spec in plain.manifest.graphs.values():
        model = onnx.load(plain.graph_path(spec), load_external_data=False)
        model = onnx.shape_inference.infer_shapes(model, strict_mode=True)
        types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
        types |= {value.name: value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)}
        types |= {tensor.name: tensor.data_type for tensor in model.graph.initializer}
        delicate = [
            node
            for node in model.graph.node
            if node.op_type in ("LayerNormalization", "Softmax") or node.name.startswith("query_map")
        ]
        assert delicate
        assert not [node.name for node in delicate if half in {types.get(name) for name in node.input}]
        assert half in types.values(), "nothing in half precision would show nothing"


def test_bf16_on_the_cpu_is_refused_in_words(
    plain: Bundle, precision: str, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    if precision == "bf16":
        assert run(["verify", str(plain.folder)]) == 3
        assert "bfloat16 runs on GPUs only" in capsys.readouterr().err
    else:
        assert run(["verify", str(plain.folder)]) == 0
