"""The calls of TensorRT that the code makes, against NVIDIA's own Python bindings of every version that is supported.

`tools/trt_bindings_env.sh` installs them. Nothing can be built with them, since TensorRT itself is not there; but each
name, enum member, attribute and number of arguments that the code uses is looked up in each (`tests/trt_usage.py`).
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import trt_usage

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
FOLDERS = [str(ROOT / name) for name in ("runtime", "exporter", "calibration")]
BINDINGS = Path(os.environ.get("QPERT_TRT_BINDINGS", ROOT / ".cache" / "trt-bindings"))
PINS = re.findall(r"tensorrt-cu\d+-bindings==([\w.]+)", (ROOT / "tools" / "trt_bindings_env.sh").read_text())

REACHED = {
    ("builder.py", "OnnxParser.parse_from_file"),
    ("builder.py", "ParserError.desc"),
    ("builder.py", "set_shape(4 given)"),
    ("monitor.py", "Monitor defines IProgressMonitor.step_complete"),
    ("log.py", "Log defines ILogger.log"),
    ("session.py", "ICudaEngine.get_tensor_mode"),
    ("contexts.py", "IExecutionContext.execute_async_v3"),
}
"""Uses at the ends of long ways: the module goes through five functions and two classes to get there."""


def usage(version, *folders):
    """What `trt_usage` finds, with the bindings of one version, in an interpreter of its own."""
    folder = BINDINGS / version
    if not folder.is_dir():
        pytest.skip(f"NVIDIA's bindings {version} are not in {BINDINGS}: make trt-bindings")
    return run_usage("tensorrt_bindings", *folders, PYTHONPATH=str(folder), LD_LIBRARY_PATH=str(BINDINGS / "stubs"))


def run_usage(module, *folders, **environment):
    command = [sys.executable, trt_usage.__file__, module, *map(str, folders)]
    made = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True)
    return json.loads(made.stdout)


def named(uses):
    return {(Path(file).name, what) for file, _, what in uses}


@pytest.mark.parametrize("version", PINS)
def test_all_that_is_used_of_tensorrt_exists(version):
    found = usage(version, *FOLDERS)
    assert found["version"] == version
    assert found["problems"] == []
    assert named(found["uses"]) >= REACHED


def test_all_that_is_used_of_tensorrt_rtx_exists():
    """Its branches too: engines for GPUs of other machines, and contexts that capture by themselves."""
    pytest.importorskip("tensorrt_rtx", reason="needs the extra rtx: pip install 'qpert[rtx]'")
    found = run_usage("tensorrt_rtx", *FOLDERS)
    assert found["problems"] == []
    assert named(found["uses"]) >= REACHED | {
        ("builder.py", "IBuilderConfig.set_compute_capability"),
        ("contexts.py", "CudaGraphStrategy.WHOLE_GRAPH_CAPTURE"),
        ("contexts.py", "IRuntimeCache.deserialize"),
    }


def test_the_versions_tried_reach_from_the_lowest_that_is_allowed_to_the_newest_major():
    extra = re.search(r'^trt = \["tensorrt>=([\d.]+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    lowest = min(PINS, key=lambda version: [int(part) for part in re.findall(r"\d+", version)])
    assert lowest.startswith(extra[1])
    assert {version.partition(".")[0] for version in PINS} == {"10", "11"}


SHAPES = "profile.set_shape(name, smallest, optimal, largest)"
BROKEN = {
    "a flag": ("library.BuilderFlag.TF32", "library.BuilderFlag.TF33", "BuilderFlag.TF33"),
    "a function": ("library.OnnxParser(", "library.OnnxReader(", "tensorrt_bindings.OnnxReader"),
    "a method": ("config.clear_flag(", "config.forget_flag(", "IBuilderConfig.forget_flag"),
    "a method of what a method returned": ("error.desc()", "error.words()", "ParserError.words"),
    "one argument too many": ("(cache, False)", "(cache, False, 1)", "set_timing_cache(3 given)"),
    "arguments too few": (SHAPES, "profile.set_shape(name)", "set_shape(1 given)"),
    "a keyword": ("builder.create_network(", "builder.create_network(typed=", "create_network(0 given, typed=)"),
    "a callback": ("def step_complete(", "def step_done(", "Monitor defines IProgressMonitor.step_complete"),
}
"""Of each made-up thing: what stands in the code, what is put in its place, and what has to be found."""


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("version", [PINS[0], PINS[-1]])
def test_what_does_not_exist_is_found(tmp_path, version, broken):
    before, after, problem = BROKEN[broken]
    changed = 0
    (tmp_path / "exporter" / "engines").mkdir(parents=True)
    for source in (ROOT / "exporter" / "engines").glob("*.py"):
        text = source.read_text()
        changed += text.count(before)
        (tmp_path / "exporter" / "engines" / source.name).write_text(text.replace(before, after))
    assert changed
    found = usage(version, tmp_path, ROOT / "runtime")
    assert {what for _, _, what in found["problems"]} == {problem}


def test_what_tensorrt_11_removed_is_found_there_and_only_there(tmp_path):
    (tmp_path / "old.py").write_text(
        "from qpert.runtime.sessions.tensorrt.libraries import FLAVORS, load_flavor\n"
        "def fp16():\n"
        "    library = load_flavor(FLAVORS['classic'])\n"
        "    config = library.Builder(library.Logger()).create_builder_config()\n"
        "    config.set_flag(library.BuilderFlag.FP16)\n"
        "    if hasattr(library, 'CudaGraphStrategy'):\n"
        "        library.only_where_there_is_such_a_strategy()\n"
    )
    problems = {version: [what for *_, what in usage(version, tmp_path)["problems"]] for version in (PINS[0], PINS[-1])}
    assert problems == {PINS[0]: [], PINS[-1]: ["BuilderFlag.FP16"]}


def test_networks_are_strongly_typed_and_tf32_is_off():
    tree = ast.parse((ROOT / "exporter" / "engines" / "builder.py").read_text())
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert {"STRONGLY_TYPED", "TF32", "clear_flag", "parse_from_file"} <= names
    assert "set_flag" not in names


def test_the_timing_cache_is_for_classic_tensorrt_alone():
    from qpert.runtime.sessions.tensorrt.libraries import FLAVORS

    assert {flavor.name for flavor in FLAVORS.values() if flavor.uses_timing_cache} == {"classic"}
