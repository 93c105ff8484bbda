"""Checks that every supported ONNX Runtime can read a graph: limits its versions, and opens it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx

from qpert.runtime.errors import QpertError, UnavailableError
from qpert.runtime.libraries import load_onnxruntime

LOWEST_RUNTIME = "1.22"
"""The lowest ONNX Runtime that `qpert[cpu]` and `qpert[gpu]` allow (pyproject.toml)."""
IR_VERSION = 10
"""The highest that it reads. Graphs are written with it, regardless of the installed onnx. (onnx 1.19 writes 12,
and ONNX Runtime 1.22.0 fails with "Unsupported model IR version: 12, max supported IR version: 10".)"""
OPSET_LIMIT = 22
"""The highest opset of the standard operators that it reads."""


class GraphError(QpertError):
    """A graph that differs from its declaration: a bug in the exporter, found before a bundle exists."""

    code = "graph"


def check_versions(model: onnx.ModelProto, name: str) -> None:
    """Raise GraphError if the IR version or an opset exceeds what the lowest supported ONNX Runtime reads."""
    opsets = {entry.domain or "ai.onnx": entry.version for entry in model.opset_import}
    foreign = {domain: version for domain, version in opsets.items() if domain != "ai.onnx"}
    if model.ir_version > IR_VERSION or opsets.get("ai.onnx", 0) > OPSET_LIMIT or foreign:
        raise GraphError(
            f"graph {name!r} has IR version {model.ir_version} and opsets {opsets}; ONNX Runtime {LOWEST_RUNTIME} "
            f"reads IR version {IR_VERSION} and opset {OPSET_LIMIT} of ai.onnx at most: please report this",
            code="graph-version",
        )


def require_onnxruntime() -> Any:
    """The module.

    Raises:
        UnavailableError: it is not installed.
    """
    try:
        return load_onnxruntime()
    except ImportError as error:
        raise UnavailableError(
            f"exporting opens every graph in ONNX Runtime, which is not installed ({error}); pip install 'qpert[cpu]'",
            code="onnxruntime-missing",
        ) from error


def open_graph(path: Path, name: str) -> None:
    """Open a written graph in the installed ONNX Runtime, on the CPU; nothing is run.

    Nothing is optimised or packed, so that weights stay mapped to their file.

    Raises:
        GraphError: it cannot be read.
        UnavailableError: ONNX Runtime is not installed.
    """
    ort = require_onnxruntime()
    options = ort.SessionOptions()
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4  # what is wrong comes as an exception
    try:
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions have no common base of their own
        if type(error).__name__ == "NotImplemented":
            return  # it was read, and the CPU has no kernel: bfloat16 is for GPUs
        raise GraphError(
            f"ONNX Runtime {ort.__version__} cannot open graph {name!r} that was just written: {error}; please report "
            "this",
            code="graph-unreadable",
        ) from error
