"""The NVIDIA GPUs of this machine, by `nvidia-smi`, which comes with the driver: nothing else needs to be installed."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass

from qpert.runtime.errors import UnavailableError

FIRST_WITH = {"bf16": 80, "fp8": 89}
"""The first compute capability (without its dot) that has products of a precision; NVIDIA's support matrix of TensorRT.
TensorRT-RTX parses such a graph for an older one (bf16 for sm75, FP8 for sm80) and then cannot compile it."""
QUERY = ("--query-gpu=name,driver_version,compute_cap", "--format=csv,noheader")


@dataclass(frozen=True)
class Gpu:
    """One GPU. `capability` is its compute capability, "8.9" for example."""

    name: str
    driver: str
    capability: str

    @property
    def architecture(self) -> str:
        """As `--target` takes it: `sm89` for compute capability 8.9."""
        return "sm" + self.capability.replace(".", "")

    def __str__(self) -> str:
        return f"{self.name} ({self.architecture}, driver {self.driver})"


def find_gpus() -> tuple[Gpu, ...]:
    """Every GPU of this machine, in CUDA's order as a rule; at least one.

    Raises:
        UnavailableError: there is none, or the driver does not answer; the message says which.
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        raise UnavailableError("no nvidia-smi: no NVIDIA driver", code="nvidia-driver-missing")
    try:
        answer = subprocess.run([program, *QUERY], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnavailableError(f"nvidia-smi does not answer ({error})", code="nvidia-smi-failed") from error
    lines = answer.stdout.strip().splitlines()
    if answer.returncode or not lines:
        message = (answer.stderr or answer.stdout).strip()[:200]
        raise UnavailableError(message or "nvidia-smi shows no GPU", code="gpu-missing")
    return tuple(parse_gpu(line) for line in lines)


def parse_gpu(line: str) -> Gpu:
    """One line of nvidia-smi's answer: `NVIDIA L4, 550.54.15, 8.9`."""
    parts = [part.strip() for part in line.rsplit(",", 2)]
    if len(parts) != 3 or not parts[2].replace(".", "").isdigit():
        raise UnavailableError(
            f"nvidia-smi says {line!r}, expected a name, a driver version and a compute capability",
            code="nvidia-smi-answer",
        )
    return Gpu(*parts)


def first_gpu() -> Gpu | None:
    """The GPU that is used where none is named; None where there is none."""
    try:
        return find_gpus()[0]
    except UnavailableError:
        return None
