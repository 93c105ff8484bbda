"""Quantised graphs are built by TensorRT-RTX, ahead of time and without a GPU; FP8 comes from NVIDIA ModelOpt."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from evaluation_sets import write_set

from qpert.calibration.quantization.build import quantize_bundle
from qpert.calibration.quantization.modelopt import modelopt_python
from qpert.calibration.quantization.request import QuantizeRequest
from qpert.exporter.engines.build import BuildRequest, build_engines
from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.errors import UnavailableError
from qpert.runtime.retrieval.encoder import Encoder

pytestmark = pytest.mark.slow

GRAPHS = ("vision", "text")
"""The others are built by `qpert build` as well; the perturbation in them takes 20 seconds each."""


@pytest.fixture(scope="module")
def quantized(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory):
    def make(precision: str) -> Bundle:
        out = tmp_path_factory.mktemp(precision) / "bundle"
        data = write_set(out.parent / "set", 16, split="val")  # one box each; the tiny bundle takes four
        request = QuantizeRequest(
            tiny_bundle, out, precision, "tensorrt", dataset=str(data), samples=16, graphs=GRAPHS, sensitivity=False,
            max_drop=100.0, min_agreement=0.0,
        )  # fmt: skip
        return quantize_bundle(request)

    return make


def built(bundle: Bundle, target: str) -> list[tuple[str, str]]:
    pytest.importorskip("tensorrt_rtx", reason="needs the extra rtx")
    request = BuildRequest(flavor="rtx", target=target, graphs=GRAPHS)
    report = build_engines(bundle, request, request.plan(bundle.manifest.precision))
    assert all((bundle.folder / engine.file).stat().st_size == engine.bytes > 0 for engine in report.engines)
    return [(engine.target, engine.graph) for engine in report.engines]


def test_int8_graphs_are_built_for_ampere_and_ada(quantized) -> None:
    expected = [(target, graph) for target in ("sm80", "sm89") for graph in GRAPHS]
    assert built(quantized("int8"), "sm80,sm89") == expected


def test_fp8_graphs_are_built_for_ada_and_blackwell_and_refused_for_ampere(quantized) -> None:
    try:
        modelopt_python()
    except UnavailableError as error:
        pytest.skip(str(error))
    bundle = quantized("fp8")
    model = onnx.load_model(bundle.folder / "onnx" / "text.onnx")
    weights = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT8E4M3FN and len(t.dims) == 2]
    assert len(weights) == 2 * 6 + 1  # q, k, v, out and the FFN of two layers, and the projection
    assert built(bundle, "sm89,sm120") == [(target, graph) for target in ("sm89", "sm120") for graph in GRAPHS]
    with pytest.raises(UnavailableError, match="sm80 has no fp8"):
        built(bundle, "sm80")
    encoder = Encoder(bundle, "cpu")  # ONNX Runtime computes FP8 on the CPU, slowly
    embeds = encoder.encode_texts(["a red ball", "two dogs"])
    encoder.close()
    np.testing.assert_allclose(np.linalg.norm(embeds, axis=1), 1, rtol=1e-5)
