"""Bundles on disk: what opens, what does not, and what is hashed when."""

import json
import os
import shutil
from pathlib import Path

import pytest

from qpert.runtime.bundle import folder as bundle_module
from qpert.runtime.bundle.folder import Bundle, HashMemory
from qpert.runtime.errors import BundleError
from qpert.runtime.files import sha256_of


@pytest.fixture
def hashed(monkeypatch):
    """Names of the files that were hashed."""
    names = []

    def spy(path, **options):
        names.append(path.name)
        return sha256_of(path, **options)

    monkeypatch.setattr(bundle_module, "sha256_of", spy)
    return names


def flip(path, place=-1):
    """Change one byte and keep size and modification time."""
    state = path.stat()
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def test_a_bundle_opens_and_knows_its_files(tiny_bundle):
    bundle = Bundle.open(tiny_bundle)
    on_disk = {path.relative_to(tiny_bundle).as_posix() for path in tiny_bundle.rglob("*") if path.is_file()}
    assert set(bundle.manifest.files) == on_disk - {"manifest.json"}
    assert all(state.ok for state in bundle.check_files())


@pytest.mark.parametrize("name", ["onnx/vision.onnx", "onnx/qformer.data", "tokenizer.json", "samples.safetensors"])
def test_a_file_whose_hash_differs_is_named_with_both_hashes(tiny_bundle, copy_of, name):
    folder = copy_of(tiny_bundle)
    expected = json.loads((folder / "manifest.json").read_text())["files"][name]
    flip(folder / name)
    with pytest.raises(
        BundleError, match=rf"{name} was altered: its SHA-256 is [0-9a-f]{{64}}, the manifest says {expected}"
    ):
        Bundle.open(folder)


def test_a_missing_file_is_named(tiny_bundle, copy_of):
    folder = copy_of(tiny_bundle)
    (folder / "onnx" / "text.onnx").unlink()
    with pytest.raises(BundleError, match=r"onnx/text\.onnx is missing from the bundle; copy the whole folder again"):
        Bundle.open(folder)


@pytest.mark.parametrize("kind", ["none", "file"])
def test_what_is_no_folder_is_refused(tmp_path, kind):
    path = tmp_path / "x"
    if kind == "file":
        path.write_text("x")
    with pytest.raises(BundleError, match="x is not a folder; expected a bundle made by `qpert export`"):
        Bundle.open(path)


def test_files_are_hashed_once_and_then_remembered(tiny_bundle, copy_of, hashed):
    folder = copy_of(tiny_bundle)
    Bundle.open(folder)
    files = Bundle.open(folder).manifest.files  # reports, which nothing runs, are not hashed to open a bundle
    assert sorted(hashed) == sorted(Path(path).name for path in files if not path.startswith("reports/"))
    hashed.clear()
    Bundle.open(folder)
    assert hashed == []


def test_a_file_with_another_time_is_hashed_again(tiny_bundle, copy_of, hashed):
    folder = copy_of(tiny_bundle)
    Bundle.open(folder)
    hashed.clear()
    os.utime(folder / "onnx" / "vision.data", ns=(1, 1))
    Bundle.open(folder)
    assert hashed == ["vision.data"]


def test_an_altered_file_is_caught_even_where_its_hash_was_remembered_before(tiny_bundle, copy_of):
    folder = copy_of(tiny_bundle)
    Bundle.open(folder)
    data = folder / "onnx" / "vision.data"
    flip(data)
    os.utime(data)  # any honest write sets the time
    with pytest.raises(BundleError, match="was altered"):
        Bundle.open(folder)


def test_a_check_of_all_files_believes_no_memory(tiny_bundle, copy_of):
    folder = copy_of(tiny_bundle)
    bundle = Bundle.open(folder)
    flip(folder / "onnx" / "vision.data")
    assert [state.path for state in bundle.check_files() if not state.ok] == ["onnx/vision.data"]
    (folder / "tokenizer.json").unlink()
    states = {state.path: state for state in bundle.check_files()}
    assert states["tokenizer.json"].found is None


@pytest.mark.parametrize("content", ["", "[]", "{", '{"x": 5}', "\udcff"])
def test_a_damaged_memory_means_hashing_again(tiny_bundle, copy_of, hashed, monkeypatch, tmp_path, content):
    monkeypatch.setenv("QPERT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "hashes.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    bundle = Bundle.open(copy_of(tiny_bundle))
    assert len(hashed) == sum(not path.startswith("reports/") for path in bundle.manifest.files)
    assert bundle.manifest.files["onnx/vision.data"] in str(HashMemory.load().entries)


def test_a_cache_that_cannot_be_written_is_no_reason_to_fail(tiny_bundle, monkeypatch, tmp_path, hashed):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QPERT_CACHE", str(tmp_path / "file" / "cache"))
    for _ in range(2):
        Bundle.open(tiny_bundle)
    assert len(hashed) == 2 * len(set(hashed))


def test_a_report_is_entered_with_its_hash_and_the_verdict(tiny_bundle, copy_of):
    folder = copy_of(tiny_bundle)
    written = Bundle.open(folder).add_reports({"x.html": "<p>ä</p>"}, verification={"verdict": "fail"})
    reopened = Bundle.open(folder)
    assert reopened == written
    assert reopened.manifest.verification == {"verdict": "fail"}
    assert reopened.manifest.files["reports/x.html"] == sha256_of(folder / "reports" / "x.html")
    assert all(state.ok for state in reopened.check_files())
    kept = reopened.add_reports({"y.json": "{}"}).manifest
    assert kept.verification == {"verdict": "fail"}
    assert {"reports/x.html", "reports/y.json"} <= kept.files.keys()


def test_reports_and_a_verdict_that_others_enter_meanwhile_stay(tiny_bundle, copy_of):
    folder = copy_of(tiny_bundle)
    opened_first = Bundle.open(folder)
    Bundle.open(folder).add_reports({"verify.json": "{}"}, verification={"verdict": "fail"})
    written = opened_first.add_reports({"bench.json": "{}", "bench.html": "<p>"})
    assert written.manifest.verification == {"verdict": "fail"}
    names = {"reports/verify.json", "reports/bench.json", "reports/bench.html"}
    assert names <= written.manifest.files.keys()
    assert Bundle.open(folder) == written


def test_a_report_that_is_missing_or_half_written_does_not_stop_the_bundle_from_opening(tiny_bundle, copy_of):
    """A verify that is killed between its report and the manifest leaves a report with another hash."""
    folder = copy_of(tiny_bundle)
    Bundle.open(folder).add_reports({"x.html": "old"})
    (folder / "reports" / "x.html").write_text("new")
    assert [state.path for state in Bundle.open(folder).check_files() if not state.ok] == ["reports/x.html"]
    (folder / "reports" / "x.html").unlink()
    Bundle.open(folder)


def test_a_report_cannot_be_written_outside(tiny_bundle, copy_of, tmp_path):
    folder = copy_of(tiny_bundle)
    shutil.rmtree(folder / "reports", ignore_errors=True)
    (folder / "reports").symlink_to(tmp_path)
    with pytest.raises(BundleError, match="outside the bundle"):
        Bundle.open(folder).add_reports({"x.html": "x"})
