"""Engine records: what an engine was built from and for, and every reason not to run it, in words."""

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest

from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.cli import run
from qpert.runtime.errors import BundleError, UnavailableError
from qpert.runtime.files import sha256_of
from qpert.runtime.sessions.gpus import Gpu
from qpert.runtime.sessions.tensorrt.engines import (
    EngineFile,
    EngineRecord,
    Machine,
    engine_folders,
    engine_for,
    explain,
    find_engines,
    read_engine,
    rebuild_command,
    require_flavor,
)
from qpert.runtime.sessions.tensorrt.libraries import FLAVORS

GRAPH_NAMES = ("vision", "image_query", "text", "itm")

RTX, CLASSIC = FLAVORS["rtx"], FLAVORS["classic"]
L4 = Gpu("NVIDIA L4", "for CUDA 13.0", "8.9")
HERE = Machine(RTX, "1.7.1.116", L4)


def record_of(bundle: Path, **changes) -> EngineRecord:
    """A record that fits HERE, of engines that hold their graph's name."""
    manifest = Bundle.open(bundle).manifest
    graphs = {
        name: EngineFile(
            file=f"{name}.engine",
            sha256="",
            bytes=len(name),
            sources={f"onnx/{name}.onnx": manifest.files[f"onnx/{name}.onnx"]},
            profile={"input_ids": ((1, 2), (2, 4), (6, 12))},
            seconds=1.5,
        )
        for name in GRAPH_NAMES
    }
    record = EngineRecord(
        flavor="rtx",
        flavor_version="1.7.1.116",
        architectures=("sm80", "sm89"),
        precision="fp32",
        tf32=False,
        graphs=graphs,
        qpert="0.1.0",
        command="qpert build bundle",
        created="2026-01-02T03:04:05+00:00",
        gpu="NVIDIA L4",
        driver="580.1",
    )
    return dataclasses.replace(record, **changes)


@pytest.fixture
def add_engine():
    """Writes a record and its engine files into a bundle."""

    def add(bundle: Path, folder: str = "sm80+sm89-rtx1.7.1.116", **changes) -> Path:
        record = record_of(bundle, **changes)
        path = bundle / "engines" / folder
        path.mkdir(parents=True)
        graphs = {}
        for name, item in record.graphs.items():
            (path / item.file).write_text(name)
            graphs[name] = dataclasses.replace(item, sha256=sha256_of(path / item.file))
        (path / "engine.json").write_text(dataclasses.replace(record, graphs=graphs).to_json())
        return path

    return add


@pytest.fixture
def bundle(tiny_bundle, copy_of):
    return Bundle.open(copy_of(tiny_bundle))


# Reading


def test_a_record_reads_back_as_it_was_written(bundle):
    record = record_of(bundle.folder)
    values = json.loads(record.to_json())
    assert EngineRecord.from_dict(values) == record
    assert (values["target"], values["schema_version"]) == ("sm80+sm89", 1)
    assert record.title == "TensorRT-RTX 1.7.1.116"


def test_engines_are_found_in_order_and_unfinished_ones_are_not(bundle, add_engine):
    assert find_engines(bundle) == ()
    for name in ("sm89-rtx1.7.1.116", "sm80-rtx1.7.1.116", ".sm86-rtx1.7.1.116.partial-12"):
        add_engine(bundle.folder, name)
    (bundle.folder / "engines" / "notes.txt").write_text("not an engine")
    assert [path.name for path in engine_folders(bundle.folder)] == ["sm80-rtx1.7.1.116", "sm89-rtx1.7.1.116"]
    first, _ = find_engines(bundle)
    assert first.path("text") == bundle.folder / "engines" / "sm80-rtx1.7.1.116" / "text.engine"


def without(key):
    return lambda values: values.pop(key)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values.update(schema_version=2), "its schema version is 2, this qpert reads up to 1: upgrade"),
        (lambda values: values.update(schema_version="1"), "not the record of an engine"),
        (lambda values: values.update(flavor="torch"), "not the record of an engine.*'torch'"),
        (lambda values: values.update(architectures=[]), "not the record of an engine"),
        (lambda values: values.update(flavor_version=17), "flavor_version is 17"),
        (without("graphs"), "not the record of an engine.*graphs"),
        (lambda values: values["graphs"]["text"].pop("sha256"), "not the record of an engine.*sha256"),
        (lambda values: values["graphs"]["text"].update(profile={"input_ids": [[1, 2]]}), "not the record of an"),
        (lambda values: values["graphs"]["text"].update(file="../../../x.engine"), "outside the bundle.*do not trust"),
        (lambda values: values["graphs"]["text"].update(file="/etc/passwd"), "outside the bundle.*do not trust"),
    ],
)
def test_a_record_that_is_wrong_is_named_with_what_to_do(bundle, add_engine, change, message):
    folder = add_engine(bundle.folder)
    values = json.loads((folder / "engine.json").read_text())
    change(values)
    (folder / "engine.json").write_text(json.dumps(values))
    with pytest.raises(BundleError, match=rf"(?s)engine\.json .*{message}.*build the engines again with `qpert build`"):
        read_engine(bundle.folder, folder)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '"x"', "[" * 100_000, b"\xff\xfe"])
