"""What this machine has: libraries, providers that really start, GPU. Nothing is installed or changed."""

from __future__ import annotations

import platform
import shutil
import subprocess
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from qpert.runtime.errors import UnavailableError
from qpert.runtime.session import PROVIDERS, Provider, available_providers

EXTRAS: dict[str, tuple[str, ...]] = {
    "cpu": ("onnxruntime",),
    "gpu": ("onnxruntime-gpu",),
    "export": ("torch", "onnx", "onnxscript", "onnx-graphsurgeon"),
    "hf": ("transformers", "huggingface-hub"),
    "rtx": ("tensorrt-rtx",),
    "trt": ("tensorrt",),
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
        find_conflict(),
    ]


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def find_gpu() -> Finding:
    """NVIDIA GPUs by `nvidia-smi`, which comes with the driver."""
    advice = "needed only for the providers cuda, tensorrt and rtx"
    program = shutil.which("nvidia-smi")
    if program is None:
        return Finding("gpu", False, "no nvidia-smi: no NVIDIA driver", advice)
    query = [program, "--query-gpu=name,driver_version,compute_cap", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding("gpu", False, f"nvidia-smi does not answer ({error})", advice)
    lines = answer.stdout.strip().splitlines()
    if answer.returncode or not lines:
        return Finding(
            "gpu", False, (answer.stderr or answer.stdout).strip()[:200] or "nvidia-smi shows no GPU", advice
        )
    return Finding("gpu", True, "; ".join(lines))


def find_extra(extra: str, packages: tuple[str, ...]) -> Finding:
    versions = {package: installed(package) for package in packages}
    missing = [package for package, found in versions.items() if found is None]
    found = ", ".join(f"{package} {number}" for package, number in versions.items() if number) or "not installed"
    return Finding(f"extra {extra}", not missing, found, f"pip install 'qpert[{extra}]'" if missing else "")


def find_provider_here(provider: Provider) -> Finding:
    """Whether a provider is in this ONNX Runtime, and starts: having it is not enough without its libraries."""
    name = f"provider {provider.name}"
    if provider.name not in available_providers():
        return Finding(name, False, "not in the installed ONNX Runtime", f"needs {provider.advice}")
    try:
        start_provider(provider)
    except UnavailableError as error:
        return Finding(name, False, "there, does not start", str(error))
    used = "the default" if provider.name == "cpu" else "used when asked for"
    return Finding(name, True, used)


def start_provider(provider: Provider) -> None:
    """Start a session over the smallest of graphs.

    Raises:
        UnavailableError: ONNX Runtime would use something else.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(IDENTITY, providers=[provider.onnxruntime])
    if provider.onnxruntime not in session.get_providers():
        raise UnavailableError(f"ONNX Runtime would use {', '.join(session.get_providers())}; needs {provider.advice}")


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
