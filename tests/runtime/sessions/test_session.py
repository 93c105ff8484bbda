"""Sessions: what goes in is checked against what the graph declares, and nothing is replaced in silence."""

import numpy as np
import onnx
import pytest

from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.bundle.graph_spec import AxisRange, GraphSpec, TensorSpec
from qpert.runtime.errors import BundleError, InputError, LimitError, UnavailableError
from qpert.runtime.sessions.open import open_session
from qpert.runtime.sessions.protocol import check_inputs
from qpert.runtime.sessions.providers import PROVIDERS, available_providers

SPEC = GraphSpec(
    "itm",
    "pair_scorer",
    "itm.onnx",
    (
        TensorSpec("image_embeds", "image_tokens", "float32", ("I", 5)),
        TensorSpec("input_ids", "token_ids", "int64", ("I", "T", "L")),
        TensorSpec("object_masks", "object_masks", "float32", ("I", "O", 5)),
    ),
    (TensorSpec("itm_scores", "pair_scores", "float32", ("I", "T")),),
    {"I": AxisRange(1, 2), "T": AxisRange(1, 3), "L": AxisRange(2, 4), "O": AxisRange(0, 2)},
)


def inputs(I=1, T=1, L=2, O=0):  # noqa: E741
    return {
        "image_embeds": np.zeros((I, 5), np.float32),
        "input_ids": np.zeros((I, T, L), np.int64),
        "object_masks": np.zeros((I, O, 5), np.float32),
    }


@pytest.mark.parametrize("lengths", [{}, {"I": 2, "T": 3, "L": 4, "O": 2}, {"O": 0, "T": 2}])
def test_inputs_within_the_ranges_pass(lengths):
    check_inputs(SPEC, inputs(**lengths))


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ({"I": 3}, "got 3 images, expected 1 to 2; pass fewer, or export again with a larger --max-batch"),
        ({"T": 4}, "got 4 texts, expected 1 to 3; pass fewer, or export again with a larger --max-text"),
        ({"L": 5}, "got 5 tokens a text, expected 2 to 4; .*larger --max-length"),
        ({"O": 3}, "got 3 boxes an image, expected 0 to 2; .*larger --max-boxes"),
        ({"I": 0}, "got 0 images, expected 1 to 2"),
        ({"T": 0}, "got 0 texts, expected 1 to 3"),
        ({"L": 1}, "got 1 tokens a text, expected 2 to 4"),
    ],
)
def test_an_axis_beyond_its_range_is_an_error_that_names_the_option(lengths, message):
    with pytest.raises(LimitError, match=f"graph 'itm' {message}"):
        check_inputs(SPEC, inputs(**lengths))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"input_ids": np.zeros((1, 1, 2), np.int32)},
            r"'input_ids' .* is int32 \[1, 1, 2\], expected int64 \['I', 'T', 'L'\]",
        ),
        ({"input_ids": np.zeros((1, 2), np.int64)}, r"is int64 \[1, 2\], expected int64 \['I', 'T', 'L'\]"),
        ({"image_embeds": np.zeros((1, 6), np.float32)}, r"is float32 \[1, 6\], expected float32 \['I', 5\]$"),
        ({"input_ids": np.zeros((2, 1, 2), np.int64)}, r"is int64 \[2, 1, 2\], .* with I = 1"),
    ],
)
def test_another_dtype_or_shape_is_named_with_what_was_expected(change, message):
    with pytest.raises(InputError, match=message):
        check_inputs(SPEC, inputs() | change)


def test_missing_and_unknown_inputs_are_named():
    given = inputs()
    with pytest.raises(InputError, match=r"got inputs \['image_embeds', 'object_masks'\], expected .*'input_ids'"):
        check_inputs(SPEC, {name: array for name, array in given.items() if name != "input_ids"})
    with pytest.raises(InputError, match="'extra'"):
        check_inputs(SPEC, given | {"extra": np.zeros(1)})


@pytest.fixture(scope="module")
def text(tiny_bundle):
    bundle = Bundle.open(tiny_bundle)
    return bundle.graph_path(bundle.manifest.graphs["text"]), bundle.manifest.graphs["text"]