def test_a_record_that_is_no_json_object_is_refused(bundle, add_engine, content):
    folder = add_engine(bundle.folder)
    (folder / "engine.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BundleError, match=r"engine\.json is not the record of an engine"):
        read_engine(bundle.folder, folder)


def test_a_folder_without_a_record_is_refused(bundle, add_engine):
    folder = add_engine(bundle.folder)
    (folder / "engine.json").unlink()
    with pytest.raises(BundleError, match=r"holds no engine\.json; delete .* and build"):
        read_engine(bundle.folder, folder)


def test_a_link_out_of_the_bundle_is_refused(bundle, add_engine, tmp_path):
    folder = add_engine(bundle.folder)
    outside = tmp_path / "outside"
    folder.rename(outside)
    folder.symlink_to(outside)
    with pytest.raises(BundleError, match="outside the bundle"):
        read_engine(bundle.folder, folder)


# The files


def test_every_engine_file_is_hashed(bundle, add_engine):
    folder = add_engine(bundle.folder)
    engine = read_engine(bundle.folder, folder)
    assert [state.path for state in engine.check()] == [f"engines/{folder.name}/{name}.engine" for name in GRAPH_NAMES]
    assert all(state.ok for state in engine.check())
    (folder / "text.engine").write_text("tex")
    (folder / "itm.engine").unlink()
    assert [(state.ok, state.found is None) for state in engine.check()] == [
        (True, False),
        (True, False),
        (False, False),
        (False, True),
    ]


def test_an_engine_that_was_cut_short_or_is_gone_is_not_used(bundle, add_engine):
    engine = read_engine(bundle.folder, add_engine(bundle.folder))
    assert engine.require("text").read_text() == "text"
    engine.path("text").write_text("tex")
    again = r"build it again: qpert build .* --flavor rtx --target sm80\+sm89 --force"
    with pytest.raises(BundleError, match=rf"cut short or altered: it has 3 bytes .* the record says 4 .*{again}"):
        engine.require("text")
    engine.path("text").unlink()
    with pytest.raises(BundleError, match=rf"text\.engine is missing; {again}"):
        engine.require("text")


def test_a_link_to_an_engine_outside_the_bundle_is_refused(bundle, add_engine, tmp_path):
    folder = add_engine(bundle.folder)
    (folder / "text.engine").rename(tmp_path / "text.engine")
    (folder / "text.engine").symlink_to(tmp_path / "text.engine")
    with pytest.raises(BundleError, match="outside the bundle"):
        read_engine(bundle.folder, folder)


# Whether it runs here


def test_an_engine_of_this_version_architecture_and_bundle_runs_here(bundle):
    assert explain(record_of(bundle.folder), HERE, bundle.manifest) == []


def test_another_gpu_of_the_same_architecture_is_no_reason(bundle):
    other = dataclasses.replace(HERE, gpu=Gpu("NVIDIA RTX 4090", "for CUDA 13.0", "8.9"))
    assert explain(record_of(bundle.folder), other, bundle.manifest) == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"flavor_version": "1.6.0.1"},
            "it was built with TensorRT-RTX 1.6.0.1, installed is 1.7.1.116",
        ),
        (
            {"architectures": ("sm86",)},
            "it is for sm86, this GPU is a NVIDIA L4 (sm89, driver for CUDA 13.0)",
        ),
        ({"flavor": "classic"}, "it is for TensorRT 1.7.1.116, asked for is TensorRT-RTX"),
        ({"graphs": {}}, "it has no engine of graph vision, image_query, text, itm"),
    ],
)
def test_what_does_not_fit_is_said_in_words(bundle, changes, reason):
    assert explain(record_of(bundle.folder, **changes), HERE, bundle.manifest) == [reason]


def test_an_engine_of_another_bundle_is_not_used(bundle):
    record = record_of(bundle.folder)
    files = bundle.manifest.files | {"onnx/text.onnx": "0" * 64}
    other = dataclasses.replace(bundle.manifest, files=files)
    assert explain(record, HERE, other) == ["it was built from other graphs than the bundle's (onnx/text.onnx differs)"]


def test_the_newest_engine_that_fits_is_taken(bundle, add_engine):
    add_engine(bundle.folder, "sm89-rtx1.7.1.116")
    newest = add_engine(bundle.folder, "sm80+sm89-rtx1.7.1.116", created="2026-02-01T00:00:00+00:00")
    add_engine(bundle.folder, "sm86-rtx1.7.1.116", architectures=("sm86",), created="2026-03-01T00:00:00+00:00")
    assert engine_for(bundle, HERE).folder == newest


