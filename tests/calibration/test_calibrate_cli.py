"""`qpert calibrate`: results, exit codes, and what is refused before any work is done."""

import importlib.util
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from evaluation_sets import write_set

import qpert.calibration.commands.calibrate as module
from qpert.calibration.perturbation.grid import Grid
from qpert.calibration.perturbation.report import calibration_report, headline, verdict
from qpert.calibration.perturbation.result import Calibration
from qpert.calibration.perturbation.search import SearchResult, Trial
from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.cli import run
from qpert.runtime.evaluation.metrics import metrics_of_ranks
from qpert.runtime.inputs.perturbation import Perturbation
from qpert.runtime.report.files import environment
from qpert.runtime.report.html import to_html

SMALL = ["--alphas", "2,8", "--weights", "constant,S", "--thresholds", "0.8,0.96", "--threads", "1"]
MARGIN = 1e-9


@pytest.fixture
def bundle(copy_of, itc_bundle):
    return copy_of(itc_bundle)


@pytest.fixture
def data_options(boxed_set):
    boxes = str(boxed_set / "boxes.jsonl")
    return ["--dataset", str(boxed_set), "--boxes", boxes, "--bin-boxes", boxes, "--score", "r1"]


@pytest.fixture
def refused(capsys):
    """Runs a command line that has to be refused, and returns its message."""

    def check(*arguments, code=2):
        assert run(["calibrate", *map(str, arguments)]) == code
        captured = capsys.readouterr()
        assert captured.out == "", "a refused command prints no result"
        assert "Traceback" not in captured.err
        return captured.err

    return check


def searched(data, gains, grid=None):
    """A calibration whose settings find so many of the first captions more (or fewer) than no perturbation does."""
    grid = grid or Grid((2.0, 4.0), ("constant",), (0.9,), ("sum",))
    owners, areas = data.dataset.image_of_caption, data.largest_areas
    half = len(owners) // 2

    def trial(found):
        t2i, i2t = np.where(np.arange(len(owners)) < found, 0, 7), np.zeros(len(areas), np.int64)
        return Trial(metrics_of_ranks(t2i, i2t, image_of_text=owners, largest_areas=areas), t2i, i2t)

    trials = {setting: trial(half + gain) for setting, gain in zip(grid.settings(), gains, strict=True)}
    result = SearchResult(trial(half), trials, 0, {"total": 1.0}, {})
    return Calibration.judge(result, data, grid, Perturbation(), score="r1", rerank=64)


# Results


