"""The machine, and what a result depends on: the code, the GPU, its driver, and the versions of what ran."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from qpert.runtime.benchmark.machine import describe_machine
from qpert.runtime.errors import UnavailableError

REPOSITORY = Path(__file__).resolve().parents[2]
CODE = ("runtime", "graphs", "exporter", "calibration", "benchmarks", "tests/runtime/sessions")
"""Whose Python files decide what a line does."""
NEEDED = {"torch": "torch", "onnx": "onnx", "onnxscript": "onnxscript", "onnx_graphsurgeon": "onnx-graphsurgeon"}
"""Modules without which nothing can be exported, and the packages that hold them."""
VERSIONS = re.compile(r"nvidia[-_]|tensorrt|cuda-|onnx|torch$|triton$|transformers$|numpy$|pillow$|tokenizers$|qpert$")
GPU_FIELDS = ("name", "driver_version", "compute_cap", "memory.total")
UNKNOWN = ("[N/A]", "[Not Supported]", "[Insufficient Permissions]", "")
"""What nvidia-smi says instead of a number: of a MIG slice, under WSL, or in a container."""


def missing_packages() -> list[str]:
    return [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]


def ask_driver(*arguments: str) -> str:
    """What nvidia-smi prints. Raises UnavailableError where it is not there, or does not answer."""
    program = shutil.which("nvidia-smi")
    if program is None:
        raise UnavailableError("no nvidia-smi: no NVIDIA driver", code="nvidia-driver-missing")
    try:
        answer = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnavailableError(f"nvidia-smi does not answer ({error})", code="nvidia-smi-failed") from error
    if answer.returncode:
        raise UnavailableError((answer.stderr or answer.stdout).strip()[:200], code="gpu-missing")
    return answer.stdout


def chosen_gpu() -> str:
    """The GPU that is used, as `nvidia-smi -i` takes it: the first of CUDA_VISIBLE_DEVICES, else the first of all."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()


def describe_gpu() -> dict[str, str]:
    """The GPU that is used, and the newest CUDA that its driver knows. Raises UnavailableError where there is none."""
    if chosen_gpu() in ("", "-1"):
        raise UnavailableError("CUDA_VISIBLE_DEVICES hides every GPU; unset it", code="gpu-missing")
    listed = ask_driver("-i", chosen_gpu(), f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader")
    return parse_gpu(listed) | {"cuda": parse_cuda(ask_driver())}


def parse_gpu(text: str) -> dict[str, str]:
    """`NVIDIA H100 80GB HBM3, 550.54.15, 9.0, 81559 MiB`. Raises UnavailableError for anything else."""
    lines = [line for line in text.splitlines() if line.strip()]
    parts = [part.strip() for part in lines[0].rsplit(",", len(GPU_FIELDS) - 1)] if lines else []
    if len(parts) != len(GPU_FIELDS):
        raise UnavailableError(
            f"nvidia-smi says {text.strip()!r}, expected {', '.join(GPU_FIELDS)}", code="gpu-missing"
        )
    return dict(zip(("name", "driver", "capability", "memory"), parts, strict=True))


def parse_cuda(text: str) -> str:
    """From the head of nvidia-smi's table; "" where it does not say."""
    found = re.search(r"CUDA(?: UMD)? Version:\s*([\d.]+)", text)
    return found[1] if found else ""


def process_megabytes(pid: int) -> dict[str, Any]:
    """GPU memory of a process, as the driver counts it; where it does not say whose is whose, of the whole GPU."""
    table = ask_driver("-i", chosen_gpu(), "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits")
    found = parse_memory(table, pid)
    if found is not None:
        return {"megabytes": found, "of": "the process"}
    whole = ask_driver("-i", chosen_gpu(), "--query-gpu=memory.used", "--format=csv,noheader,nounits").strip()
    if whole in UNKNOWN:
        return {"skipped": f"nvidia-smi does not say how much GPU memory is used: {whole!r}"}
    return {"megabytes": float(whole) * 2**20 / 1e6, "of": "the whole GPU: the driver does not tell processes apart"}


def parse_memory(table: str, pid: int) -> float | None:
    """Megabytes (10⁶ bytes) of a process, from lines `pid, MiB`; None where it is not listed with a number."""
    found = [line.split(",") for line in table.splitlines() if "," in line]
    used = [second.strip() for first, second, *_ in found if first.strip() == str(pid)]
    numbers = [float(text) for text in used if text not in UNKNOWN]
    return sum(numbers) * 2**20 / 1e6 if numbers else None


def commit() -> str:
    """The checked-out commit; "" outside a repository."""
    git = ("git", "-C", str(REPOSITORY), "rev-parse", "HEAD")
    try:
        answer = subprocess.run(git, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""


def code_digest() -> str:
    """SHA-256 over every Python file that decides what a line does, so that a change that is not committed counts."""
    digest = hashlib.sha256()
    for folder in CODE:
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            digest.update(f"{path.relative_to(REPOSITORY)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def package_versions() -> dict[str, str]:
    """Installed packages that a result may depend on, NVIDIA's libraries among them."""
    found = {(one.metadata["Name"] or "").lower(): one.version for one in distributions()}
    return {name: found[name] for name in sorted(found) if VERSIONS.match(name)}


def describe(gpu: dict[str, str] | None) -> dict[str, Any]:
    """Everything that the report says about the machine. No names of hosts or users."""
    return {
        "gpu": gpu,
        "commit": commit(),
        "code": code_digest(),
        "packages": package_versions(),
        "machine": describe_machine(),
    }


def fingerprint(environment: dict[str, Any]) -> str:
    """What a kept result was measured with: another commit, code, GPU, driver or version measures again."""
    kept = {name: environment[name] for name in ("gpu", "commit", "code", "packages")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]
