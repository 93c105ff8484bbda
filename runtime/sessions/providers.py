"""The table of what can run graphs."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass

from qpert.runtime.errors import InputError
from qpert.runtime.libraries import load_onnxruntime
from qpert.runtime.sessions.tensorrt.libraries import FLAVORS


@dataclass(frozen=True)
class Provider:
    """What runs graphs: a provider of ONNX Runtime or a device of OpenVINO (their names there), or engines of one
    TensorRT flavour.

    ONNX Runtime has providers for TensorRT too. They compile engines of their own at the first run, without fingerprint
    or profile, so they are not offered: `tensorrt` and `rtx` mean engines that `qpert build` made.
    """

    name: str
    advice: str
    onnxruntime: str = ""
    openvino: str = ""
    flavor: str = ""


PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (
        Provider("cpu", "pip install 'qpert[cpu]'", onnxruntime="CPUExecutionProvider"),
        Provider(
            "cuda",
            "an NVIDIA GPU, its driver, and pip install 'qpert[gpu]'",
            onnxruntime="CUDAExecutionProvider",
        ),
        Provider("openvino", "pip install 'qpert[openvino]'", openvino="CPU"),
        Provider("tensorrt", "an NVIDIA GPU, its driver, and pip install 'qpert[trt]'", flavor="classic"),
        Provider("rtx", "an NVIDIA GPU, its driver, and pip install 'qpert[rtx]'", flavor="rtx"),
    )
}


def find_provider(name: str) -> Provider:
    if not isinstance(name, str) or name not in PROVIDERS:
        raise InputError(f"got provider {name!r}, expected one of {', '.join(PROVIDERS)}", code="provider")
    return PROVIDERS[name]


def available_providers() -> list[str]:
    """Names of the providers whose libraries are installed (a GPU may still be missing: opening a bundle tells)."""
    try:
        found = load_onnxruntime().get_available_providers()
    except ImportError:
        found = []
    return [provider.name for provider in PROVIDERS.values() if has_library(provider, found)]


def has_library(provider: Provider, onnxruntime_has: Iterable[str]) -> bool:
    if provider.flavor:
        return importlib.util.find_spec(FLAVORS[provider.flavor].module) is not None
    if provider.openvino:
        return importlib.util.find_spec("openvino") is not None
    return provider.onnxruntime in onnxruntime_has
