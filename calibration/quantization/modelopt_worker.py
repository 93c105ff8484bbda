"""Runs in the ModelOpt environment, which has no qpert: reads one job from stdin as JSON, writes one graph.

Job: graph, feeds (.npz, `<call>/<input>`), out, mode (fp8 or int8), method (max or entropy), nodes (what to quantise).
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any


def main() -> None:
    import numpy as np
    import onnx
    from modelopt.onnx.quantization import quantize
    from onnxruntime.quantization.calibrate import CalibrationDataReader

    job = json.load(sys.stdin)
    with np.load(job["feeds"]) as stored:
        calls: dict[int, dict[str, Any]] = {}
        for key in stored.files:
            number, _, name = key.partition("/")
            calls.setdefault(int(number), {})[name] = stored[key]

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rewind()

        def rewind(self) -> None:
            self._calls = iter([calls[number] for number in sorted(calls)])

        def get_next(self) -> dict[str, Any] | None:
            return next(self._calls, None)

        def get_first(self) -> dict[str, Any]:
            return calls[min(calls)]

    wanted = set(job["nodes"])
    graph = onnx.load(job["graph"], load_external_data=False).graph
    others = [node.name for node in graph.node if node.op_type in ("MatMul", "Gemm") and node.name not in wanted]
    quantize(
        job["graph"],
        quantize_mode=job["mode"],
        calibration_data_reader=Reader(),
        calibration_method=job["method"],
        calibration_eps=["cpu"],
        op_types_to_quantize=["MatMul", "Gemm"],
        nodes_to_quantize=[f"^{re.escape(name)}$" for name in sorted(wanted)],
        nodes_to_exclude=[f"^{re.escape(name)}$" for name in others],
        output_path=job["out"],
        high_precision_dtype="fp32",
        log_level="ERROR",
    )


if __name__ == "__main__":
    main()
