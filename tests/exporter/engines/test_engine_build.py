"""Engines of a bundle, built with the real TensorRT-RTX, which needs no GPU for it. No engine is run here."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qpert.exporter.commands.build import parse_size
from qpert.exporter.engines import build as module
from qpert.exporter.engines.build import BuildRequest, build_engines, write_engine
from qpert.exporter.engines.builder import BuildJob, EngineError, build_engine
from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.cli import run
from qpert.runtime.errors import BundleError, InputError, UnavailableError
from qpert.runtime.sessions.tensorrt.engines import read_engine

rtx = pytest.importorskip("tensorrt_rtx", reason="needs the extra rtx: pip install 'qpert[rtx]'")

VISION = BuildRequest(flavor="rtx", target="sm89", graphs=("vision",), command="qpert build it")


class Listener:
    """Keeps what a build tells, and calls `on_step` at every step."""

    def __init__(self, on_step=lambda: None):
        self.lines, self.stages, self.on_step = [], [], on_step

    def say(self, line):
        self.lines.append(line)

    def stage(self, what, total=None, *, unit=""):
        import contextlib

        done = []
        self.stages.append((what, total, done))

        def advance(count):
            done.append(count)
            self.on_step()

        return contextlib.nullcontext(advance)


def build(folder, request=VISION, progress=None):
    bundle = Bundle.open(folder)
    return build_engines(bundle, request, request.plan(bundle.manifest.precision), progress)


def engine_folder(folder, name="sm89"):
    return folder / "engines" / f"{name}-rtx{rtx.__version__}"


@pytest.fixture(scope="module")
def tiny_engines(tiny_bundle, tmp_path_factory):
    """A copy of the tiny bundle with engines of its two quick graphs for sm89; not to be written to."""
    import shutil

    folder = Path(shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("engines") / "bundle"))
    progress = Listener()
    request = BuildRequest(flavor="rtx", target="sm89", graphs=("vision", "text"), command="qpert build it")
    return folder, build(folder, request, progress), progress


def test_a_build_leaves_an_engine_and_a_record_that_says_how_it_came_to_be(tiny_engines):
    folder, report, _ = tiny_engines
    assert sorted(path.name for path in engine_folder(folder).iterdir()) == [
        "engine.json",
        "text.engine",
        "vision.engine",
    ]
    engine = read_engine(folder, engine_folder(folder))
    assert all(state.ok for state in engine.check())
    record, vision = engine.record, engine.record.graphs["vision"]
    content = (engine_folder(folder) / "vision.engine").read_bytes()
    assert (vision.bytes, vision.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert vision.sources == {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in ("onnx/vision.onnx", "onnx/vision.data")
    }
    assert vision.profile == {"pixel_values": ((1, 3, 56, 56), (3, 3, 56, 56), (3, 3, 56, 56))}
    assert vision.seconds > 0
    assert (record.flavor, record.flavor_version, record.target) == ("rtx", rtx.__version__, "sm89")
    assert (record.precision, record.tf32, record.command) == ("fp32", False, "qpert build it")
    assert [(engine.graph, engine.kept) for engine in report.engines] == [("vision", False), ("text", False)]


def test_a_build_says_what_it_builds_for_what_with_what_and_how_long_it_took(tiny_engines):
    _, _, progress = tiny_engines
    assert progress.lines[0] == f"engines for sm89 with TensorRT-RTX {rtx.__version__} (as requested)"
    assert progress.lines[1].startswith("built vision for sm89: ")
    assert [what for what, *_ in progress.stages] == ["building vision for sm89", "building text for sm89"]
    for _, total, done in progress.stages:
        assert sum(done) == total == 100
        assert len(done) > 10, "the whole build tells of itself, not only its ends"


def test_what_is_built_is_not_built_again_unless_forced(tiny_engines, copy_of):
    folder = copy_of(tiny_engines[0])
    before = (engine_folder(folder) / "vision.engine").stat()
    assert [engine.kept for engine in build(folder).engines] == [True]
    assert (engine_folder(folder) / "vision.engine").stat().st_mtime_ns == before.st_mtime_ns
    forced = BuildRequest("rtx", "sm89", ("vision",), force=True)
    assert [engine.kept for engine in build(folder, forced).engines] == [False]
    assert (engine_folder(folder) / "vision.engine").stat().st_ino != before.st_ino
    assert set(read_engine(folder, engine_folder(folder)).record.graphs) == {"vision", "text"}


def damage_engine(folder):
    path = engine_folder(folder) / "vision.engine"
    path.write_bytes(path.read_bytes()[:1000])


def damage_record(folder):
    (engine_folder(folder) / "engine.json").write_text("{")


def change_graph(folder):
    record = json.loads((engine_folder(folder) / "engine.json").read_text())
    record["graphs"]["vision"]["sources"]["onnx/vision.data"] = "0" * 64
    (engine_folder(folder) / "engine.json").write_text(json.dumps(record))


@pytest.mark.parametrize("damage", [damage_engine, damage_record, change_graph])
def test_an_engine_that_is_cut_short_unrecorded_or_of_another_graph_is_built_again(tiny_engines, copy_of, damage):
    folder = copy_of(tiny_engines[0])
    damage(folder)
    assert [engine.kept for engine in build(folder).engines] == [False]
    assert all(state.ok for state in read_engine(folder, engine_folder(folder)).check())


@pytest.fixture
def listens_to_ctrl_c():
    """Python's own handler: a shell gives background jobs one that ignores the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("listens_to_ctrl_c")
