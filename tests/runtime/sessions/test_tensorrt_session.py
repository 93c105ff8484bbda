"""Engine sessions as far as they go without a GPU: what is refused and in which words, and what needs no library.

`tensorrt_rtx` and `cuda-bindings` are the real ones. Where a library has to fail in a way that it does not here, a
stand-in fails in its place; none stands in for one that works: that is what `test_gpu.py` is for.
"""

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.bundle.graph_spec import AxisRange, GraphSpec, TensorSpec
from qpert.runtime.cli import run
from qpert.runtime.errors import BundleError, LimitError, QpertWarning, UnavailableError
from qpert.runtime.retrieval.encoder import Encoder
from qpert.runtime.sessions.device import Device, PinnedMemory
from qpert.runtime.sessions.gpus import first_gpu
from qpert.runtime.sessions.open import open_sessions
from qpert.runtime.sessions.protocol import check_inputs
from qpert.runtime.sessions.tensorrt.contexts import ContextMaker, Replaying
from qpert.runtime.sessions.tensorrt.session import (
    axis_lengths,
    check_tensors,
    largest_bytes,
    load_engine,
    with_least_boxes,
    within_profile,
)

no_gpu = pytest.mark.skipif(first_gpu() is not None, reason="this machine has a GPU; test_gpu.py runs engines on it")

GRAPH = GraphSpec(
    "image_query",
    "query_head",
    "onnx/image_query.onnx",
    (
        TensorSpec("image_embeds", "image_tokens", "float16", ("B", 5, 4)),
        TensorSpec("object_masks", "object_masks", "float32", ("B", "O", 5)),
        TensorSpec("box_weights", "box_weights", "float32", ("B", "O")),
    ),
    (TensorSpec("query_embeds", "image_vectors", "float32", ("B", 3, 2)),),
    {"B": AxisRange(1, 8), "O": AxisRange(0, 6)},
)


def profile(batch=(1, 4, 8), boxes=(1, 2, 6)):
    return {
        "image_embeds": tuple((b, 5, 4) for b in batch),
        "object_masks": tuple((b, o, 5) for b, o in zip(batch, boxes, strict=True)),
        "box_weights": tuple((b, o) for b, o in zip(batch, boxes, strict=True)),
    }


# The profile


def test_an_engine_as_wide_as_its_graph_has_the_graphs_limits_and_takes_no_boxes_too():
    assert within_profile(GRAPH, profile()) == GRAPH


def test_a_narrower_engine_rules():
    spec = within_profile(GRAPH, profile(batch=(2, 2, 4), boxes=(1, 1, 3)))
    assert spec.ranges == {"B": AxisRange(2, 4), "O": AxisRange(0, 3)}
    given = {
        "image_embeds": np.zeros((5, 5, 4), np.float16),
        "object_masks": np.zeros((5, 0, 5), np.float32),
        "box_weights": np.zeros((5, 0), np.float32),
    }
    with pytest.raises(LimitError, match="got 5 images, expected 2 to 4"):
        check_inputs(spec, given)


@pytest.mark.parametrize(
    "wrong",
    [
        {name: shapes for name, shapes in profile().items() if name != "box_weights"},
        profile() | {"image_embeds": ((1, 5, 3), (4, 5, 3), (8, 5, 3))},
        profile() | {"box_weights": ((1,), (4,), (8,))},
        profile(batch=(9, 9, 9)),
    ],
    ids=["an input is missing", "another width", "another rank", "no batch in common"],
)
def test_a_profile_of_another_graph_is_refused(wrong):
    with pytest.raises(
        BundleError, match=r"(?s)engine's record has the profile .* for graph 'image_query'.*qpert build"
    ):
        within_profile(GRAPH, wrong)


