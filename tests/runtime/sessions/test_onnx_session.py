"""ONNX Runtime: memory that runs out, outputs that stay where they were computed, thousands of calls."""

import gc
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.bundle.graph_spec import AxisRange, GraphSpec, TensorSpec
from qpert.runtime.errors import BundleError, InputError, LimitError, UnavailableError
from qpert.runtime.retrieval.encoder import Encoder
from qpert.runtime.sessions.device import DeviceArray
from qpert.runtime.sessions.onnx import CudaSession, OnnxRuntimeSession
from qpert.runtime.sessions.open import open_session, open_sessions
from qpert.runtime.sessions.protocol import DeviceSession, run_on_device
from qpert.runtime.sessions.providers import PROVIDERS


class HostSession(CudaSession):
    """The session of the CUDA provider with the host's memory in place of the GPU's: everything else is the same."""

    memory = "cpu"


@pytest.fixture(scope="module")
def bundle(tiny_bundle):
    return Bundle.open(tiny_bundle)


def graph(bundle, name):
    spec = bundle.manifest.graphs[name]
    return bundle.graph_path(spec), spec


@pytest.fixture(scope="module")
def bound(bundle):
    """Every graph, with bound inputs and outputs."""
    sessions = {}
    for name in bundle.manifest.graphs:
        path, spec = graph(bundle, name)
        plain = OnnxRuntimeSession.open(path, spec, PROVIDERS["cpu"])
        sessions[name] = HostSession(spec, plain._session)
    return sessions


@pytest.fixture(scope="module")
def pixels(bundle):
    size = bundle.manifest.preprocessing.size
    return np.random.default_rng(0).standard_normal((2, 3, size, size)).astype(np.float32)


def no_boxes(features):
    count, tokens = features.shape[:2]
    return {"object_masks": np.zeros((count, 0, tokens), np.float32), "box_weights": np.zeros((count, 0), np.float32)}


# Outputs that stay


def test_features_that_stay_where_they_were_computed_give_what_features_on_the_host_give(bundle, bound, pixels):
    plain = open_sessions(bundle)
    expected = plain["vision"].run({"pixel_values": pixels})["image_embeds"]
    queries = plain["image_query"].run({"image_embeds": expected} | no_boxes(expected))["query_embeds"]

    kept = bound["vision"].run_on_device({"pixel_values": pixels})["image_embeds"]
    assert isinstance(kept, DeviceArray)
    assert (kept.shape, kept.dtype, kept.nbytes) == (expected.shape, expected.dtype, expected.nbytes)
    np.testing.assert_array_equal(kept.numpy(), expected)
    found = bound["image_query"].run({"image_embeds": kept} | no_boxes(expected))["query_embeds"]
    np.testing.assert_array_equal(found, queries)


def test_features_stay_from_vision_to_itm_and_are_copied_only_when_they_are_read(bundle, bound, random_pictures):
    pictures, texts = random_pictures(3), ["a dog", "two cats on a mat"]
    plain, kept = Encoder(bundle, "cpu"), Encoder(bundle, "cpu")
    kept.sessions = dict(bound)
    expected, found = plain.encode_images(pictures), kept.encode_images(pictures)
    copies = []
    whole = found.for_matching
    assert isinstance(whole, DeviceArray)
    found.for_matching = replace(whole, copy=lambda: copies.append(1) or whole.copy())

    np.testing.assert_array_equal(kept.itm_scores(found, texts), plain.itm_scores(expected, texts))
    second = found.rows(slice(1, 2))
    assert isinstance(second.for_matching, DeviceArray)
    np.testing.assert_array_equal(kept.itm_scores(second, texts), plain.itm_scores(expected.rows([1]), texts))
    assert copies == []
    np.testing.assert_array_equal(second.image_embeds, expected.image_embeds[1:2])
    np.testing.assert_array_equal(found.rows([2, 0]).image_embeds, expected.image_embeds[[2, 0]])
    np.testing.assert_array_equal(found.rows(slice(None, None, 2)).image_embeds, expected.image_embeds[::2])
    assert len(copies) == 2  # one for the part, one for the whole, however often either is read


