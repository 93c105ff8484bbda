"""Libraries that are loaded when they are first used, with their telemetry turned off.

ONNX Runtime from 1.29 on collects telemetry: `import onnxruntime` alone writes an identifier of the machine and a
database to `~/.cache/Microsoft/DeveloperTools`, and starts threads that keep a forked process from ending. It reads its
switch once, at the import, so every import in qpert goes through `load_onnxruntime` (a test looks for others).
"""

from __future__ import annotations

import os
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


def load_openvino() -> Any:
    """The module `openvino`.

    It has no switch, and needs none: the package `openvino-telemetry`, which is installed with it, is imported by
    OpenVINO's model converter alone, and importing that sends nothing. Nothing here converts with it.

    Raises:
        ImportError: it is not installed.
    """
    turn_off_telemetry()
    import openvino

    return openvino