def test_where_no_engine_fits_each_is_gone_through_and_the_command_is_given(bundle, add_engine):
    add_engine(bundle.folder, "sm89-rtx1.6.0.1", flavor_version="1.6.0.1")
    add_engine(bundle.folder, "sm86-rtx1.7.1.116", architectures=("sm86",))
    add_engine(bundle.folder, "sm89-classic10.14.1", flavor="classic")
    (add_engine(bundle.folder, "sm120-rtx1.7.1.116") / "engine.json").write_text("{")
    with pytest.raises(UnavailableError) as raised:
        engine_for(bundle, HERE)
    message = str(raised.value)
    assert "no engine for this machine's NVIDIA L4 (sm89" in message
    assert "sm89-rtx1.6.0.1: it was built with TensorRT-RTX 1.6.0.1, installed is 1.7.1.116" in message
    assert "sm86-rtx1.7.1.116: it is for sm86" in message
    assert "sm120-rtx1.7.1.116/engine.json is not the record" in message
    assert "classic" not in message
    assert message.endswith(f"build one: qpert build {bundle.folder} --flavor rtx --target sm89")


def test_a_bundle_without_an_engine_of_the_flavour_names_the_command(bundle, add_engine):
    add_engine(bundle.folder)
    require_flavor(bundle, RTX)
    with pytest.raises(UnavailableError, match=r"holds no TensorRT engine, .* --flavor classic --target current"):
        require_flavor(bundle, CLASSIC)


def test_a_path_with_a_space_is_quoted_in_commands(bundle):
    command = rebuild_command(Path("my bundle"), record_of(bundle.folder))
    assert command == "qpert build 'my bundle' --flavor rtx --target sm80+sm89 --force"


# inspect


def inspected(folder, capsys):
    code = run(["inspect", str(folder), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_inspect_lists_engines_with_their_fingerprints(bundle, add_engine, capsys):
    folder = add_engine(bundle.folder)
    code, document = inspected(bundle.folder, capsys)
    assert (code, document["files_ok"]) == (0, True)
    (engine,) = document["engines"]
    assert (engine["folder"], engine["files_ok"], engine["problems"]) == (f"engines/{folder.name}", True, [])
    assert engine["record"] == json.loads((folder / "engine.json").read_text())


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda folder: (folder / "text.engine").write_text("tex"), ""),
        (lambda folder: (folder / "text.engine").unlink(), ""),
        (lambda folder: (folder / "engine.json").write_text("{"), "is not the record of an engine"),
    ],
    ids=["an altered engine", "a missing engine", "a broken record"],
)
def test_inspect_exits_1_where_an_engine_is_damaged(bundle, add_engine, capsys, damage, problem):
    damage(add_engine(bundle.folder))
    code, document = inspected(bundle.folder, capsys)
    assert (code, document["files_ok"], document["engines"][0]["files_ok"]) == (1, False, False)
    problems = document["engines"][0]["problems"]
    assert len(problems) == bool(problem)  # what the hash of a file tells is no problem of the record
    assert problem in "".join(problems)


@pytest.mark.parametrize(
    ("damage", "verdict"),
    [
        (lambda path: path.write_text("tex"), f"ALTERED: {hashlib.sha256(b'tex').hexdigest()}"),
        (lambda path: path.unlink(), "missing"),
    ],
    ids=["altered", "missing"],
)
def test_inspect_names_the_engine_file_that_is_damaged_and_no_other(
    bundle, add_engine, capsys, monkeypatch, damage, verdict
):
    monkeypatch.setenv("COLUMNS", "300")
    folder = add_engine(bundle.folder)
    damage(folder / "text.engine")
    assert run(["inspect", str(bundle.folder)]) == 1
    rows = [line for line in capsys.readouterr().out.splitlines() if f"engines/{folder.name}/" in line]
    damaged = [line for line in rows if "text.engine" in line]
    assert len(damaged) == 1
    assert verdict in damaged[0]
    assert all(" ok " in line for line in rows if line not in damaged)


def test_inspect_finds_engines_of_other_graphs(bundle, add_engine, edit_manifest, capsys):
    folder = add_engine(bundle.folder)
    record = json.loads((folder / "engine.json").read_text())
    record["graphs"]["itm"]["sources"]["onnx/itm.onnx"] = "0" * 64
    (folder / "engine.json").write_text(json.dumps(record))
    code, document = inspected(bundle.folder, capsys)
    assert code == 1
    assert document["engines"][0]["problems"] == ["built from other graphs than the bundle's: onnx/itm.onnx differs"]


def test_inspect_shows_a_person_the_engines_and_their_files(bundle, add_engine, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    folder = add_engine(bundle.folder)
    (folder / "text.engine").write_text("tex")
    assert run(["inspect", str(bundle.folder)]) == 1
    out = capsys.readouterr().out
    assert f"engines/{folder.name}: TensorRT-RTX 1.7.1.116 for sm80+sm89, fp32, vision, image_query, text, itm" in out
    assert "built 2026-01-02T03:04:05+00:00 on NVIDIA L4" in out
    line = next(line for line in out.splitlines() if "text.engine" in line)
    assert "ALTERED" in line