def test_what_stays_is_checked_as_what_comes_from_the_host(bound, pixels):
    kept = bound["vision"].run_on_device({"pixel_values": pixels})["image_embeds"]
    with pytest.raises(
        InputError, match=r"'pixel_values' of graph 'vision' is float32 \[2, .*expected float32 \['B', 3"
    ):
        bound["vision"].run({"pixel_values": kept})


def test_what_stays_outlives_the_session_that_made_it(bundle, pixels):
    path, spec = graph(bundle, "vision")
    session = HostSession(spec, OnnxRuntimeSession.open(path, spec, PROVIDERS["cpu"])._session)
    kept = session.run_on_device({"pixel_values": pixels})["image_embeds"]
    before = kept.numpy().copy()
    session.close()
    del session
    gc.collect()
    np.testing.assert_array_equal(kept.numpy(), before)


def test_on_the_cpu_outputs_are_plain_arrays(bundle, pixels):
    with open_session(*graph(bundle, "vision")) as session:
        assert not isinstance(session, DeviceSession)
        kept = run_on_device(session, {"pixel_values": pixels})["image_embeds"]
        assert isinstance(kept, np.ndarray)


def test_int64_inputs_that_are_views_are_bound_as_their_contiguous_copies(bound):
    ids = np.arange(1, 13).reshape(2, 6)
    given = {"input_ids": ids[:, ::2], "attention_mask": np.ones_like(ids)[:, ::2]}
    copies = {name: np.ascontiguousarray(array) for name, array in given.items()}
    np.testing.assert_array_equal(bound["text"].run(given)["text_embeds"], bound["text"].run(copies)["text_embeds"])


def test_limits_hold_for_bound_inputs_too(bundle, bound):
    too_long = bundle.manifest.graphs["text"].ranges["T"].max + 1
    with pytest.raises(LimitError, match=f"got {too_long} texts"):
        bound["text"].run({name: np.ones((too_long, 4), np.int64) for name in ("input_ids", "attention_mask")})


# Memory


EXHAUSTED = """
import sys
import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

from qpert.runtime.errors import UnavailableError
from qpert.runtime.bundle.graph_spec import AxisRange, GraphSpec, TensorSpec
from qpert.runtime.sessions.onnx import OnnxRuntimeSession

kind = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
ort.create_and_register_allocator(kind, ort.OrtArenaCfg({"max_mem": 1 << 20, "arena_extend_strategy": 1}))
nodes = [helper.make_node("Neg", ["x"], ["z"]), helper.make_node("Add", ["z", "z"], ["y"])]
x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B"]) for name in "xy")
model = helper.make_model(
    helper.make_graph(nodes, "g", [x], [y]), opset_imports=[helper.make_opsetid("", 20)], ir_version=10
)
options = ort.SessionOptions()
options.add_session_config_entry("session.use_env_allocators", "1")
options.log_severity_level = 4
session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
x, y = TensorSpec("x", "token_ids", "float32", ("B",)), TensorSpec("y", "text_vectors", "float32", ("B",))
spec = GraphSpec("g", "text_tower", "g.onnx", (x,), (y,),
                 {"B": AxisRange(1, 10**8)})
small = OnnxRuntimeSession(spec, session)
assert small.run({"x": np.ones(1000, np.float32)})["y"].sum() == -2000
try:
    small.run({"x": np.ones(10_000_000, np.float32)})
except UnavailableError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def test_memory_that_runs_out_in_a_run_says_what_to_do():
    """ONNX Runtime's own allocator, held to 1 MiB in a process of its own, is asked for 40 MB."""
    done = subprocess.run([sys.executable, "-c", EXHAUSTED], capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    assert "there is not enough memory to run graph 'g'" in done.stdout
    assert "40000000" in done.stdout
    assert "export with a smaller --max-batch or --max-text, or with --precision fp16" in done.stdout


def test_a_graph_that_loads_and_cannot_run_is_a_broken_bundle(tmp_path):
    """Nothing tells before a run that five numbers do not go into rows of two."""
    x, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in (("x", ["B"]), ("y", "RC"))
    )
    rows = numpy_helper.from_array(np.array([-1, 2]), "rows")
    graph = helper.make_graph([helper.make_node("Reshape", ["x", "rows"], ["y"])], "g", [x], [y], [rows])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "g.onnx")
    inputs, outputs = (
        (TensorSpec("x", "token_ids", "float32", ("B",)),),
        (TensorSpec("y", "text_vectors", "float32", ("R", "C")),),
    )
    spec = GraphSpec("g", "text_tower", "g.onnx", inputs, outputs, {"B": AxisRange(1, 10)})
    with OnnxRuntimeSession.open(tmp_path / "g.onnx", spec, PROVIDERS["cpu"]) as session:
        assert session.run({"x": np.ones(4, np.float32)})["y"].shape == (2, 2)
        with pytest.raises(BundleError, match=r"(?s)loads graph 'g' and cannot run it.*export the bundle again"):
            session.run({"x": np.ones(5, np.float32)})


