"""The dry run from end to end on the smallest model: killed midway, resumed, and with a line that fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def start(work: Path, *arguments: str) -> subprocess.Popen[str]:
    """`make gpu-acceptance-dry-run`, in a work folder of its own."""
    command = [sys.executable, "-m", "gpu_acceptance", "--dry-run", "--work", str(work), *arguments]
    paths = os.pathsep.join(str(ROOT / name) for name in ("benchmarks", "src"))
    environment = os.environ | {"PYTHONPATH": paths}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True, cwd=ROOT)


def finished(work: Path, *arguments: str) -> tuple[int, dict, str, str]:
    """Exit code, JSON, page and what was said."""
    process = start(work, *arguments)
    out, said = process.communicate(timeout=900)
    files = [Path(line) for line in out.splitlines()]
    assert [file.name for file in files] == ["report.json", "report.html"], said
    return process.returncode, json.loads(files[0].read_text()), files[1].read_text(), said


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work folder of a run that was killed while the export ran."""
    folder = tmp_path_factory.mktemp("acceptance") / "work"
    process = start(folder)
    deadline = time.monotonic() + 300
    while not (folder / "logs" / "export-small-fp32.txt").exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.communicate()
    return folder


@pytest.fixture(scope="module")
def resumed(work: Path) -> tuple[int, dict, str, str]:
    return finished(work)


def test_a_killed_run_resumes_where_it_was(work: Path, resumed: tuple[int, dict, str, str]) -> None:
    _, made, _, said = resumed
    assert "random weights: passed before" in said.splitlines()[1]
    assert [line for line in said.splitlines() if "passed before" in line] == said.splitlines()[1:2]
    assert made["counts"].get("not run") is None
    assert len(made["lines"]) == len(list((work / "results").iterdir()))


def test_every_line_passes_on_the_cpu_but_the_gpu_tests(resumed: tuple[int, dict, str, str]) -> None:
    """What else is skipped needs a library: TensorRT-RTX to build engines."""
    code, made, _, said = resumed
    statuses = {row["name"]: row["status"] for row in made["lines"]}
    assert code == 0, said
    assert {name for name, status in statuses.items() if status != "passed"} <= {"tests", "engines-small-fp32-rtx"}
    assert all(row["checks"] and row["checks"][0]["goal"] for row in made["lines"])


def test_figures_of_speed_are_there_and_are_not_judged(resumed: tuple[int, dict, str, str]) -> None:
    lines = {row["name"]: row for row in resumed[1]["lines"]}
    measured = [name for name in lines if name.split("-")[0] in ("speed", "share", "memory", "evaluation")]
    measured.remove("memory-torch")
    assert len(measured) == 7
    checks = [check for name in measured for check in lines[name]["checks"]]
    assert {check["status"] for check in checks} <= {"not judged", "skipped"}  # torch.compile needs a compiler
    assert all(check["value"] > 0 for check in checks if check["what"].endswith("against torch-sdpa"))
    assert set(lines["evaluation-cpu"]["figures"]["data_sets"]) == {"Flickr30K", "COCO-5K"}


def test_it_cannot_be_mistaken_for_an_acceptance(work: Path, resumed: tuple[int, dict, str, str]) -> None:
    _, made, page, said = resumed
    assert made["dry_run"] is True
    assert made["verdict"] == "dry run passed"
    assert made["environment"]["gpu"] is None
    assert "THIS IS NOT AN ACCEPTANCE</h1>" in page
    assert "this is not an acceptance" in said
    assert list((ROOT / "benchmarks" / "results").glob("gpu_acceptance_*none*")) == []


def test_a_damaged_bundle_fails_its_line_with_exit_code_1_and_red_on_the_page(
    work: Path, resumed: tuple[int, dict, str, str]
) -> None:
    (weights,) = (work / "small-fp32" / "onnx").glob("vision*.data")
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))
    (work / "results" / "verify-small-fp32-cpu-tensor.json").unlink()
    code, made, page, said = finished(work)
    assert code == 1
    assert made["verdict"] == "dry run failed"
    assert set(made["failed"]) == {"verify-small-fp32-cpu-tensor"}
    assert page.count('<span class="badge bad">FAIL</span>') == 1
    assert "failed: verify-small-fp32-cpu-tensor:" in said
    assert said.count("passed before") >= len(made["lines"]) - 3