def test_buffers_are_as_large_as_the_largest_call():
    assert largest_bytes(GRAPH.inputs[0], GRAPH) == 8 * 5 * 4 * 2
    assert largest_bytes(GRAPH.inputs[1], GRAPH) == 8 * 6 * 5 * 4
    assert largest_bytes(GRAPH.outputs[0], GRAPH) == 8 * 3 * 2 * 4


def test_calls_without_boxes_get_one_of_weight_zero_and_others_stay_as_they_are():
    none = {
        "image_embeds": np.ones((2, 5, 4), np.float16),
        "object_masks": np.zeros((2, 0, 5), np.float32),
        "box_weights": np.zeros((2, 0), np.float32),
    }
    given = with_least_boxes(GRAPH, none, profile())
    assert given["image_embeds"] is none["image_embeds"]
    assert given["object_masks"].shape == (2, 1, 5)
    assert given["box_weights"].tolist() == [[0], [0]]
    assert not given["object_masks"].any()
    assert axis_lengths(GRAPH, given) == {"B": 2, "O": 1}
    two = none | {"object_masks": np.ones((2, 2, 5), np.float32), "box_weights": np.ones((2, 2), np.float32)}
    assert with_least_boxes(GRAPH, two, profile()) == two


def test_a_box_of_weight_zero_is_stock_exactly(tiny_bundle):
    """What the session adds for an engine that takes no fewer than one box, in ONNX Runtime."""
    session = open_sessions(Bundle.open(tiny_bundle))["image_query"]
    tokens, width = session.spec.inputs[0].shape[1:]
    features = np.random.default_rng(0).standard_normal((2, tokens, width)).astype(np.float32)
    none = {
        "image_embeds": features,
        "object_masks": np.zeros((2, 0, tokens), np.float32),
        "box_weights": np.zeros((2, 0), np.float32),
    }
    boxed = with_least_boxes(session.spec, none, {"object_masks": ((1, 1, tokens),) * 3})
    assert boxed["box_weights"].shape == (2, 1)
    np.testing.assert_array_equal(session.run(boxed)["query_embeds"], session.run(none)["query_embeds"])


# What is missing


def test_without_an_engine_the_command_that_builds_one_is_given(tiny_bundle):
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(UnavailableError, match=r"holds no TensorRT-RTX engine, .*: qpert build .*bundle --flavor rtx"):
        Encoder(Bundle.open(tiny_bundle), "rtx")


@pytest.mark.parametrize(
    ("provider", "module", "advice"),
    [("tensorrt", "tensorrt", "qpert[trt]"), ("rtx", "tensorrt_rtx", "qpert[rtx]")],
)
def test_without_the_library_it_is_said_what_to_install(tiny_bundle, monkeypatch, capsys, provider, module, advice):
    monkeypatch.setitem(sys.modules, module, None)
    assert run(["verify", str(tiny_bundle), "--provider", provider]) == 3
    err = capsys.readouterr().err
    assert "is not installed" in err
    assert f"pip install '{advice}'" in err


def test_without_cuda_bindings_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(
        UnavailableError, match=r"need cuda-bindings, not installed here .*; pip install 'qpert\[rtx\]'"
    ):
        Device()


# Real libraries without a GPU


@pytest.fixture(scope="module")
def real_engine(tiny_bundle, tmp_path_factory):
    """A bundle with a real engine of the text graph for sm89."""
    pytest.importorskip("tensorrt_rtx")
    import shutil

    from qpert.exporter.engines.build import BuildRequest, build_engines

    folder = tmp_path_factory.mktemp("engine") / "bundle"
    shutil.copytree(tiny_bundle, folder)
    bundle = Bundle.open(folder)
    request = BuildRequest(flavor="rtx", target="sm89", graphs=("text",))
    build_engines(bundle, request, request.plan("fp32"))
    return folder