def test_a_graph_that_does_not_fit_is_not_called_a_broken_file(bundle, monkeypatch):
    import onnxruntime

    def fail(*_, **__):
        raise RuntimeError("CUDA failure 2: out of memory ; GPU=0")

    monkeypatch.setattr(onnxruntime, "InferenceSession", fail)
    with pytest.raises(UnavailableError, match=r"not enough memory to load .*text\.onnx with provider 'cpu'"):
        open_session(*graph(bundle, "text"))


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads the process's memory from /proc")
def test_ten_thousand_calls_do_not_grow_the_process(bundle):
    """In shapes that come and go. 2 MiB over 10,000 calls is 210 bytes a call, about its smallest array with the
    header; what the process takes goes up and down by 0.6 MiB of itself."""
    given = [
        {name: np.ones((texts, length), np.int64) for name in ("input_ids", "attention_mask")}
        for texts in (1, 3, 6)
        for length in (2, 7, 12)
    ]
    with open_session(*graph(bundle, "text"), threads=1) as session:
        for number in range(1_000):
            session.run(given[number % len(given)])
        gc.collect()
        before = resident_bytes()
        for number in range(10_000):
            session.run(given[number % len(given)])
        gc.collect()
    assert resident_bytes() - before < 2 << 20


def resident_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmRSS"))


# Opening all, or none


def test_one_session_gives_every_thread_its_own_result(bundle):
    path, spec = graph(bundle, "text")
    rows = [np.full((1, 4), token, np.int64) for token in range(1, 9)]
    mask = np.ones((1, 4), np.int64)
    with open_session(path, spec, threads=1) as session:
        alone = [session.run({"input_ids": ids, "attention_mask": mask})["text_embeds"] for ids in rows]
        found: dict[int, list] = {}

        def work(number):
            ids = {"input_ids": rows[number], "attention_mask": mask}
            found[number] = [session.run(ids)["text_embeds"] for _ in range(50)]

        threads = [threading.Thread(target=work, args=(number,)) for number in range(len(rows))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for number, expected in enumerate(alone):
        for result in found[number]:
            np.testing.assert_array_equal(result, expected)


def test_where_one_graph_does_not_open_the_others_are_closed(bundle, monkeypatch):
    import qpert.runtime.sessions.open as module

    opened = []
    real = module.open_session

    def open_but_itm(path, spec, *arguments, **options):
        if spec.name == "itm":
            raise UnavailableError("no room")
        opened.append(real(path, spec, *arguments, **options))
        return opened[-1]

    monkeypatch.setattr(module, "open_session", open_but_itm)
    with pytest.raises(UnavailableError, match="no room"):
        open_sessions(bundle)
    assert len(opened) == 3
    for session in opened:
        with pytest.raises(InputError, match="is closed"):
            session.run({})
