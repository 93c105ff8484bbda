"""Gates on `preprocess.onnx` and `boxes.onnx`: they fail on graphs of other settings; older bundles have none."""

import dataclasses
import json
import warnings

import onnx
import pytest

from qpert.exporter.host_graphs.boxes import boxes_graph
from qpert.exporter.host_graphs.preprocess import preprocess_graph
from qpert.runtime import Bundle
from qpert.runtime.cli import run
from qpert.runtime.errors import QpertWarning, UnavailableError
from qpert.runtime.verification import host_graphs as module
from qpert.runtime.verification.host import pixel_distance
from qpert.runtime.verification.host_graphs import host_graph_gates

PREPROCESS, MASKS, WEIGHTS = GATES = (
    "preprocess graph: max abs difference",
    "boxes graph: masks, max abs difference",
    "boxes graph: weights, max abs difference",
)


def distance(make, picture, recorded):
    return pixel_distance(make, picture, recorded, rows_first=False)


def gates(bundle):
    return {gate.name: gate for gate in host_graph_gates(bundle, bundle.samples(), distance)}


def without_host_graphs(values):
    for name in ("preprocess", "boxes"):
        del values["graphs"][name], values["files"][f"onnx/{name}.onnx"]


def test_they_pass_on_an_exported_bundle_to_the_bit(tiny_bundle):
    found = gates(Bundle.open(tiny_bundle))
    assert tuple(found) == GATES
    assert [gate.value for gate in found.values()] == [0.0, 0.0, 0.0]


def test_verify_shows_them(tiny_bundle, copy_of, capsys):
    assert run(["verify", str(copy_of(tiny_bundle)), "--json"]) == 0
    names = [gate["name"] for gate in json.loads(capsys.readouterr().out)["gates"]]
    assert set(GATES) <= set(names)


@pytest.mark.parametrize(
    ("changes", "failing"),
    [
        ({"alpha": 7.9}, [WEIGHTS]),
        ({"gamma": 0.1}, [WEIGHTS]),
        ({"reduction": "mean"}, [WEIGHTS]),
        ({"coverage": "binary"}, [MASKS]),
        ({"coverage": "dilated"}, [MASKS]),
    ],
    ids=str,
)
def test_a_boxes_graph_of_other_settings_fails(tiny_bundle, copy_of, changes, failing):
    bundle = Bundle.open(copy_of(tiny_bundle))
    manifest = bundle.manifest
    spec = manifest.host_graphs["boxes"]
    other = dataclasses.replace(manifest.perturbation, **changes)
    onnx.save_model(boxes_graph(spec, manifest.token_grid, other), bundle.graph_path(spec))
    assert [gate.name for gate in gates(bundle).values() if not gate.passed] == failing


@pytest.mark.parametrize("changes", [{"resample": "bilinear"}, {"mean": (0.5, 0.5, 0.5)}], ids=str)
def test_a_preprocess_graph_of_other_settings_fails(tiny_bundle, copy_of, changes):
    bundle = Bundle.open(copy_of(tiny_bundle))
    spec = bundle.manifest.host_graphs["preprocess"]
    other = dataclasses.replace(bundle.manifest.preprocessing, **changes)
    onnx.save_model(preprocess_graph(spec, other), bundle.graph_path(spec))
    assert [gate.name for gate in gates(bundle).values() if not gate.passed] == [PREPROCESS]


def test_a_bundle_from_before_them_has_no_such_gate_and_says_nothing(tiny_bundle, copy_of, edit_manifest, capsys):
    folder = copy_of(tiny_bundle)
    edit_manifest(folder, without_host_graphs)
    with warnings.catch_warnings():
        warnings.simplefilter("error", QpertWarning)
        assert gates(Bundle.open(folder)) == {}
    assert run(["verify", str(folder), "--json"]) == 0
    shown = capsys.readouterr()
    assert not [gate["name"] for gate in json.loads(shown.out)["gates"] if " graph: " in gate["name"]]
    assert "preprocess.onnx" not in shown.err


def test_a_machine_with_engines_alone_says_that_they_were_not_verified(tiny_bundle, monkeypatch):
    def missing(*_):
        raise UnavailableError("ONNX Runtime is not installed", code="no-onnxruntime")

    monkeypatch.setattr(module, "open_host_graph", missing)
    with pytest.warns(QpertWarning, match="not verified: preprocess and boxes"):
        assert gates(Bundle.open(tiny_bundle)) == {}
