"""What `qpert doctor` says of a machine."""

import json

import pytest

from qpert.runtime.cli import run
from qpert.runtime.errors import UnavailableError
from qpert.runtime.sessions import doctor
from qpert.runtime.sessions.doctor import (
    EXTRAS,
    PROVIDERS,
    examine,
    find_builder,
    find_conflict,
    find_extra,
    find_gpu,
    find_provider_here,
)
from qpert.runtime.sessions.gpus import Gpu
from qpert.runtime.sessions.providers import available_providers
from qpert.runtime.sessions.tensorrt import libraries as flavors
from qpert.runtime.sessions.tensorrt.libraries import FLAVORS


def by_name(findings):
    return {finding.name: finding for finding in findings}


def test_the_cpu_provider_starts_here_and_is_the_default():
    found = by_name(examine())
    assert found["provider cpu"].usable
    assert found["provider cpu"].found == "the default"
    assert found["one ONNX Runtime"].usable


def test_every_provider_extra_and_the_gpu_are_looked_for():
    names = by_name(examine()).keys()
    assert {f"provider {name}" for name in PROVIDERS} <= names
    assert {f"extra {name}" for name in ("cpu", "gpu", "openvino", "export", "hf", "rtx", "trt")} <= names
    assert {"qpert", "python", "gpu", "build classic", "build rtx"} <= names


def test_what_is_missing_comes_with_what_to_do(monkeypatch):
    """On a machine that has nothing but Python, so that every finding has something to advise."""

    def missing(name):
        raise ModuleNotFoundError(name, name=name)

    monkeypatch.setattr(doctor, "installed", lambda package: None)
    monkeypatch.setattr(doctor, "available_providers", list)
    monkeypatch.setattr(doctor, "first_gpu", lambda: None)
    monkeypatch.setattr(flavors.importlib, "import_module", missing)
    found = {finding.name: (finding.usable, finding.advice) for finding in examine()}
    found.pop("gpu")  # what the driver of this machine says
    expected = {f"extra {extra}": (False, f"pip install 'qpert[{extra}]'") for extra in EXTRAS}
    expected |= {f"provider {each.name}": (False, f"needs {each.advice}") for each in PROVIDERS.values()}
    expected |= {
        f"build {flavor.name}": (False, f"{flavor.title} is not installed; {flavor.install}")
        for flavor in FLAVORS.values()
    }
    assert found == expected | dict.fromkeys(("qpert", "python", "one ONNX Runtime"), (True, ""))


class Library:
    """Stands in for a library of which only the version is asked."""

    __version__ = "10.14.1"


def test_rtx_builds_on_any_machine_and_says_for_which_gpus(monkeypatch):
    monkeypatch.setattr(doctor, "load_flavor", lambda flavor: Library)
    monkeypatch.setattr(doctor, "first_gpu", lambda: None)
    found = find_builder(FLAVORS["rtx"])
    assert found.usable
    assert found.found == "TensorRT-RTX 10.14.1: for sm75, sm80, sm86, sm89, sm120, sm121, on any machine"
    monkeypatch.setattr(doctor, "first_gpu", lambda: Gpu("NVIDIA H200", "580.1", "9.0"))
    assert find_builder(FLAVORS["rtx"]).found.endswith("on any machine, not for this machine's sm90")


def test_classic_tensorrt_builds_for_the_gpu_that_is_here(monkeypatch):
    monkeypatch.setattr(doctor, "load_flavor", lambda flavor: Library)
    monkeypatch.setattr(doctor, "first_gpu", lambda: Gpu("NVIDIA H200", "580.1", "9.0"))
    assert find_builder(FLAVORS["classic"]).found == "TensorRT 10.14.1: for this machine's sm90"
    monkeypatch.setattr(doctor, "first_gpu", lambda: None)
    found = find_builder(FLAVORS["classic"])
    assert not found.usable
    assert found.advice == "builds only on the GPU that runs the engine; none is here"


def test_a_tensorrt_that_is_not_installed_comes_with_what_to_install(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(name, name=name)

    monkeypatch.setattr(flavors.importlib, "import_module", missing)
    found = find_builder(FLAVORS["rtx"])
    assert not found.usable
    assert found.advice == "TensorRT-RTX is not installed; pip install 'qpert[rtx]'"


def test_doctor_prints_one_json_document(capsys):
    assert run(["doctor", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["provider cpu"] == {"name": "provider cpu", "usable": True, "found": "the default", "advice": ""}


def test_doctor_prints_a_table_for_a_person(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert run(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "provider cpu" in out
    assert "pip install 'qpert[trt]'" in out


def test_the_stored_model_is_an_identity():
    import numpy as np
    import onnxruntime

    session = onnxruntime.InferenceSession(doctor.IDENTITY, providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {"x": np.array([2.5], np.float32)})
    assert result.tolist() == [2.5]


def test_a_provider_that_is_there_and_does_not_start_is_not_usable(monkeypatch):
    monkeypatch.setattr(doctor, "available_providers", lambda: ["cpu", "cuda"])

    def fail(provider):
        raise UnavailableError("libcudnn is missing")

    monkeypatch.setattr(doctor, "start_provider", fail)
    found = find_provider_here(PROVIDERS["cuda"])
    assert (found.usable, found.found, found.advice) == (False, "there, does not start", "libcudnn is missing")


def test_a_provider_that_onnx_runtime_replaces_in_silence_is_not_usable():
    absent = [provider for provider in PROVIDERS.values() if provider.name not in available_providers()]
    absent = [provider for provider in absent if provider.onnxruntime]
    assert absent
    for provider in absent:
        with pytest.raises(UnavailableError, match="ONNX Runtime would use CPUExecutionProvider; needs"):
            doctor.start_provider(provider)


def test_two_onnx_runtimes_are_a_conflict(monkeypatch):
    monkeypatch.setattr(doctor, "installed", lambda package: "1.0")
    found = find_conflict()
    assert not found.usable
    assert "onnxruntime and onnxruntime-gpu are both installed" in found.found
    assert "pip uninstall" in found.advice


def test_an_extra_is_usable_when_all_of_it_is_installed(monkeypatch):
    monkeypatch.setattr(doctor, "installed", {"a": "1.2"}.get)
    assert find_extra("x", ("a",)) == doctor.Finding("extra x", True, "a 1.2", "")
    assert find_extra("x", ("a", "b")) == doctor.Finding("extra x", False, "a 1.2", "pip install 'qpert[x]'")
    assert find_extra("x", ("b",)).found == "not installed"


@pytest.mark.parametrize(
    ("script", "usable", "text"),
    [
        ("echo 'NVIDIA H200, 580.1, 9.0'", True, "NVIDIA H200 (sm90, driver 580.1)"),
        ("echo 'NVIDIA-SMI has failed' >&2; exit 9", False, "NVIDIA-SMI has failed"),
        ("exit 0", False, "nvidia-smi shows no GPU"),
    ],
)
def test_the_gpu_is_what_nvidia_smi_says(tmp_path, monkeypatch, script, usable, text):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    found = find_gpu()
    assert (found.usable, found.found) == (usable, text)


def test_without_nvidia_smi_there_is_no_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    found = find_gpu()
    assert not found.usable
    assert "no NVIDIA driver" in found.found
