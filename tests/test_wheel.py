"""The built wheel in an environment of its own, without torch: not the folder that these tests run in."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
CODE = ("runtime", "graphs", "exporter", "calibration")
STARTS = 120
"""Seconds until a service has failed to start: far more than it takes."""

PROGRAM = """
import json, sys
from qpert.runtime import Boxes, Retriever
bundle, photo, boxes, size = json.loads(sys.argv[1])
with Retriever.open(bundle, provider="cpu") as retriever:
    features = retriever.encode_images([photo], boxes=[Boxes(boxes, tuple(size))])
    itc = retriever.itc_scores(features.query_embeds, retriever.encode_texts(["a cup of coffee", "a cat"]))
    itm = retriever.itm_scores(features, ["a cup of coffee", "a cat"])
print(json.dumps({
    "queries": features.query_embeds.tolist(), "itc": itc.tolist(), "itm": itm.tolist(),
    "torch": "torch" in sys.modules, "home": sys.modules["qpert.runtime"].__file__,
}))
"""


def run(*command, **options):
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    answer = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=clean, **options)
    assert answer.returncode == 0, f"{command}\n{answer.stdout}\n{answer.stderr}"
    return answer.stdout


def packages():
    """Every package folder of the working tree."""
    return [path.parent.relative_to(ROOT) for part in CODE for path in sorted((ROOT / part).rglob("__init__.py"))]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy without ignored files, so that nothing built before gets in."""
    copy = tmp_path_factory.mktemp("source") / "qpert"
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", "dist")
    for part in (*CODE, "src"):
        shutil.copytree(ROOT / part, copy / part, ignore=skip, symlinks=True)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy)
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", out, copy)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def sdist_wheel(tmp_path_factory):
    """The wheel that is built from the source distribution, which holds files where the repository has links."""
    copy = tmp_path_factory.mktemp("source") / "qpert"
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", "dist")
    for part in (*CODE, "src"):
        shutil.copytree(ROOT / part, copy / part, ignore=skip, symlinks=True)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy)
    out = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, copy)  # sdist, then a wheel of it
    (built,) = out.glob("*.whl")
    assert list(out.glob("*.tar.gz"))
    return built


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """The interpreter of a fresh environment with `qpert[cpu]` from the wheel."""
    folder = tmp_path_factory.mktemp("fresh") / "venv"
    venv.create(folder, with_pip=True)
    found = folder / "bin" / "python"
    constraints = ["-c", ROOT / "constraints.txt"] if (ROOT / "constraints.txt").is_file() else []
    run(found, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *constraints, f"{wheel}[cpu]")
    return found


@pytest.fixture(scope="module")
def serving_python(sdist_wheel, tmp_path_factory):
    """The interpreter of a fresh environment with `qpert[cpu,serve]` from the source distribution."""
    folder = tmp_path_factory.mktemp("serving") / "venv"
    venv.create(folder, with_pip=True)
    found = folder / "bin" / "python"
    constraints = ["-c", ROOT / "constraints.txt"] if (ROOT / "constraints.txt").is_file() else []
    run(
        found,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        *constraints,
        f"{sdist_wheel}[cpu,serve]",
    )
    return found


def test_the_wheel_holds_every_package_of_the_repository_and_its_data(wheel):
    inside = set(zipfile.ZipFile(wheel).namelist())
    assert packages()
    for package in packages():
        for path in (ROOT / package).glob("*.py"):
            assert f"qpert/{package.as_posix()}/{path.name}" in inside
    data = {
        path
        for part in CODE
        for path in (ROOT / part).rglob("*")
        if path.suffix in (".txt", ".safetensors", ".typed", ".html", ".json")
    }
    assert ROOT / "exporter" / "demo" / "vocab.txt" in data
    for path in data:
        if path.is_file() and "__pycache__" not in path.parts:
            assert f"qpert/{path.relative_to(ROOT).as_posix()}" in inside
    for part in CODE:
        assert f"qpert/{part}/py.typed" in inside
    assert "qpert/runtime/serving/page.html" in inside


def test_the_source_distribution_makes_the_same_wheel(wheel, sdist_wheel):
    def names(path):
        return sorted(name for name in zipfile.ZipFile(path).namelist() if not name.endswith("RECORD"))

    assert names(sdist_wheel) == names(wheel)


