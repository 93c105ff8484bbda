"""Static quantisation by ONNX Runtime's tools: ranges by its calibrators, Q/DQ by its quantiser.

Static, not dynamic, on the CPU too: dynamic ranges span a whole call, so a row's result would depend on its neighbours;
`Encoder` splits calls on the assumption that it does not.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from qpert.calibration.quantization.candidates import Candidate
from qpert.calibration.quantization.data import Feed
from qpert.runtime.libraries import turn_off_telemetry

PERCENTILE = 99.99
HISTOGRAM_CALLS = 4
"""Calls whose activations are in memory at once for histograms."""
PRODUCTS = ["MatMul", "Gemm"]


@dataclass(frozen=True)
class NumberFormat:
    """How ONNX Runtime's quantiser writes activations for a target.

    CPU: u8 with a zero point, for its u8 × s8 products. TensorRT: s8 without one, the only form it accepts.
    """

    activations: str
    symmetric: bool


FORMATS = {"cpu": NumberFormat("QUInt8", False), "tensorrt": NumberFormat("QInt8", True)}


def tensor_ranges(
    path: Path, feeds: Sequence[Feed], candidates: Sequence[Candidate], *, method: str, symmetric: bool, folder: Path
) -> Any:
    """Ranges of the candidates' activations, as ONNX Runtime's `TensorsData`.

    Args:
        path: the float graph.
        feeds: its inputs, call by call.
        candidates: the products whose activations are measured.
        method: `minmax`, `percentile` or `entropy`.
        symmetric: whether ranges are centred on 0.
        folder: for working files.
    """
    wanted = {candidate.activation for candidate in candidates}
    calibrator = make_calibrator(path, wanted, method=method, symmetric=symmetric, folder=folder)
    step = len(feeds) if method == "minmax" else HISTOGRAM_CALLS
    for start in range(0, len(feeds), step):
        calibrator.collect_data(Reader(feeds[start : start + step]))
    return calibrator.compute_data()


def make_calibrator(
    path: Path,
    wanted: set[str],
    *,
    method: str,
    symmetric: bool,
    folder: Path,
    operators: Sequence[str] = tuple(PRODUCTS),
) -> Any:
    """A calibrator of ONNX Runtime for the tensors `wanted` at nodes of these operators."""
    turn_off_telemetry()
    from onnxruntime.quantization import calibrate

    kinds: dict[str, tuple[Any, dict[str, Any]]] = {
        "minmax": (calibrate.MinMaxCalibrater, {}),
        "percentile": (calibrate.PercentileCalibrater, {"num_bins": 2048, "percentile": PERCENTILE}),
        "entropy": (calibrate.EntropyCalibrater, {"num_bins": 128, "num_quantized_bins": 128}),
    }
    kind, settings = kinds[method]

    class Selective(kind):  # type: ignore[valid-type, misc]
        """Measures the wanted tensors only: image_query alone has a hundred products that are not quantised."""

        def select_tensors_to_calibrate(self, model: onnx.ModelProto) -> Any:
            tensors, infos = super().select_tensors_to_calibrate(model)
            return tensors & wanted, infos

    data = sum(place.stat().st_size for place in path.parent.glob("*.data"))
    augmented = folder / f"{path.stem}-augmented.onnx"
    calibrator = Selective(
        path, list(operators), str(augmented), symmetric=symmetric, use_external_data_format=data > 1 << 30, **settings
    )
    calibrator.augment_graph()
    calibrator.create_inference_session()
    return calibrator


class Reader:
    """Input of ONNX Runtime's calibrators, which call `get_next` until it returns None."""

    def __init__(self, feeds: Sequence[Feed]) -> None:
        self._feeds: Iterator[Feed] = iter(feeds)

    def get_next(self) -> Feed | None:
        return next(self._feeds, None)


def quantize_all(
    model: onnx.ModelProto,
    ranges: Any,
    candidates: Sequence[Candidate],
    *,
    target: str,
    reduce_range: bool,
    operators: Sequence[str] = tuple(PRODUCTS),
    outputs: bool = False,
) -> onnx.ModelProto:
    """The graph with every candidate quantised: per tensor activations, per output channel symmetric s8 weights.

    `operators`: of the candidates. `outputs`: quantise results and biases too, which ONNX Runtime needs to run a
    convolution in 8 bits.

    `model` is changed in place: a copy of a full-size tower would take another 4 GB.
    """
    turn_off_telemetry()
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    numbers = FORMATS[target]
    with quiet_root_logger():
        quantizer = QDQQuantizer(
            model,
            True,  # per channel
            reduce_range,
            QuantType.QInt8,
            QuantType[numbers.activations],
            ranges,
            [candidate.node for candidate in candidates],
            [],
            list(operators),
            {
                "OpTypesToExcludeOutputQuantization": [] if outputs else list(operators),
                "QuantizeBias": outputs,
                "ActivationSymmetric": numbers.symmetric,
                "WeightSymmetric": True,
            },
        )
        quantizer.quantize_model()
        quantizer.model.topological_sort()
    made: onnx.ModelProto = quantizer.model.model
    return made


@contextmanager
def quiet_root_logger() -> Iterator[None]:
    """Silence ONNX Runtime's quantiser, whose advice on the root logger does not apply here."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
