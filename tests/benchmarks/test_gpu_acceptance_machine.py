"""The machine: what nvidia-smi says, what a result depends on, and what is said where something is missing.

nvidia-smi is a script that prints what the real one does; nothing else is pretended.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from gpu_acceptance import __main__ as program
from gpu_acceptance import environment, goals, judge
from gpu_acceptance.lines import Line
from gpu_acceptance.plan import PARITY, Plan

from qpert.runtime.errors import UnavailableError

H100 = "NVIDIA H100 80GB HBM3, 550.54.15, 9.0, 81559 MiB"
TABLE = """\
Fri Nov 27 16:40:01 2026
+-----------------------------------------------------------------------------------------+
| NVIDIA-SMI 550.54.15              Driver Version: 550.54.15      CUDA Version: 12.4     |
|-----------------------------------------+------------------------+----------------------+
"""
SMI = """\
#!/bin/sh
case "$*" in
  *--query-gpu=memory.used*) echo "{used}" ;;
  *--query-gpu=*) echo "{gpu}" ;;
  *--query-compute-apps=*) printf '{processes}' ;;
  *) cat <<'TABLE'
{table}TABLE
;;
esac
"""


@pytest.fixture
def smi(tmp_path, monkeypatch):
    """Puts an nvidia-smi that answers like this on the path."""

    def install(*, gpu=H100, used="1503", processes="", table=TABLE):
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        script = folder / "nvidia-smi"
        script.write_text(SMI.format(gpu=gpu, used=used, processes=processes, table=table))
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return install


def test_the_gpu_its_driver_and_its_cuda_are_read_from_nvidia_smi(smi):
    smi()
    assert environment.describe_gpu() == {
        "name": "NVIDIA H100 80GB HBM3",
        "driver": "550.54.15",
        "capability": "9.0",
        "memory": "81559 MiB",
        "cuda": "12.4",
    }


@pytest.mark.parametrize("answer", ["", "No devices were found", "NVIDIA L4, 550.54.15"])
def test_an_answer_without_a_gpu_is_an_error(smi, answer):
    smi(gpu=answer)
    with pytest.raises(UnavailableError):
        environment.describe_gpu()


def test_hidden_gpus_are_none(smi, monkeypatch):
    smi()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(UnavailableError, match="CUDA_VISIBLE_DEVICES"):
        environment.describe_gpu()


def test_memory_is_the_processs_where_the_driver_tells_them_apart(smi):
    """nvidia-smi counts in MiB: 3,052 of them are 3,200.3 million bytes."""
    smi(processes=r"4242, 3052\n17, 9\n")
    found = environment.process_megabytes(4242)
    assert found["of"] == "the process"
    assert found["megabytes"] == pytest.approx(3200.25, abs=0.01)


@pytest.mark.parametrize("processes", ["", r"4242, [N/A]\n", r"17, 9\n"])
def test_memory_is_the_whole_gpus_where_it_does_not_and_says_so(smi, processes):
    """In a container processes have other numbers; under WSL and MIG there are none."""
    smi(processes=processes)
    found = environment.process_megabytes(4242)
    assert "the whole GPU" in found["of"]
    assert found["megabytes"] == pytest.approx(1503 * 1.048576)


def test_memory_that_is_not_told_is_skipped(smi):
    smi(used="[N/A]")
    assert set(environment.process_megabytes(1)) == {"skipped"}


def test_results_depend_on_commit_code_gpu_driver_and_packages(smi):
    smi()
    before = environment.describe(environment.describe_gpu())
    kept = environment.fingerprint(before)
    assert kept == environment.fingerprint(before | {"machine": {"load": 99}})
    for change in (
        {"commit": "another"},
        {"code": "another"},
        {"packages": before["packages"] | {"torch": "2.14.0"}},
        {"gpu": before["gpu"] | {"driver": "570.00"}},
        {"gpu": before["gpu"] | {"name": "NVIDIA L4"}},
    ):
        assert environment.fingerprint(before | change) != kept, change
    assert {"torch", "onnx", "numpy", "qpert"} <= set(before["packages"])


def test_without_a_gpu_it_says_so_and_offers_the_dry_run(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", "/nowhere")
    assert program.main(["--work", str(tmp_path / "work")]) == 3
    said = capsys.readouterr()
    assert said.out == ""
    assert "no nvidia-smi" in said.err
    assert "make gpu-acceptance-dry-run" in said.err
    assert not (tmp_path / "work").exists()


def test_its_environment_is_not_made_where_there_is_no_driver(tmp_path):
    """No gigabytes are fetched to find out that there is no GPU."""
    script = Path(__file__).parents[2] / "tools" / "gpu_env.sh"
    variables = {"PATH": "/usr/bin:/bin", "QPERT_GPU_ENV": str(tmp_path / "env")}
    if shutil.which("nvidia-smi", path=variables["PATH"]):
        pytest.skip("this machine has a driver")
    found = subprocess.run(["sh", str(script)], env=variables, capture_output=True, text=True)
    assert found.returncode == 3
    assert "make gpu-acceptance-dry-run" in found.stderr
    assert not (tmp_path / "env").exists()


def test_without_packages_it_says_what_to_install(smi, monkeypatch, tmp_path, capsys):
    smi()
    monkeypatch.setattr(environment, "NEEDED", {"torch": "torch", "no_such_module": "such-package"})
    assert program.main(["--work", str(tmp_path / "work")]) == 3
    said = capsys.readouterr().err
    assert "such-package not installed here; pip install 'qpert[gpu,export,test]'" in said


@pytest.fixture
def accepted(smi, monkeypatch, tmp_path):
    """Runs an acceptance of lines that print the given documents, on a pretended H100."""

    def run(*documents, arguments=()):
        smi()
        lines = [
            Line(
                f"verify-{number}",
                PARITY,
                f"line {number}",
                (sys.executable, "-c", f"print({json.dumps(json.dumps(made))})"),
                judge.verified,
                goals.GATES,
            )
            for number, made in enumerate(documents)
        ]
        monkeypatch.setattr(Plan, "lines", lambda plan: iter(lines))
        monkeypatch.setattr(program, "COMMITTED", tmp_path / "results")
        code = program.main(["--work", str(tmp_path / "work"), *arguments])
        written = tmp_path / "results" / "gpu_acceptance_nvidia_h100_80gb_hbm3.json"
        return code, json.loads(written.read_text()), written.with_suffix(".html").read_text()

    return run


def verified(value):
    gate = {"name": "itm: max abs difference", "value": value, "limit": 0.5, "pass": value <= 0.5}
    return {"verdict": "pass" if value <= 0.5 else "fail", "gates": [gate]}


def test_an_acceptance_is_written_under_its_gpus_name_and_ends_with_0(accepted, capsys):
    code, made, page = accepted(verified(0.1), {"skipped": "TensorRT is not installed"})
    assert code == 0
    assert made["dry_run"] is False
    assert made["verdict"] == "passed"
    assert made["counts"] == {"passed": 1, "skipped": 1}
    assert made["skipped"] == {"verify-1": "TensorRT is not installed"}
    assert made["environment"]["gpu"]["name"] == "NVIDIA H100 80GB HBM3"
    assert "GPU acceptance on NVIDIA H100 80GB HBM3" in page
    said = capsys.readouterr()
    assert said.out.splitlines()[0].endswith("gpu_acceptance_nvidia_h100_80gb_hbm3.json")
    assert "skipped: verify-1: TensorRT is not installed" in said.err


def test_a_failed_line_ends_with_1_and_is_red_on_the_page(accepted):
    code, made, page = accepted(verified(0.1), verified(0.7))
    assert code == 1
    assert made["verdict"] == "failed"
    assert set(made["failed"]) == {"verify-1"}
    assert '<span class="badge bad">FAILED</span>' in page
    assert '<span class="badge bad">FAIL</span>' in page


def test_where_everything_was_skipped_nothing_was_accepted(accepted):
    code, made, _ = accepted({"skipped": "ONNX Runtime has no CUDA"}, {"skipped": "TensorRT is not installed"})
    assert code == 3
    assert made["verdict"] == "nothing shown"


def test_the_documented_exit_codes_and_files_are_these():
    text = (Path(__file__).parents[2] / "docs" / "guides" / "gpu-acceptance.md").read_text(encoding="utf-8")
    assert "benchmarks/results/gpu_acceptance_<gpu>.json" in text
    assert "build/gpu-acceptance/dry-run" in text
    assert program.COMMITTED.parts[-2:] == ("benchmarks", "results")
