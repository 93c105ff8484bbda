"""The commands of `qpert build --print-trtexec`, run as the shell script that they are; their shapes in ONNX Runtime.

There is no `trtexec` on the machines that test. A recorder takes its place to see what a shell passes on; that the
options exist is read from NVIDIA's sources (see `trtexec.OPTIONS`), not shown here.
"""

import json
import os
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest

from qpert.exporter.engines.trtexec import trtexec_script
from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.cli import run

RECORDER = """#!/bin/sh
for word in "$@"; do
  case $word in
    --onnx=*) test -f "${word#--onnx=}" || exit 4 ;;
    --saveEngine=*) : > "${word#--saveEngine=}" || exit 5 ;;
  esac
  printf '%s\\n' "$word"
done
printf -- '--\\n'
"""


def printed(capsys, *options):
    assert run(["build", *map(str, options)]) == 0
    return capsys.readouterr().out


def options_of(words):
    """`{"minShapes": {"pixel_values": [1, 3, 28, 28]}, …}`; an option without a value is True."""
    found = {}
    for word in words:
        name, _, value = word.removeprefix("--").partition("=")
        if name.endswith("Shapes"):
            pairs = (entry.rsplit(":", 1) for entry in value.split(","))
            found[name] = {tensor: [int(length) for length in shape.split("x")] for tensor, shape in pairs}
        else:
            found[name] = value or True
    return found


@pytest.fixture
def by_graph(tiny_bundle, capsys):
    document = json.loads(printed(capsys, tiny_bundle, "--print-trtexec", "--json"))
    assert document["precision"] == "fp32"
    return {graph["graph"]: graph for graph in document["graphs"]}


def test_the_script_runs_in_the_bundles_folder_and_saves_every_engine(tiny_bundle, tmp_path, capsys, by_graph):
    """A folder with the bundle's graphs stands for the device, where qpert is not."""
    script = printed(capsys, tiny_bundle, "--print-trtexec")
    (tmp_path / "bin").mkdir()
    recorder = tmp_path / "bin" / "trtexec"
    recorder.write_text(RECORDER)
    recorder.chmod(0o755)
    device = tmp_path / "a folder"
    device.mkdir()
    (device / "onnx").symlink_to(tiny_bundle / "onnx")
    (tmp_path / "build.sh").write_text(script)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    made = subprocess.run(
        ["sh", tmp_path / "build.sh"], cwd=device, env={"PATH": path}, capture_output=True, text=True, check=True
    )
    calls = [call.strip().splitlines() for call in made.stdout.split("--\n") if call.strip()]
    assert calls == [graph["command"][1:] for graph in by_graph.values()]
    assert sorted(file.name for file in (device / "trtexec").iterdir()) == [
        "image_query.engine",
        "itm.engine",
        "text.engine",
        "vision.engine",
    ]


def test_ranges_are_the_manifests_and_boxes_begin_at_one(tiny_bundle, by_graph):
    manifest = json.loads((tiny_bundle / "manifest.json").read_text())
    for name, graph in by_graph.items():
        declared, options = manifest["graphs"][name], options_of(graph["command"][1:])
        for end, limit in (("minShapes", "min"), ("maxShapes", "max")):
            lengths = {axis: length[limit] for axis, length in declared["ranges"].items()}
            lengths |= {"O": max(1, lengths["O"])} if "O" in lengths else {}
            expected = {
                tensor["name"]: [lengths.get(axis, axis) for axis in tensor["shape"]] for tensor in declared["inputs"]
            }
            assert options[end] == expected
        for tensor, shape in options["optShapes"].items():
            assert np.all(np.array(options["minShapes"][tensor]) <= shape)
            assert np.all(np.array(options["maxShapes"][tensor]) >= shape)
        assert options["stronglyTyped"] is options["noTF32"] is options["skipInference"] is True
        assert options["onnx"] == declared["file"]


@pytest.mark.parametrize("end", ["minShapes", "optShapes", "maxShapes"])
def test_the_graphs_take_every_printed_shape(tiny_bundle, by_graph, end):
    kinds = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
    for graph in by_graph.values():
        session = onnxruntime.InferenceSession(tiny_bundle / graph["onnx"], providers=["CPUExecutionProvider"])
        shapes = options_of(graph["command"][1:])[end]
        feeds = {put.name: np.ones(shapes.pop(put.name), kinds[put.type]) for put in session.get_inputs()}
        assert not shapes
        rows = len(next(iter(feeds.values())))
        assert all(len(output) == rows for output in session.run(None, feeds))


def test_external_data_is_named(tiny_bundle, by_graph):
    """Held against what the onnx package reads of the files."""
    import onnx

    for graph in by_graph.values():
        model = onnx.load(tiny_bundle / graph["onnx"], load_external_data=False)
        entries = [entry for tensor in model.graph.initializer for entry in tensor.external_data]
        assert set(graph["data"]) == {f"onnx/{entry.value}" for entry in entries if entry.key == "location"}


def test_graphs_can_be_chosen_and_the_workspace_limited(tiny_bundle, capsys):
    script = printed(capsys, tiny_bundle, "--print-trtexec", "--graph", "text", "--workspace", "512M")
    commands = [line for line in script.splitlines() if line.startswith("trtexec ")]
    assert len(commands) == 1
    assert "--memPoolSize=workspace:536870912B" in commands[0]
    assert "--onnx=onnx/text.onnx" in commands[0]


@pytest.mark.parametrize("options", [["--flavor", "rtx"], ["--target", "sm89"], ["--force"]], ids=" ".join)
def test_options_that_trtexec_cannot_follow_are_refused(tiny_bundle, capsys, options):
    assert run(["build", str(tiny_bundle), "--print-trtexec", *options]) == 2
    assert "--print-trtexec builds nothing" in capsys.readouterr().err


def test_a_bundle_quantised_for_the_cpu_is_refused(tiny_bundle, tmp_path, capsys):
    import shutil

    folder = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["quantization"] = {"target": "cpu"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert run(["build", str(folder), "--print-trtexec"]) == 2
    assert "qpert quantize --target tensorrt" in capsys.readouterr().err
    manifest["quantization"] = {"target": "tensorrt"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert trtexec_script(Bundle.open(folder)).graphs


PROGRAM = """
import sys
class Refused:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "onnx", "tensorrt", "tensorrt_rtx", "cuda"}:
            raise ImportError(f"{name} is refused")
sys.meta_path.insert(0, Refused())
from qpert.runtime.cli import run
sys.exit(run(["build", sys.argv[1], "--print-trtexec"]))
"""


def test_printing_needs_neither_torch_nor_onnx_nor_tensorrt(tiny_bundle, capsys):
    made = subprocess.run([sys.executable, "-c", PROGRAM, str(tiny_bundle)], capture_output=True, text=True, check=True)
    assert made.stdout == printed(capsys, tiny_bundle, "--print-trtexec")