@no_gpu
def test_a_real_engine_on_a_machine_without_a_gpu_exits_3_and_says_what_is_missing(real_engine):
    """In a process of its own: a library that aborts would take the test run with it."""
    command = [sys.executable, "-m", "qpert.runtime.cli", "verify", str(real_engine), "--provider", "rtx"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    assert done.stdout == ""
    assert "error: cudaGetDeviceCount failed with cudaError" in done.stderr
    assert "Traceback" not in done.stderr


@no_gpu
def test_an_engine_that_the_library_does_not_open_is_explained_in_its_words(real_engine):
    import tensorrt_rtx

    from qpert.runtime.sessions.tensorrt.engines import find_engines
    from qpert.runtime.sessions.tensorrt.log import make_log

    (engine,) = find_engines(Bundle.open(real_engine))
    with pytest.raises(UnavailableError) as raised:
        load_engine(tensorrt_rtx, None, engine, "text", make_log(tensorrt_rtx))
    message = str(raised.value)
    assert message.startswith(f"{engine.record.title} cannot open {engine.path('text')}: ")
    assert "CUDA driver version is insufficient" in message
    assert message.endswith(f"build it again: qpert build {real_engine} --flavor rtx --target sm89 --force")


@no_gpu
def test_an_engine_that_was_cut_short_is_found_by_its_hash_before_the_library_sees_it(real_engine, copy_of):
    from qpert.runtime.sessions.tensorrt.engines import find_engines

    folder = copy_of(real_engine)
    (engine,) = find_engines(Bundle.open(folder))
    path = engine.path("text")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BundleError, match=r"text\.engine was cut short or altered"):
        load_engine(None, None, engine, "text", None)


@no_gpu
def test_doctor_says_why_engines_do_not_run_here(capsys):
    pytest.importorskip("tensorrt_rtx")
    run(["doctor", "--json"])
    finding = json.loads(capsys.readouterr().out)["provider rtx"]
    assert not finding["usable"]
    assert "cudaError" in finding["advice"]


# Libraries that fail


class FailingCuda:
    """CUDA's runtime, of which one function fails with a status; the others do nothing."""

    SUCCESS = SimpleNamespace(name="cudaSuccess")
    cudaError_t = SimpleNamespace(cudaSuccess=SUCCESS)  # noqa: N815, CUDA's name
    cudaStreamNonBlocking = cudaHostAllocDefault = 0  # noqa: N815
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)  # noqa: N815

    def __init__(self, function, status):
        self.failing = {function: (SimpleNamespace(name=status), None)}
        self.gives = {"cudaGetDeviceCount": 1, "cudaMalloc": 4096, "cudaHostAlloc": 8192}

    def cudaMemGetInfo(self):  # noqa: N802
        return self.SUCCESS, 3 << 20, 24 << 30

    def cudaGetErrorString(self, status):  # noqa: N802
        return self.SUCCESS, b"the words of CUDA"

    def __getattr__(self, name):
        return lambda *_: self.failing.get(name, (self.SUCCESS, self.gives.get(name, 0)))


def test_a_cuda_function_that_fails_is_named_with_its_status():
    with pytest.raises(UnavailableError, match=r"cudaGetDeviceCount failed with cudaErrorNoDevice: the words of CUDA"):
        Device(FailingCuda("cudaGetDeviceCount", "cudaErrorNoDevice"))


def test_gpu_memory_that_runs_out_says_what_was_needed_what_there_is_and_what_to_do():
    device = Device(FailingCuda("cudaMalloc", "cudaErrorMemoryAllocation"))
    with pytest.raises(UnavailableError) as raised:
        device.allocate(100 << 20, "'image_embeds' of graph 'vision'")
    message = str(raised.value)
    assert "'image_embeds' of graph 'vision' needs 100 MiB, 3 MiB of 24,576 MiB are free" in message
    assert "--max-batch" in message
    assert "--precision fp16" in message


def test_another_failure_of_an_allocation_is_not_called_a_lack_of_memory():
    device = Device(FailingCuda("cudaMalloc", "cudaErrorIllegalAddress"))
    with pytest.raises(UnavailableError, match="cudaMalloc failed with cudaErrorIllegalAddress"):
        device.allocate(1, "something")