def test_ctrl_c_stops_the_library_and_leaves_no_half_engine(tiny_engines, copy_of):
    folder = copy_of(tiny_engines[0])
    steps = []

    def interrupt():
        steps.append(1)
        if len(steps) == 5:
            os.kill(os.getpid(), signal.SIGINT)

    again = BuildRequest("rtx", "sm89", ("text", "vision"), force=True)
    untouched = (engine_folder(folder) / "vision.engine").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        build(folder, again, Listener(interrupt))
    assert len(steps) < 50, "it stopped at its next step, not at the end"
    assert [path.name for path in (folder / "engines").iterdir()] == [engine_folder(folder).name]
    assert (engine_folder(folder) / "vision.engine").read_bytes() == untouched
    assert all(state.ok for state in read_engine(folder, engine_folder(folder)).check())


def test_what_was_finished_before_an_interruption_is_kept(tiny_bundle, copy_of, monkeypatch):
    folder = copy_of(tiny_bundle)
    real = module.build_engine

    def fails_at_text(library, job, advance):
        if job.graph == "text":
            raise KeyboardInterrupt
        return real(library, job, advance)

    monkeypatch.setattr(module, "build_engine", fails_at_text)
    both = BuildRequest("rtx", "sm89", ("vision", "text"))
    with pytest.raises(KeyboardInterrupt):
        build(folder, both)
    assert set(read_engine(folder, engine_folder(folder)).record.graphs) == {"vision"}
    monkeypatch.setattr(module, "build_engine", real)
    assert [engine.kept for engine in build(folder, both).engines] == [True, False]


def test_the_first_engine_that_fails_leaves_no_folder_behind(tiny_bundle, copy_of, monkeypatch):
    folder = copy_of(tiny_bundle)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(UnavailableError, match="finished engines are kept"):
        build(folder)
    assert list((folder / "engines").iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_told_with_what_was_to_be_written():
    with pytest.raises(UnavailableError, match=r"full has 12,345 bytes and could not be written \(No space left") as e:
        write_engine(Path("/dev/full"), b"x" * 12345)
    assert e.value.exit_code == 3


def test_engines_never_go_where_a_link_leads_out_of_the_bundle(tiny_bundle, copy_of, tmp_path):
    folder = copy_of(tiny_bundle)
    (tmp_path / "elsewhere").mkdir()
    (folder / "engines").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="outside the bundle"):
        build(folder)
    assert list((tmp_path / "elsewhere").iterdir()) == []


ONES = np.ones((8, 8), np.float32)


