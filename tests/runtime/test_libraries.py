"""Libraries are loaded without their telemetry, and every import of ONNX Runtime goes through the one place."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qpert.runtime import libraries
from qpert.runtime.errors import BundleError
from qpert.runtime.libraries import TELEMETRY_SWITCHES, turn_off_telemetry
from qpert.runtime.sessions import onnx
from qpert.runtime.sessions.providers import find_provider

ROOT = Path(__file__).parents[2]
OPEN = "from qpert.runtime import Retriever; Retriever.open({bundle!r}).encode_texts(['a dog'])"
LOOK = "from qpert.runtime.sessions.doctor import examine; examine()"
"""`qpert doctor` starts every provider."""


def files_in_home(program, home, **variables):
    """What a fresh process leaves below an empty home folder."""
    cleared = {*TELEMETRY_SWITCHES, "XDG_CACHE_HOME"}
    environment = {name: value for name, value in os.environ.items() if name not in cleared}
    environment |= {"HOME": str(home), "QPERT_CACHE": str(home.parent / "qpert-cache"), **variables}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, capture_output=True, timeout=600)
    return sorted(path.relative_to(home).as_posix() for path in home.rglob("*") if path.is_file())


@pytest.mark.parametrize("program", [OPEN, LOOK], ids=["opening a bundle", "doctor"])
def test_an_empty_home_stays_empty(tiny_bundle, tmp_path, program):
    home = tmp_path / "home"
    home.mkdir()
    assert files_in_home(program.format(bundle=str(tiny_bundle)), home) == []


def test_a_user_who_has_set_the_switch_keeps_what_was_set(tiny_bundle, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    program = f"{OPEN}; import os; assert os.environ['ORT_DISABLE_TELEMETRY'] == '0'"
    found = files_in_home(program.format(bundle=str(tiny_bundle)), home, ORT_DISABLE_TELEMETRY="0")
    assert all(name.startswith(".cache/Microsoft/") for name in found)  # none with an ONNX Runtime before 1.29


def test_every_switch_is_set_and_none_is_replaced(monkeypatch):
    monkeypatch.delenv("HF_HUB_DISABLE_TELEMETRY", raising=False)
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "")
    turn_off_telemetry()
    assert (os.environ["HF_HUB_DISABLE_TELEMETRY"], os.environ["ORT_DISABLE_TELEMETRY"]) == ("1", "")
    monkeypatch.delenv("HF_HUB_DISABLE_TELEMETRY")


IMPORT = re.compile(r"^\s*(?:from|import) (onnxruntime|huggingface_hub|transformers)\b")
OTHER_ENVIRONMENTS = {"lavis_worker.py", "modelopt_worker.py"}
"""Started with the environment of the process that turned telemetry off."""


def test_openvino_is_imported_in_one_place():
    """Where its telemetry package is hidden; `test_an_empty_home_stays_empty[doctor]` shows that this is enough."""
    packages = (ROOT / package for package in ("runtime", "exporter", "calibration", "graphs", "benchmarks"))
    line = re.compile(r"^\s*(?:from|import) openvino\b", re.MULTILINE)
    found = [path for package in packages for path in package.rglob("*.py") if line.search(path.read_text("utf-8"))]
    assert [path.relative_to(ROOT).as_posix() for path in found] == ["runtime/libraries.py"]


def test_no_module_imports_a_library_that_has_telemetry_before_it_is_turned_off():
    found = {}
    for package in ("runtime", "exporter", "calibration", "graphs"):
        for path in (ROOT / package).rglob("*.py"):
            lines = path.read_text(encoding="utf-8").splitlines()
            for number, line in enumerate(lines):
                if path.name not in OTHER_ENVIRONMENTS and IMPORT.match(line):
                    before = "\n".join(lines[max(0, number - 4) : number])
                    found[f"{path.relative_to(ROOT)}:{number + 1}"] = "turn_off_telemetry()" in before
    assert found, "the pattern finds the imports"
    assert [place for place, turned_off in found.items() if not turned_off] == []


class NoisyOnnxRuntime:
    """What is called of ONNX Runtime where the CUDA provider is asked for, in order; sessions fail to open."""

    __version__ = "1.31.1"

    def __init__(self):
        self.calls = []

    def get_available_providers(self):
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def preload_dlls(self, **options):
        self.calls.append(("preload", options))
        print("Failed to load libcudnn.so.9")

    class SessionOptions:
        def add_session_config_entry(self, *entry): ...

    def InferenceSession(self, *arguments, **options):  # noqa: N802
        self.calls.append(("session", options["providers"]))
        raise RuntimeError("no session here")


@pytest.mark.parametrize(("provider", "expected"), [("cuda", ["preload", "session"]), ("cpu", ["session"])])
def test_cudas_libraries_are_loaded_before_a_session_that_needs_them(monkeypatch, tmp_path, capsys, provider, expected):
    """NVIDIA's packages are not where the provider looks for them (its file has no RPATH). What is missing is said by
    the session's error, not on stdout."""
    fake = NoisyOnnxRuntime()
    for module in (libraries, onnx):
        monkeypatch.setattr(module, "load_onnxruntime", lambda: fake)
    with pytest.raises(BundleError):
        onnx.start_onnxruntime(tmp_path / "graph.onnx", find_provider(provider), 0)
    assert [name for name, _ in fake.calls] == expected
    assert capsys.readouterr().out == ""
    assert [options for name, options in fake.calls if name == "preload"] == [{"directory": ""}] * (provider == "cuda")
