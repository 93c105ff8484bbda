"""What importing the runtime brings along, in a fresh interpreter."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {
    "torch",
    "onnx",
    "onnxscript",
    "onnx_graphsurgeon",
    "tensorrt",
    "tensorrt_rtx",
    "transformers",
    "lavis",
    "openvino",
}

PROGRAM = """
import json, sys, time
began = time.perf_counter()
{statements}
took = time.perf_counter() - began
print(json.dumps({{"took": took, "modules": sorted({{name.partition(".")[0] for name in sys.modules}})}}))
"""


def loaded_by(statements):
    answer = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(statements=statements)], capture_output=True, text=True, check=True
    )
    result = json.loads(answer.stdout.splitlines()[-1])
    print(f"{statements!r}: {result['took']:.3f} s, {len(result['modules'])} top-level modules")
    return set(result["modules"])


def test_importing_the_runtime_loads_no_library_at_all():
    light = loaded_by("import qpert.runtime")
    assert not light & (HEAVY | {"numpy", "onnxruntime", "PIL", "tokenizers", "click", "rich", "safetensors"})


def test_stores_load_no_driver_before_one_is_used():
    names = loaded_by(
        "import qpert.runtime.cli.search, qpert.runtime.cli.index, qpert.runtime.stores.indexing, "
        "qpert.runtime.stores.searching"
    )
    assert not names & (HEAVY | {"psycopg", "qdrant_client", "qdrant_edge", "grpc"})
    assert "numpy" in names


def test_every_public_name_of_the_runtime_is_there_without_torch_or_onnx():
    names = loaded_by("import qpert.runtime as r\nfor name in r.__all__: getattr(r, name)")
    assert not names & HEAVY
    assert "numpy" in names


@pytest.mark.parametrize(
    "module",
    [
        *("verification", "verification.report", "sessions.doctor", "inputs.box_files", "bundle.samples", "cli"),
        *("cli.verify", "sessions.open", "forks", "libraries"),
    ],
)
def test_no_module_of_the_runtime_loads_torch_or_onnx(module):
    assert not loaded_by(f"import qpert.runtime.{module}") & HEAVY


def test_opening_a_bundle_and_encoding_loads_neither_torch_nor_onnx(tiny_bundle, photos):
    statements = "; ".join(
        [
            "from qpert.runtime import Retriever",
            f"r = Retriever.open({str(tiny_bundle)!r})",
            f"f = r.encode_images([{str(photos[0])!r}])",
            "r.itm_scores(f, ['a dog'])",
        ]
    )
    names = loaded_by(statements)
    assert not names & HEAVY
    assert "onnxruntime" in names


def test_an_unknown_name_is_an_attribute_error():
    import qpert.runtime

    with pytest.raises(AttributeError, match=r"module 'qpert\.runtime' has no attribute 'Retreiver'"):
        qpert.runtime.Retreiver  # noqa: B018


@pytest.mark.parametrize("name", ["boxes", "box_files"])
def test_documented_old_paths_still_work_and_say_where_they_went(name):
    program = (
        "import warnings; warnings.simplefilter('error')\n"
        f"try:\n    import qpert.runtime.{name}\nexcept Warning as warning:\n"
        "    print(type(warning).__name__, warning)\n"
        f"warnings.simplefilter('ignore')\nimport qpert.runtime.{name} as old, qpert.runtime.inputs.{name} as new\n"
        "assert old.Boxes is new.Boxes if hasattr(new, 'Boxes') else True\n"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == f"QpertWarning qpert.runtime.{name} is now qpert.runtime.inputs.{name}"


def test_the_runtime_names_no_module_of_the_other_packages():
    root = Path(__file__).parents[2] / "runtime"
    imports = [
        (path.relative_to(root).as_posix(), line.strip())
        for path in root.rglob("*.py")
        for line in path.read_text().splitlines()
        if re.match(r"\s*(from|import) qpert\.(exporter|graphs|calibration)", line)
    ]
    assert imports == []