def toy(path, dtype, operator="MatMul", domain="", weights=ONES):
    """A graph of one operator: x [B, n] and a constant [n, n] to y."""
    x, y = (helper.make_tensor_value_info(name, dtype, ["B", len(weights)]) for name in "xy")
    weight = helper.make_tensor("w", dtype, weights.shape, weights.ravel().tolist())
    if dtype == TensorProto.FLOAT:
        weight = numpy_helper.from_array(weights, "w")
    graph = helper.make_graph([helper.make_node(operator, ["x", "w"], ["y"], domain=domain)], "toy", [x], [y], [weight])
    imports = [helper.make_opsetid("", 20), *([helper.make_opsetid(domain, 1)] if domain else [])]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=10), path)
    return path


def job(path, architectures=("sm89",), profile=None, **more):
    return BuildJob("toy", path, profile or {"x": ((1, 8), (4, 8), (8, 8))}, architectures, **more)


def test_external_weights_beside_the_graph_are_in_the_engine(tmp_path):
    weights = np.random.default_rng(0).standard_normal((256, 256)).astype(np.float32)
    model = onnx.load(toy(tmp_path / "toy.onnx", TensorProto.FLOAT, weights=weights))
    onnx.save(model, tmp_path / "apart.onnx", save_as_external_data=True, location="apart.data", size_threshold=0)
    assert weights[7].tobytes() not in (tmp_path / "apart.onnx").read_bytes()
    shapes = {"x": ((1, 256), (4, 256), (8, 256))}
    plan = bytes(build_engine(rtx, job(tmp_path / "apart.onnx", profile=shapes), lambda count: None).plan)
    assert all(row.tobytes() in plan for row in weights) or all(row.tobytes() in plan for row in weights.T)


def test_a_graph_that_the_library_cannot_read_is_told_in_the_librarys_words(tmp_path):
    path = toy(tmp_path / "toy.onnx", TensorProto.FLOAT, "QueryMap", "qpert")
    with pytest.raises(EngineError, match=r"cannot read .*toy\.onnx: operator QueryMap .*Plugin not found"):
        build_engine(rtx, job(path), lambda count: None)


def test_a_file_that_is_no_graph_is_told(tmp_path):
    path = tmp_path / "toy.onnx"
    path.write_bytes(b"not a graph")
    with pytest.raises(EngineError, match=r"cannot read .*toy\.onnx"):
        build_engine(rtx, job(path), lambda count: None)


def test_a_library_that_gives_none_raises_with_what_it_logged(tmp_path):
    # Real, not staged: sm75 has no bfloat16, TensorRT-RTX finds out while it compiles, logs it and returns None.
    path = toy(tmp_path / "toy.onnx", TensorProto.BFLOAT16)
    with pytest.raises(EngineError, match=r"built no engine for graph 'toy': .*b16"):
        build_engine(rtx, job(path, ("sm75",)), lambda count: None)


@pytest.mark.parametrize("architecture", ["sm90", "sm100"])
def test_an_architecture_that_the_library_does_not_know_is_refused_by_the_builder_too(tmp_path, architecture):
    path = toy(tmp_path / "toy.onnx", TensorProto.FLOAT)
    with pytest.raises(EngineError, match=architecture) as caught:
        build_engine(rtx, job(path, ("sm89", architecture)), lambda count: None)
    assert caught.value.code == "engine-architecture-refused"


def test_a_profile_that_is_not_the_graphs_is_told(tmp_path):
    path = toy(tmp_path / "toy.onnx", TensorProto.FLOAT)
    with pytest.raises(EngineError, match="toy"):
        build_engine(rtx, job(path, profile={"x": ((1, 9), (4, 9), (8, 9))}), lambda count: None)


def test_a_workspace_limit_reaches_the_library(tmp_path):
    path = toy(tmp_path / "toy.onnx", TensorProto.FLOAT)
    assert build_engine(rtx, job(path, workspace=1 << 28), lambda count: None).plan.nbytes > 0