def test_the_json_holds_every_setting_and_the_bundle_keeps_the_report(bundle, data_options, capsys):
    assert run(["calibrate", str(bundle), *data_options, *SMALL, "--rerank", "5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["settings"]) == 32
    assert {row["reduction"] for row in found["settings"]} == {"sum", "mean", "each", "each+stock"}
    values = [row["value"] for row in found["settings"]]
    assert values == sorted(values, reverse=True)
    assert found["best"]["value"] == values[0] == found["best"]["t2i"]["r1"]
    assert found["gain"] == pytest.approx(values[0] - found["none"]["value"], abs=MARGIN)
    assert found["beaten"] == (found["gain"] > 0)
    for row in (found["best"], found["none"]):
        assert {"r1", "mr1"} <= row["t2i"].keys() & row["i2t"].keys()
        assert row["small"]["images"] > 0
    assert (found["dataset"]["images"], found["dataset"]["texts"], found["bundle"]) == (16, 48, None)
    assert 0 <= found["spread"]["chance"] <= 1
    kept = json.loads((bundle / "reports" / "calibrate.json").read_text())
    assert kept == {key: value for key, value in found.items() if key != "bundle"}
    page = (bundle / "reports" / "calibrate.html").read_text()
    assert page.count('<td class="heat') == 32
    assert f"{values[0]:.2f}" in page
    assert all(state.ok for state in Bundle.open(bundle).check_files())


def test_the_best_setting_is_written_to_a_new_bundle(bundle, data_options, tmp_path, capsys):
    out = tmp_path / "calibrated"
    arguments = [*data_options, *SMALL, "--rerank", "0", "--out", str(out), "--regardless", "--json"]
    before = (bundle / "onnx" / "image_query.onnx").read_bytes()
    assert run(["calibrate", str(bundle), *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    manifest = Bundle.open(out).manifest
    best = found["best"]
    settings = manifest.perturbation
    assert (settings.alpha, settings.beta, settings.gamma) == (best["alpha"], best["beta"], best["gamma"])
    reduction = "each+stock" if settings.keep_stock else settings.reduction
    assert (settings.threshold, reduction) == (best["threshold"], best["reduction"])
    assert manifest.calibration["dataset"]["sha256"] == found["dataset"]["sha256"]
    assert manifest.calibration["grid"] == found["grid"]
    assert manifest.calibration["none"]["value"] == found["none"]["value"]
    assert "qpert calibrate" in manifest.calibration["command"]
    assert (bundle / "onnx" / "image_query.onnx").read_bytes() == before
    assert run(["verify", str(out), "--json"]) == 0
    capsys.readouterr()
    # what the search promised is what the new bundle gives
    evaluation = [*data_options[:-2], "--split", "val", "--rerank", "0", "--threads", "1", "--json"]
    assert run(["eval", str(out), *evaluation]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert {way: measured[way] for way in ("t2i", "i2t", "small")} == {
        way: best[way] for way in ("t2i", "i2t", "small")
    }


@pytest.fixture
def finding(monkeypatch, boxed_data, tmp_path):
    """Puts a search in place whose two settings gain so many captions."""

    def put(*gains):
        def found(bundle, *_):
            values = {"exported": bundle.manifest.perturbation, "environment": environment(bundle, "cpu")}
            return replace(searched(boxed_data, gains), **values), tmp_path / "work"

        monkeypatch.setattr(module, "calibrate", found)

    return put


@pytest.mark.parametrize(("asked", "code"), [("--out", 1), ("--apply", 1), ("nothing", 0)])
def test_where_nothing_beats_no_perturbation_no_bundle_is_written(
    asked, code, bundle, data_options, finding, tmp_path, capsys
):
    finding(0, -3)
    before = (bundle / "onnx" / "image_query.onnx").read_bytes()
    target = {"--out": ["--out", str(tmp_path / "new")], "--apply": ["--apply"], "nothing": []}[asked]
    assert run(["calibrate", str(bundle), *data_options, *target]) == code
    out, err = capsys.readouterr()
    assert "No setting beats no perturbation: nothing is recommended" in out
    assert ("no bundle was written" in err) == (code == 1)
    assert not (tmp_path / "new").exists()
    assert (bundle / "onnx" / "image_query.onnx").read_bytes() == before
    assert Bundle.open(bundle).manifest.calibration is None


def test_apply_changes_the_bundle_itself(bundle, data_options, finding, capsys):
    finding(5, 9)
    assert run(["calibrate", str(bundle), *data_options, "--apply"]) == 0
    assert capsys.readouterr().out.strip().endswith(str(bundle))
    manifest = Bundle.open(bundle).manifest
    assert (manifest.perturbation.alpha, manifest.perturbation.threshold) == (4.0, 0.9)
    assert manifest.calibration["gain"] == pytest.approx(100 * 9 / 48)


# Words


def test_the_words_say_when_a_gain_is_chance(boxed_data):
    clear, chance, none = (searched(boxed_data, gains) for gains in ([0, 20], [0, 1], [-1, -2]))
    assert headline(clear) == "Best: α 4, weight constant, τ 0.9, sum"
    assert headline(chance) == "Best: α 4, weight constant, τ 0.9, sum. Its gain over no perturbation is within chance"
    assert headline(none) == "No setting beats no perturbation: nothing is recommended"
    assert "R@1 text → image, ITC + ITM on the best 64: 52.08 with α 4" in verdict(chance)[0]
    assert "50.00 without perturbation (+2.08 points" in verdict(chance)[0]
    for found in (clear, chance, none):
        assert headline(found) in to_html(calibration_report(found))


def test_of_equal_settings_the_weaker_one_is_taken(boxed_data):
    assert searched(boxed_data, [3, 3]).best.alpha == 2.0


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--alphas", "2,-4"], "got α -4.0, expected numbers above 0"),
        (["--alphas", "nan"], "got α nan"),
        (["--alphas", "two"], "--alphas is 'two', expected comma-separated numbers"),
        (["--thresholds", "0.9,1.5"], "got threshold 1.5, expected contribution ratios between 0 and 1"),
        (["--weights", "S,T"], "weights has 'T'"),
        (["--apply", "--out", "new"], "got --out and --apply"),
        (["--boxes", "none"], "no image of the split has a box"),
        (["--limit", "1"], "the split has one image"),
        (["--score", "mr1"], "mR@1 is the mean over ten size bins"),
        (["--split", "test"], "annotations/test.json"),
    ],
)
def test_bad_input_is_refused_in_words(options, message, bundle, data_options, refused):
    assert message in refused(bundle, *data_options, *options)


def test_an_existing_out_is_refused_before_the_search(bundle, data_options, tmp_path, refused):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("mine")
    assert "exists" in refused(bundle, *data_options, "--out", tmp_path / "there")


def test_a_bundle_without_perturbation_is_refused(stock_export, data_options, refused):
    assert "exported with --perturb none" in refused(stock_export.folder, *data_options)


def test_a_bundle_that_perturbs_itm_is_searched_by_itc_only(tiny_bundle, data_options, copy_of, refused, capsys):
    bundle = copy_of(tiny_bundle)
    assert "search by ITC with --rerank 0" in refused(bundle, *data_options, *SMALL, "--rerank", "64")
    assert run(["calibrate", str(bundle), *data_options, *SMALL, "--rerank", "0", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["settings"]) == 16


def test_a_half_precision_bundle_is_searched(half_bundle, data_options, copy_of, capsys):
    bundle = copy_of(half_bundle)
    assert run(["calibrate", str(bundle), *data_options, *SMALL, "--rerank", "0", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["settings"]) == 16


def test_a_split_without_small_objects_has_no_small_score(itc_bundle, tmp_path, refused):
    root = write_set(tmp_path / "set", 4, sides=(30, 35, 38, 40), split="val")
    message = refused(itc_bundle, "--dataset", root, "--score", "small")
    assert "there is no small bin; use --score r1" in message


def test_the_work_folder_of_another_bundle_is_refused(bundle, tiny_bundle, data_options, tmp_path, refused, capsys):
    other = shutil.copytree(tiny_bundle, tmp_path / "other")
    arguments = [*SMALL, "--rerank", "0", "--work", tmp_path / "work"]
    assert run(["calibrate", str(bundle), *data_options, *map(str, arguments)]) == 0
    capsys.readouterr()
    message = refused(other, *data_options, *arguments)
    assert "belongs to an evaluation with another bundle" in message


def test_without_onnx_the_command_says_what_to_install(bundle, data_options, refused, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnx" else find(name))
    assert "pip install 'qpert[export]'" in refused(bundle, *data_options, code=3)
