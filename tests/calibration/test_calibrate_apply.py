"""A bundle with other settings: the same as an export with them, whole or not at all."""

import json

import numpy as np
import onnx
import pytest
from tiny_model import THRESHOLD

import qpert.calibration.perturbation.apply as module
from qpert.calibration.perturbation.apply import apply_settings
from qpert.exporter.families.declare import Limits
from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.cli import run
from qpert.runtime.errors import InputError, QpertError
from qpert.runtime.inputs.perturbation import Perturbation

SETTINGS = Perturbation(stages="itc", threshold=0.995, alpha=4.0, beta=0.5, gamma=-1.0, reduction="mean")
PROVENANCE = {"best": "by hand"}


@pytest.fixture(scope="module")
def source(itc_bundle):
    return Bundle.open(itc_bundle)


@pytest.fixture(scope="module")
def applied(source, tmp_path_factory):
    target = tmp_path_factory.mktemp("applied") / "bundle"
    return apply_settings(source, SETTINGS, target, provenance=PROVENANCE, reports={"calibrate.json": "{}\n"})


@pytest.fixture(scope="module")
def exported(export_tiny):
    return Bundle.open(export_tiny(perturbation=SETTINGS, limits=Limits(4, 4, 8, 12)))


def arrays(bundle):
    return bundle.samples().to_arrays()


def test_graphs_and_samples_are_those_of_an_export_with_the_settings(applied, exported):
    mine, theirs = applied.manifest, exported.manifest
    assert mine.perturbation == theirs.perturbation == SETTINGS
    assert mine.host_graphs == theirs.host_graphs
    assert len(mine.all_graphs) == len(mine.graphs) + 2
    for graph in mine.all_graphs.values():
        one, other = (onnx.load(bundle.graph_path(graph)) for bundle in (applied, exported))
        assert one.graph == other.graph, graph.name
    (ours, ours_words), (expected, words) = arrays(applied), arrays(exported)
    assert ours_words == words
    assert ours.keys() == expected.keys()
    for name, array in expected.items():
        assert np.array_equal(ours[name], array), name


def test_what_was_recorded_with_boxes_differs_from_the_sources(applied, source):
    before, after = arrays(source)[0], arrays(applied)[0]
    different = {name for name in before if not np.array_equal(before[name], after[name])}
    assert "image_query/many_boxes/out/query_embeds" in different
    assert "boxes/0/weights" in different
    assert not any(name.startswith(("vision", "text", "itm", "picture", "caption")) for name in different)


def test_only_the_boxes_graph_of_the_two_host_graphs_is_written_anew(applied, source):
    before, after = source.manifest.files, applied.manifest.files
    assert before["onnx/preprocess.onnx"] == after["onnx/preprocess.onnx"]
    assert before["onnx/boxes.onnx"] != after["onnx/boxes.onnx"]


def test_a_bundle_from_before_the_host_graphs_gets_none(source, copy_of, edit_manifest, tmp_path):
    old = copy_of(source.folder)
    edit_manifest(old, without_host_graphs)
    settings = Perturbation(stages="itc", threshold=THRESHOLD, alpha=2.0)
    new = apply_settings(Bundle.open(old), settings, tmp_path / "new", provenance={}, reports={})
    assert new.manifest.host_graphs == {}
    assert sorted(path.name for path in (new.folder / "onnx").glob("*.onnx")) == sorted(
        f"{name}.onnx" for name in source.manifest.graphs
    )


def without_host_graphs(values):
    for name in ("preprocess", "boxes"):
        del values["graphs"][name], values["files"][f"onnx/{name}.onnx"]


