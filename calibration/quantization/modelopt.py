"""NVIDIA ModelOpt in its own environment: FP8 graphs for TensorRT."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from qpert.calibration.quantization.candidates import Candidate
from qpert.calibration.quantization.data import Feed
from qpert.runtime.errors import InputError, QpertError, UnavailableError
from qpert.runtime.libraries import turn_off_telemetry

PROJECT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("modelopt_worker.py")
HINT = (
    "Make it with `sh tools/modelopt_env.sh` (it pins another version of onnx, so it is kept separate), or "
    "set QPERT_MODELOPT_ENV to an environment with nvidia-modelopt[onnx]"
)
METHODS = {"minmax": "max", "entropy": "entropy"}
"""`--ranges` → ModelOpt's name for it."""


def modelopt_python() -> Path:
    """The interpreter of the ModelOpt environment: $QPERT_MODELOPT_ENV, or the one that tools/modelopt_env.sh made.

    Raises:
        UnavailableError: it is missing.
    """
    folder = Path(os.environ.get("QPERT_MODELOPT_ENV") or PROJECT / ".cache" / "modelopt")
    found = folder / "bin" / "python"
    if not found.is_file():
        raise UnavailableError(
            f"FP8 needs NVIDIA ModelOpt in an environment of its own; {found} is missing. {HINT}",
            code="modelopt-missing",
        )
    return found


def modelopt_version() -> str:
    code = "import importlib.metadata as m; print(m.version('nvidia-modelopt'))"
    try:
        done = subprocess.run([modelopt_python(), "-I", "-c", code], capture_output=True, text=True, check=True)
    except subprocess.CalledProcessError as error:
        raise UnavailableError(
            f"nvidia-modelopt is not installed for {modelopt_python()}. {HINT}", code="modelopt-missing"
        ) from error
    return done.stdout.strip()


def check_method(method: str) -> None:
    """Raise InputError for ranges that ModelOpt does not support."""
    if method not in METHODS:
        raise InputError(
            f"--ranges {method} is not supported for fp8, expected one of {', '.join(METHODS)}", code="quantize-ranges"
        )


def quantize_with_modelopt(
    path: Path, feeds: Sequence[Feed], candidates: Sequence[Candidate], *, precision: str, method: str, folder: Path
) -> onnx.ModelProto:
    """The graph with ModelOpt's Q/DQ pairs around every candidate; weights are still in float.

    Raises:
        UnavailableError: the ModelOpt environment is missing.
        QpertError: ModelOpt failed; its last lines are in the message.
    """
    python = modelopt_python()
    check_method(method)
    given, made = (folder.resolve() / f"{path.stem}-{end}" for end in ("feeds.npz", f"{precision}.onnx"))
    arrays: dict[str, Any] = {f"{n}/{key}": array for n, feed in enumerate(feeds) for key, array in feed.items()}
    np.savez(given, **arrays)
    job = {
        "graph": str(path.resolve()),
        "feeds": str(given),
        "out": str(made),
        "mode": precision,
        "method": METHODS[method],
        "nodes": [candidate.node for candidate in candidates],
    }
    turn_off_telemetry()  # for the ONNX Runtime there, which inherits this environment
    done = subprocess.run(
        [python, "-I", "-W", "ignore", WORKER],
        input=json.dumps(job),
        cwd=folder,  # ModelOpt leaves files where it runs
        capture_output=True,
        text=True,
        check=False,
    )
    given.unlink()
    if done.returncode or not made.is_file():
        last = "\n".join((done.stderr or done.stdout).strip().splitlines()[-5:])
        raise QpertError(
            f"ModelOpt could not quantise {path.name} to {precision}, it exited with {done.returncode}:\n{last}",
            code="modelopt-failed",
        )
    return onnx.load_model(made)


def taken(model: onnx.ModelProto, candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """The products that ModelOpt has quantised. It skips those without an 8-bit kernel in TensorRT: a matrix of two
    columns, the head of the pair graph.
    """
    reads = {node.name: node.input[0] for node in model.graph.node if node.input}
    return tuple(c for c in candidates if reads.get(c.node, c.activation) != c.activation)
