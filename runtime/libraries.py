"""Libraries that are loaded when they are first used, with their telemetry turned off.

ONNX Runtime from 1.29 on collects telemetry: `import onnxruntime` alone writes an identifier of the machine and a
database to `~/.cache/Microsoft/DeveloperTools`, and starts threads that keep a forked process from ending. It reads its
switch once, at the import, so every import in qpert goes through `load_onnxruntime` (a test looks for others). So does
OpenVINO, see `load_openvino`.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from pathlib import Path
from typing import Any

TELEMETRY_SWITCHES = {
    # onnxruntime/core/platform/telemetry_1ds.cc; "0" and "" leave it on
    "ORT_DISABLE_TELEMETRY": "1",
    # huggingface_hub/constants.py: what the library says of this machine in each request to the hub
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
"""Environment variables that turn the telemetry of libraries off."""


def turn_off_telemetry() -> None:
    """Set the switches that the user has not set; one that is set, to whatever value, is the user's decision."""
    for name, value in TELEMETRY_SWITCHES.items():
        os.environ.setdefault(name, value)


def load_onnxruntime() -> Any:
    """The module `onnxruntime`, without telemetry (where the application has not imported it before).

    Raises:
        ImportError: it is not installed.
    """
    turn_off_telemetry()
    import onnxruntime

    return onnxruntime


def load_cuda_libraries() -> None:
    """Load CUDA and cuDNN from NVIDIA's packages, if they are installed, for ONNX Runtime's CUDA provider.

    The provider is linked to them without a place to look for them, so that it finds those of the system alone. Where
    some are missing, opening a session says so; what ONNX Runtime prints about it (on stdout, where results belong) is
    not shown. ONNX Runtime before 1.21 cannot do it.
    """
    preload = getattr(load_onnxruntime(), "preload_dlls", None)
    if preload is not None:
        with contextlib.redirect_stdout(io.StringIO()):
            preload(directory="")  # NVIDIA's packages, then the system's; not PyTorch's folder


OPENVINO_CONSENT = Path("intel", "openvino_telemetry")
"""Below the home folder: what the user told OpenVINO of telemetry, by its own `opt_in_out`."""


def load_openvino() -> Any:
    """The module `openvino`, without telemetry (where the application has not imported it before).

    `import openvino` alone writes an identifier to `~/intel` and reports its use. It has no variable to turn that off,
    but does without the package `openvino_telemetry` where there is none: so there is none while it is imported. What
    the user has told OpenVINO before is the user's decision.

    Raises:
        ImportError: it is not installed.
    """
    turn_off_telemetry()
    hidden = "openvino_telemetry" not in sys.modules and not (Path.home() / OPENVINO_CONSENT).exists()
    if hidden:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # an import of it is then an ImportError
    try:
        import openvino
    finally:
        if hidden:
            del sys.modules["openvino_telemetry"]
    return openvino