def test_the_wheel_holds_no_tests_and_no_bare_packages(wheel):
    tops = {name.partition("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"qpert"}


def test_the_installed_wheel_has_no_torch_and_doctor_says_what_there_is(python):
    listed = {entry["name"].lower() for entry in json.loads(run(python, "-m", "pip", "list", "--format", "json"))}
    assert not listed & {"torch", "onnx", "onnxscript", "transformers", "onnx-graphsurgeon"}
    document = json.loads(run(python.with_name("qpert"), "doctor", "--json"))
    assert document["provider cpu"]["usable"]
    assert not document["extra export"]["usable"]
    assert document["extra export"]["advice"] == "pip install 'qpert[export]'"


def test_the_installed_wheel_says_what_exporting_needs(python, tmp_path):
    answer = subprocess.run(
        [python.with_name("qpert-export"), "blip2", "--out", tmp_path / "b"], capture_output=True, text=True
    )
    assert answer.returncode == 3
    assert "pip install 'qpert[export]'" in answer.stderr
    assert "Traceback" not in answer.stderr


def test_the_installed_wheel_encodes_a_photograph_as_this_environment_does(
    python, demo_bundle, photos, photo_boxes, tmp_path
):
    (number,) = [i for i, photo in enumerate(photos) if photo.name == "coffee.jpg"]
    boxes = photo_boxes[number]
    argument = json.dumps([str(demo_bundle), str(photos[number]), boxes.xyxy.tolist(), boxes.size])
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    fresh, here = (json.loads(run(each, program, argument, cwd=tmp_path)) for each in (python, sys.executable))
    assert str(python.parents[1]) in fresh.pop("home")
    assert not fresh.pop("torch")
    for name, values in fresh.items():
        # the same ONNX Runtime or a newer one: float32 sums in another order
        np.testing.assert_allclose(values, here[name], rtol=0, atol=1e-4)


def test_the_installed_wheel_verifies_and_inspects_a_bundle(python, tiny_bundle, copy_of):
    folder = copy_of(tiny_bundle)
    assert json.loads(run(python.with_name("qpert"), "verify", folder, "--json"))["verdict"] == "pass"
    assert json.loads(run(python.with_name("qpert"), "inspect", folder, "--json"))["files_ok"]


def test_the_installed_wheel_indexes_and_searches(python, tiny_bundle, photos, tmp_path):
    qpert, gallery = python.with_name("qpert"), tmp_path / "gallery"
    run(qpert, "index", tiny_bundle, photos[0].parent, "--out", gallery)
    document = json.loads(run(qpert, "search", gallery, "a cup of coffee", "-k", 2, "--json"))
    assert len(document["hits"]) == 2
    assert {hit["image"] for hit in document["hits"]} <= {photo.name for photo in photos}


def test_an_installed_source_distribution_serves_what_the_command_line_finds(
    serving_python, tiny_bundle, photos, tmp_path
):
    listed = {
        entry["name"].lower() for entry in json.loads(run(serving_python, "-m", "pip", "list", "--format", "json"))
    }
    assert not listed & {"torch", "onnx", "transformers"}
    qpert, gallery = serving_python.with_name("qpert"), tmp_path / "gallery"
    run(qpert, "index", tiny_bundle, photos[0].parent, "--out", gallery)
    expected = json.loads(run(qpert, "search", gallery, "a cup of coffee", "-k", 2, "--json"))["hits"]
    log = tmp_path / "service.log"
    with log.open("w") as written:
        service = subprocess.Popen(
            [qpert, "serve", tiny_bundle, "--gallery", gallery, "--port", "0"], stderr=written, cwd=tmp_path
        )
    try:
        answer = search_of(service, log, {"text": "a cup of coffee", "k": 2})
    finally:
        service.terminate()
        service.wait(STARTS)
    assert [hit["image"] for hit in answer["hits"]] == [hit["image"] for hit in expected]
    # the same library on the same machine; batches may be cut otherwise: float32 sums in another order
    np.testing.assert_allclose(
        [hit["score"] for hit in answer["hits"]], [hit["score"] for hit in expected], rtol=0, atol=1e-4
    )


def search_of(service, log, query):
    """The answer of `/v1/search`, once the service is ready."""
    end = time.monotonic() + STARTS
    while time.monotonic() < end and service.poll() is None:
        found = re.search(r" on (http://\S+)", log.read_text())
        if found:
            body = json.dumps(query).encode()
            request = urllib.request.Request(f"{found[1]}/v1/search", body, {"Content-Type": "application/json"})
            try:
                with urllib.request.urlopen(request, timeout=STARTS) as answer:
                    return json.loads(answer.read())
            except OSError:  # not ready yet: 503, or not bound
                pass
        time.sleep(0.2)
    raise AssertionError(f"the service did not answer: {log.read_text()}")
