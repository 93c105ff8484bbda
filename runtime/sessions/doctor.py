"""What this machine has: libraries, providers that really start, GPU. Nothing is installed or changed."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from qpert.runtime.errors import BundleError, UnavailableError
from qpert.runtime.libraries import load_cuda_libraries, load_onnxruntime
from qpert.runtime.sessions.gpus import find_gpus, first_gpu
from qpert.runtime.sessions.providers import PROVIDERS, Provider, available_providers
from qpert.runtime.sessions.tensorrt.engines import this_machine
from qpert.runtime.sessions.tensorrt.libraries import FLAVORS, Flavor, flavor_version, load_flavor

EXTRAS: dict[str, tuple[str, ...]] = {
    "cpu": ("onnxruntime",),
    "gpu": ("onnxruntime-gpu",),
    "openvino": ("openvino",),
    "export": ("torch", "onnx", "onnxscript", "onnx-graphsurgeon"),
    "hf": ("transformers", "huggingface-hub"),
    "quantize": ("onnxruntime", "onnx"),
    "rtx": ("tensorrt-rtx", "cuda-bindings"),
    "trt": ("tensorrt", "cuda-bindings"),
}
"""The extras of `pip install qpert[…]` and the packages that each stands for."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked for."""

    name: str
    usable: bool
    found: str
    advice: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def examine() -> list[Finding]:
    """Everything that decides what can be used here."""
    return [
        Finding("qpert", True, installed("qpert") or "not installed as a package"),
        Finding("python", True, f"{platform.python_version()} on {platform.platform()}"),
        find_gpu(),
        *(find_extra(extra, packages) for extra, packages in EXTRAS.items()),
        *(find_provider_here(provider) for provider in PROVIDERS.values()),
        *(find_builder(flavor) for flavor in FLAVORS.values()),
        find_conflict(),
    ]


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def find_gpu() -> Finding:
    """NVIDIA GPUs, with their architectures."""
    try:
        return Finding("gpu", True, "; ".join(str(gpu) for gpu in find_gpus()))
    except UnavailableError as error:
        return Finding("gpu", False, str(error), "needed only for the providers cuda, tensorrt and rtx")


def find_builder(flavor: Flavor) -> Finding:
    """Whether `qpert build` can compile engines with one of the TensorRTs, and for which GPUs; running them is the
    provider's finding.
    """
    name, gpu = f"build {flavor.name}", first_gpu()
    try:
        title = f"{flavor.title} {flavor_version(load_flavor(flavor))}"
    except UnavailableError as error:
        return Finding(name, False, "the library does not load", str(error))
    if flavor.architectures:
        other = (
            f", not for this machine's {gpu.architecture}"
            if gpu and gpu.architecture not in flavor.architectures
            else ""
        )
        return Finding(name, True, f"{title}: for {', '.join(flavor.architectures)}, on any machine{other}")
    if gpu is None:
        return Finding(
            name, False, f"{title} is installed", "builds only on the GPU that runs the engine; none is here"
        )
    return Finding(name, True, f"{title}: for this machine's {gpu.architecture}")


def find_extra(extra: str, packages: tuple[str, ...]) -> Finding:
    versions = {package: installed(package) for package in packages}
    missing = [package for package, found in versions.items() if found is None]
    found = ", ".join(f"{package} {number}" for package, number in versions.items() if number) or "not installed"
    return Finding(f"extra {extra}", not missing, found, f"pip install 'qpert[{extra}]'" if missing else "")


def find_provider_here(provider: Provider) -> Finding:
    """Whether a provider is in this ONNX Runtime, and starts: having it is not enough without its libraries."""
    name = f"provider {provider.name}"
    if provider.name not in available_providers():
        where = "in the installed ONNX Runtime" if provider.onnxruntime else "installed"
        return Finding(name, False, f"not {where}", f"needs {provider.advice}")
    try:
        start_provider(provider)
    except (UnavailableError, BundleError) as error:
        return Finding(name, False, "there, does not start", str(error))
    used = "the default" if provider.name == "cpu" else "used when asked for"
    if provider.openvino:
        from qpert.runtime.sessions.openvino import describe_device

        used = f"{used}: {describe_device(provider)}"
    return Finding(name, True, used)


def start_provider(provider: Provider) -> None:
    """Start a session over the smallest of graphs; for engines, see that their library and CUDA start.

    Raises:
        UnavailableError: they do not, or ONNX Runtime would use something else.
    """
    if provider.flavor:
        this_machine(FLAVORS[provider.flavor])
        return
    if provider.openvino:
        from qpert.runtime.sessions.openvino import start_openvino

        start_openvino(IDENTITY, provider, 0)
        return
    if provider.name == "cuda":
        load_cuda_libraries()
    session = load_onnxruntime().InferenceSession(IDENTITY, providers=[provider.onnxruntime])
    if provider.onnxruntime not in session.get_providers():
        raise UnavailableError(
            f"ONNX Runtime would use {', '.join(session.get_providers())}; needs {provider.advice}",
            code="provider-not-started",
        )


def find_conflict() -> Finding:
    both = [package for package in ("onnxruntime", "onnxruntime-gpu") if installed(package)]
    if len(both) < 2:
        return Finding("one ONNX Runtime", True, both[0] if both else "none installed")
    return Finding(
        "one ONNX Runtime",
        False,
        "onnxruntime and onnxruntime-gpu are both installed and overwrite each other",
        "pip uninstall both, then install one of qpert[cpu] and qpert[gpu]",
    )


IDENTITY = (
    b'\x08\x08:7\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01b\x0f\n\x01y\x12\n\n'
    b"\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\r"
)
"""A serialised ONNX model, y = Identity(x) over float32 [1]: the runtime has no onnx to make one with."""
