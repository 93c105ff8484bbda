"""GPUs, as `nvidia-smi` tells of them. A script stands in for it."""

from __future__ import annotations

import pytest

from qpert.runtime.errors import UnavailableError
from qpert.runtime.sessions.gpus import Gpu, find_gpus, first_gpu, parse_gpu


@pytest.fixture
def smi(tmp_path, monkeypatch):
    """Puts a script in the place of nvidia-smi."""

    def install(script):
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")

    return install


def test_every_gpu_has_a_name_a_driver_and_an_architecture(smi):
    smi("echo 'NVIDIA L4, 580.65.06, 8.9'; echo 'NVIDIA RTX PRO 6000, 580.65.06, 12.0'")
    assert find_gpus() == (Gpu("NVIDIA L4", "580.65.06", "8.9"), Gpu("NVIDIA RTX PRO 6000", "580.65.06", "12.0"))
    assert [gpu.architecture for gpu in find_gpus()] == ["sm89", "sm120"]
    assert first_gpu() == find_gpus()[0]
    assert str(first_gpu()) == "NVIDIA L4 (sm89, driver 580.65.06)"


def test_a_name_with_commas_is_one_name():
    assert parse_gpu("NVIDIA A100, 80 GB, 580.65, 8.0") == Gpu("NVIDIA A100, 80 GB", "580.65", "8.0")


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo 'couldn''t communicate with the driver' >&2; exit 9", "couldnt communicate with the driver"),
        ("exit 0", "nvidia-smi shows no GPU"),
        ("echo 'NVIDIA K80, 470.1, [N/A]'", "expected a name, a driver version and a compute capability"),
    ],
)
def test_a_driver_that_does_not_answer_is_told_and_no_gpu_is_made_up(smi, script, words):
    smi(script)
    with pytest.raises(UnavailableError, match=words):
        find_gpus()
    assert first_gpu() is None


def test_without_nvidia_smi_there_is_no_driver(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnavailableError, match="no NVIDIA driver"):
        find_gpus()