def test_it_verifies_against_the_recorded_outputs_and_against_pytorch(applied, capsys):
    for reference in ("recorded", "torch"):
        assert run(["verify", str(applied.folder), "--reference", reference, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["verdict"] == "pass"


def test_its_files_are_right_and_it_remembers_where_it_comes_from(applied, source):
    assert all(state.ok for state in Bundle.open(applied.folder).check_files())
    values = json.loads((applied.folder / "manifest.json").read_text())
    assert values["calibration"] == PROVENANCE
    assert applied.manifest.verification is None
    assert values["command"] == source.manifest.command
    assert "reports/calibrate.json" in values["files"]
    assert source.manifest.calibration is None


def test_no_data_file_has_several_links(applied, source):
    """onnx refuses to read such a file."""
    for bundle in (applied, source):
        assert all(path.stat().st_nlink == 1 for path in bundle.folder.rglob("*") if path.is_file())


def test_the_same_threshold_needs_no_checkpoint(source, tmp_path, monkeypatch, capsys):
    def refuse(*_, **__):
        raise AssertionError("the checkpoint was opened")

    monkeypatch.setattr("qpert.exporter.families.blip2.checkpoint.open_checkpoint", refuse)
    settings = Perturbation(stages="itc", threshold=THRESHOLD, alpha=2.0, reduction="mean")
    new = apply_settings(source, settings, tmp_path / "new", provenance={}, reports={})
    assert new.manifest.files["onnx/image_query.onnx"] == source.manifest.files["onnx/image_query.onnx"]
    monkeypatch.undo()
    assert run(["verify", str(new.folder), "--json"]) == 0
    capsys.readouterr()


def test_another_checkpoint_than_the_exported_one_is_refused(source, tmp_path):
    with pytest.raises(QpertError, match="SHA-256"):
        apply_settings(source, SETTINGS, tmp_path / "new", provenance={}, reports={}, checkpoint="demo")
    assert not (tmp_path / "new").exists()


def test_a_bundle_that_perturbs_itm_too_gets_the_threshold_in_both_graphs(tiny_bundle, tmp_path, capsys):
    source = Bundle.open(tiny_bundle)
    settings = Perturbation(stages="both", threshold=0.8)
    new = apply_settings(source, settings, tmp_path / "new", provenance={}, reports={})
    for name in ("image_query", "itm"):
        model = onnx.load_model(new.path(f"onnx/{name}.onnx"), load_external_data=False)
        found = [t for t in model.graph.initializer if t.name == "query_map/threshold"]
        assert [onnx.numpy_helper.to_array(t).item() for t in found] == [np.float32(0.8)]
    assert run(["verify", str(new.folder), "--json"]) == 0
    capsys.readouterr()


def test_in_place_the_bundle_is_replaced_whole(copy_of, itc_bundle):
    folder = copy_of(itc_bundle)
    (folder / "engines" / "sm89").mkdir(parents=True)
    (folder / "engines" / "sm89" / "engine.json").write_text("{}")
    bundle = Bundle.open(folder)
    weaker = Perturbation(stages="itc", threshold=THRESHOLD, alpha=2.0)
    kept = apply_settings(bundle, weaker, folder, provenance={}, reports={})
    assert kept.folder == folder
    assert (folder / "engines" / "sm89" / "engine.json").is_file(), "no graph changed, so engines are still good"
    new = apply_settings(Bundle.open(folder), SETTINGS, folder, provenance={}, reports={})
    assert new.manifest.perturbation == SETTINGS
    assert not (folder / "engines").exists(), "they hold the old threshold"
    assert all(state.ok for state in Bundle.open(folder).check_files())
    assert all(path.stat().st_nlink == 1 for path in folder.rglob("*") if path.is_file()), "onnx reads no linked file"
    assert [path.name for path in folder.parent.iterdir()] == [folder.name], "nothing is left beside it"


@pytest.mark.parametrize("name", ["write_threshold", "save_samples", "sha256_of"])
def test_in_place_an_interrupted_change_leaves_the_bundle_as_it_was(name, copy_of, itc_bundle, monkeypatch):
    folder = copy_of(itc_bundle)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, name, interrupt)
    monkeypatch.setattr(module, "recorded_again", lambda bundle, samples, *_: samples.cases)
    with pytest.raises(KeyboardInterrupt):
        apply_settings(Bundle.open(folder), SETTINGS, folder, provenance={}, reports={})
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_an_existing_target_is_refused(source, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("mine")
    with pytest.raises(InputError, match="exists"):
        apply_settings(source, SETTINGS, tmp_path / "there", provenance={}, reports={})