def test_page_locked_memory_that_cannot_be_had_is_an_error():
    device = Device(FailingCuda("cudaHostAlloc", "cudaErrorMemoryAllocation"))
    with pytest.raises(UnavailableError, match="cudaHostAlloc failed with cudaErrorMemoryAllocation"):
        PinnedMemory(device, 100)


class FailingContext:
    """An execution context that refuses one call."""

    def __init__(self, refused):
        self.refused = refused

    def __getattr__(self, name):
        return lambda *_: name != self.refused


def maker(context, cuda=None):
    """A maker over a library that gives `context` for every context asked for."""
    library = SimpleNamespace(
        __name__="tensorrt",
        __version__="10.14.1",
        ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED=1),
    )
    engine = SimpleNamespace(device_memory_size_v2=512 << 20, create_execution_context=lambda *_: context)
    log = SimpleNamespace(summary=lambda: "the words of the library", forget=lambda: None)
    device = Device(cuda or FailingCuda("", ""))
    return ContextMaker(library, device, engine, {"x": 4096}, log, "text")


def test_a_context_that_cannot_be_made_is_a_lack_of_memory():
    with pytest.raises(UnavailableError, match=r"running graph 'text' needs 512 MiB, 3 MiB of 24,576 MiB are free"):
        Replaying(maker(None))


@pytest.mark.parametrize(
    ("refused", "what"),
    [("set_input_shape", r"shape \[2, 7\] of 'x'"), ("execute_async_v3", r"the shapes \{'x': \(2, 7\)\}")],
)
def test_a_run_that_the_library_refuses_is_explained_in_its_words(refused, what):
    contexts = Replaying(maker(FailingContext(refused)))
    with pytest.raises(
        UnavailableError, match=rf"tensorrt 10\.14\.1 does not run graph 'text' with {what}: the words of the library"
    ):
        contexts.execute({"x": (2, 7)})


def test_a_shape_that_cannot_be_recorded_is_run_and_not_tried_again():
    contexts = Replaying(maker(FailingContext(""), FailingCuda("cudaStreamEndCapture", "cudaErrorStreamCaptureFailed")))
    for _ in range(2):
        contexts.execute({"x": (2, 7)})
    with pytest.warns(QpertWarning, match="'text' cannot be recorded as a CUDA graph .cudaErrorStreamCaptureFailed"):
        contexts.execute({"x": (2, 7)})
    assert not contexts.captures
    contexts.execute({"x": (2, 7)})
    assert not contexts.captured


def test_an_engine_that_does_not_fit_into_gpu_memory_is_not_called_broken(real_engine):
    from qpert.runtime.sessions.tensorrt.engines import find_engines

    (engine,) = find_engines(Bundle.open(real_engine))
    library = SimpleNamespace(Runtime=lambda log: SimpleNamespace(deserialize_cuda_engine=lambda plan: None))
    log = SimpleNamespace(summary=lambda: "Cuda Runtime (out of memory)")
    with pytest.raises(UnavailableError, match=r"the engine of graph 'text' needs .* are free; end other programs"):
        load_engine(library, Device(FailingCuda("", "")), engine, "text", log)


def test_an_engine_with_other_inputs_than_the_graph_is_refused(tmp_path):
    mode = SimpleNamespace(INPUT="in", OUTPUT="out")
    library = SimpleNamespace(TensorIOMode=mode, nptype=lambda dtype: dtype)
    engine = SimpleNamespace(
        num_io_tensors=1,
        get_tensor_name=lambda index: "pixels",
        get_tensor_mode=lambda name: "in",
        get_tensor_dtype=lambda name: np.float32,
    )
    with pytest.raises(BundleError, match=r"has inputs and outputs .*'pixels': 'float32'.*declares .*'image_embeds'"):
        check_tensors(library, engine, GRAPH, tmp_path)