def test_a_session_runs_what_its_graph_declares_and_not_after_it_is_closed(text):
    path, spec = text
    given = {name: np.ones((2, 4), np.int64) for name in spec.input_names}
    with open_session(path, spec) as session:
        outputs = session.run(given)
        assert list(outputs) == ["text_embeds"]
        assert (outputs["text_embeds"].shape, outputs["text_embeds"].dtype) == ((2, 16), np.float32)
    with pytest.raises(InputError, match="the session of graph 'text' is closed"):
        session.run(given)


def test_a_view_that_is_not_contiguous_gives_the_same_result(text):
    path, spec = text
    ids = np.arange(1, 13).reshape(2, 6)
    mask = np.ones_like(ids)
    with open_session(path, spec) as session:
        plain = session.run({"input_ids": np.ascontiguousarray(ids[:, ::2]), "attention_mask": mask[:, :3].copy()})
        view = session.run({"input_ids": ids[:, ::2], "attention_mask": mask[:, ::2]})
    np.testing.assert_array_equal(plain["text_embeds"], view["text_embeds"])


def test_an_unknown_provider_is_bad_input(text):
    with pytest.raises(InputError, match="got provider 'gpu', expected one of cpu, cuda, openvino, tensorrt, rtx"):
        open_session(*text, "gpu")


def test_a_provider_that_this_machine_lacks_is_an_error_and_the_cpu_is_not_used_in_its_place(text):
    absent = [p.name for p in PROVIDERS.values() if p.onnxruntime and p.name not in available_providers()]
    if not absent:
        pytest.skip("this ONNX Runtime has the CUDA provider")
    for name in absent:
        with pytest.raises(
            UnavailableError, match=rf"provider '{name}' was asked for, this ONNX Runtime .*CPUExecutionProvider"
        ):
            open_session(*text, name)


def test_a_file_alone_has_no_engine(text):
    with pytest.raises(InputError, match=r"provider 'rtx' runs the engines of a bundle, not .*text"):
        open_session(*text, "rtx")


def test_a_provider_that_onnx_runtime_has_and_does_not_use_is_an_error(text, monkeypatch):
    """ONNX Runtime falls back in silence: pretend that it has CUDA, and see that what it really uses is asked."""
    import onnxruntime

    real = onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    monkeypatch.setattr(
        onnxruntime,
        "InferenceSession",
        lambda path, options, providers: real(path, options, providers=["CPUExecutionProvider"]),
    )
    with pytest.raises(UnavailableError, match="'cuda' was asked for and could not start, ONNX Runtime would use CPU"):
        open_session(*text, "cuda")


def test_a_file_that_is_no_onnx_graph_is_named(text, tmp_path):
    (tmp_path / "x.onnx").write_bytes(b"not a graph")
    with pytest.raises(BundleError, match=r"ONNX Runtime cannot load .*x\.onnx"):
        open_session(tmp_path / "x.onnx", text[1])


def test_a_graph_with_other_inputs_than_declared_is_refused(tiny_bundle, text):
    with pytest.raises(
        BundleError, match=r"vision\.onnx has inputs and outputs .*pixel_values.*, the manifest declares .*input_ids"
    ):
        open_session(tiny_bundle / "onnx" / "vision.onnx", text[1])


@pytest.mark.parametrize("place", ["../outside.data", "/outside.data"])
def test_weights_outside_the_bundles_folder_are_not_read(tiny_bundle, copy_of, text, place, tmp_path):
    """External data is one more path out of a bundle. ONNX Runtime refuses it; this test holds it to that."""
    folder = copy_of(tiny_bundle)
    outside = folder / "outside.data"
    outside.write_bytes((folder / "onnx" / "qformer.data").read_bytes())
    location = str(outside) if place.startswith("/") else place
    path = folder / "onnx" / "text.onnx"
    model = onnx.load_model(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    onnx.save_model(model, path)
    with pytest.raises(BundleError, match=r"cannot load .*text\.onnx"):
        open_session(path, text[1])