class RefusingCache:
    """A configuration whose library refuses the timing cache of another GPU."""

    def __init__(self):
        self.attached = []

    def create_timing_cache(self, content):
        return content

    def set_timing_cache(self, cache, ignore_mismatch):
        self.attached.append((cache, ignore_mismatch))
        return cache == b""


def test_a_timing_cache_of_another_gpu_is_left_and_a_new_one_begun(tmp_path):
    from qpert.exporter.engines.builder import attached_cache

    config = RefusingCache()
    assert attached_cache(config, job(tmp_path, timing_cache=b"of another")) == b""
    assert config.attached == [(b"of another", False), (b"", False)]
    assert attached_cache(config, job(tmp_path)) is None


@pytest.mark.parametrize(("text", "size"), [("512M", 512 << 20), ("2g", 2 << 30), ("4096", 4096), ("1K", 1024)])
def test_a_workspace_is_given_with_a_unit(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "M", "-1G", "1.5G", "2T", "0", "²", "1_0"])
def test_a_workspace_that_is_no_size_is_refused(text):
    with pytest.raises(InputError) as caught:
        parse_size(text)
    assert caught.value.code == "memory-size"


def test_the_command_prints_one_json_document(tiny_engines, copy_of, capsys):
    folder = copy_of(tiny_engines[0])
    command = ["build", str(folder), "--flavor", "rtx", "--target", "sm89", "--graph", "vision", "--json"]
    assert run(command) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["flavor"], document["targets"]) == ("rtx", ["sm89"])
    (engine,) = document["engines"]
    assert engine["kept"]
    assert (folder / engine["file"]).stat().st_size == engine["bytes"]


def test_the_command_shows_a_person_each_target(tiny_engines, copy_of, capsys):
    folder = copy_of(tiny_engines[0])
    assert run(["build", str(folder), "--flavor", "rtx", "--target", "sm89", "--graph", "vision"]) == 0
    out = capsys.readouterr().out
    assert f"engines/sm89-rtx{rtx.__version__}" in out
    assert "kept" in out


@pytest.mark.parametrize(
    ("target", "code", "words"),
    [
        ("sm90", 3, "not for sm90; build with classic TensorRT"),
        ("sm100", 3, "not for sm100"),
        ("h100", 2, "got target 'h100', expected auto, current, or architectures"),
    ],
)
def test_a_target_that_cannot_be_is_refused_before_anything_is_done(tiny_bundle, capsys, tmp_path, target, code, words):
    options = ["--target", target]
    assert run(["build", str(tiny_bundle), "--flavor", "rtx", *options]) == code
    assert words in capsys.readouterr().err
    assert run(["export", "blip2", "--trt", "--trt-flavor", "rtx", *options, "--out", str(tmp_path / "b")]) == code
    assert words in capsys.readouterr().err
    assert not (tmp_path / "b").exists()
    assert not (tiny_bundle / "engines").exists()


def test_engine_options_without_trt_are_refused(capsys, tmp_path):
    assert run(["export", "blip2", "--target", "sm89", "--out", str(tmp_path / "b")]) == 2
    assert "--target only applies to engines, which --trt compiles; add --trt" in capsys.readouterr().err


def test_export_with_trt_leaves_engines_of_every_graph_in_the_bundle(stock_export, copy_of, monkeypatch, capsys):
    folder = copy_of(stock_export.folder)
    # the export itself has its own tests, and takes its time
    monkeypatch.setattr("qpert.exporter.export.export_bundle", lambda request, progress: Bundle.open(folder))
    assert run(["export", "blip2", "--trt", "--trt-flavor", "rtx", "--target", "sm80+sm89", "--json"]) == 0
    engines = json.loads(capsys.readouterr().out)["engines"]
    assert [engine["graph"] for engine in engines] == ["vision", "image_query", "text", "itm"]
    assert all((folder / engine["file"]).stat().st_size == engine["bytes"] for engine in engines)
    assert read_engine(folder, engine_folder(folder, "sm80+sm89")).record.architectures == ("sm80", "sm89")
