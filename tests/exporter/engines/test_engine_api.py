"""The calls of TensorRT that the code makes, against what TensorRT 11 removed and what TensorRT-RTX has.

Classic TensorRT is not among the packages that tests can install, so its part is checked by reading the code: one code
path for versions 10 and 11 is one that uses nothing of what is gone.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
FILES = sorted([*(ROOT / "exporter" / "engines").glob("*.py"), *(ROOT / "runtime").glob("tensorrt_*.py")])

# Source: TensorRT 11 migration notes.
REMOVED = {
    *("FP16", "BF16", "INT8", "FP8", "INT4", "PREFER_PRECISION_CONSTRAINTS", "OBEY_PRECISION_CONSTRAINTS"),
    *("EXPLICIT_BATCH", "int8_calibrator", "IInt8EntropyCalibrator2", "IInt8MinMaxCalibrator"),
    *("set_output_type", "dynamic_range", "set_dynamic_range", "supports_model", "device_memory_size"),
    *("platform_has_fast_fp16", "platform_has_fast_int8", "build_engine", "max_workspace_size", "max_batch_size"),
    *("execute_async", "execute_async_v2", "num_bindings", "get_binding_shape", "set_binding_shape"),
}


def attributes(path):
    """Every `a.b` of a file, as (name of a where it is a plain name, b)."""
    nodes = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute))
    return {(node.value.id if isinstance(node.value, ast.Name) else "", node.attr) for node in nodes}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_nothing_is_used_that_tensorrt_11_removed(path):
    assert not {(owner, name) for owner, name in attributes(path) if name in REMOVED}


def test_this_test_would_find_a_removed_flag(tmp_path):
    path = tmp_path / "old.py"
    path.write_text("config.set_flag(trt.BuilderFlag.FP16)\nconfig.max_workspace_size = 1")
    assert {name for _, name in attributes(path) if name in REMOVED} == {"FP16", "max_workspace_size"}


def test_networks_are_strongly_typed_and_tf32_is_off():
    names = {name for _, name in attributes(ROOT / "exporter" / "engines" / "builder.py")}
    assert {"STRONGLY_TYPED", "TF32", "clear_flag", "parse_from_file"} <= names
    assert "set_flag" not in names


def test_what_is_called_on_the_library_and_its_objects_exists_in_tensorrt_rtx():
    rtx = pytest.importorskip("tensorrt_rtx", reason="needs the extra rtx: pip install 'qpert[rtx]'")
    owners = {
        "library": rtx,
        "builder": rtx.Builder,
        "config": rtx.IBuilderConfig,
        "parser": rtx.OnnxParser,
        "profile": rtx.IOptimizationProfile,
        "error": rtx.ParserError,
    }
    used = {pair for pair in attributes(ROOT / "exporter" / "engines" / "builder.py") if pair[0] in owners}
    assert {"build_serialized_network", "num_compute_capabilities", "set_shape", "desc"} <= {name for _, name in used}
    assert not {(owner, name) for owner, name in used if not hasattr(owners[owner], name)}


def test_the_timing_cache_is_for_classic_tensorrt_alone():
    from qpert.runtime.sessions.tensorrt.libraries import FLAVORS

    assert {flavor.name for flavor in FLAVORS.values() if flavor.uses_timing_cache} == {"classic"}
