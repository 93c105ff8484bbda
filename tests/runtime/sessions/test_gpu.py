"""Every GPU provider that this machine has, against ONNX Runtime's CPU provider and the recorded outputs of PyTorch.

Skipped elsewhere, with what `qpert doctor` says of the provider as the reason: `pytest -m gpu -rs`.
"""

import gc
import json
import shutil
import threading

import numpy as np
import pytest

from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.cli import run
from qpert.runtime.errors import InputError, LimitError, UnavailableError
from qpert.runtime.retrieval.encoder import Encoder
from qpert.runtime.sessions.device import Device, DeviceArray
from qpert.runtime.sessions.doctor import find_provider_here
from qpert.runtime.sessions.protocol import run_on_device
from qpert.runtime.sessions.providers import PROVIDERS
from qpert.runtime.verification import TOLERANCES, cosine_distance

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", params=["cuda", "tensorrt", "rtx"])
def provider(request):
    """A provider that starts here."""
    finding = find_provider_here(PROVIDERS[request.param])
    if not finding.usable:
        pytest.skip(f"{finding.name}: {finding.found}; {finding.advice}")
    return request.param


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def served(request, provider, tmp_path_factory):
    """A bundle, with engines for this GPU where the provider runs engines."""
    folder = tmp_path_factory.mktemp("gpu") / "bundle"
    # Asked for here, not as arguments: where the provider is skipped, nothing is exported.
    shutil.copytree(request.getfixturevalue({"fp32": "tiny_bundle", "fp16": "half_bundle"}[request.param]), folder)
    if flavor := PROVIDERS[provider].flavor:
        from qpert.exporter.engines.build import BuildRequest, build_engines

        bundle = Bundle.open(folder)
        wanted = BuildRequest(flavor=flavor, target="current")
        try:
            plan = wanted.plan(bundle.manifest.precision)
        except UnavailableError as error:  # TensorRT-RTX does not build for every architecture
            pytest.skip(str(error))
        build_engines(bundle, wanted, plan)
    return folder


@pytest.fixture(scope="module")
def on_gpu(served, provider):
    encoder = Encoder(Bundle.open(served), provider)
    yield encoder
    encoder.close()


@pytest.fixture(scope="module")
def on_cpu(served):
    return Encoder(Bundle.open(served), "cpu")


def lengths_at(spec, end):
    """The lengths of a graph's axes at one end of its profile, or in its middle."""
    pick = {"min": lambda r: r.min, "opt": lambda r: (r.min + r.max + 1) // 2, "max": lambda r: r.max}[end]
    return {axis: pick(length) for axis, length in spec.ranges.items()}


def random_inputs(spec, lengths, seed=0):
    """Inputs of any size that mean something: masks of ones and zeros, token ids that exist, masked ends of texts."""
    rng = np.random.default_rng(seed)
    given = {}
    for tensor in spec.inputs:
        shape = [lengths.get(axis, axis) for axis in tensor.shape]
        if tensor.name == "input_ids":
            given[tensor.name] = rng.integers(1, 20, shape)
        elif tensor.name == "attention_mask":
            ends = rng.integers(2, shape[-1] + 1, shape[:-1])
            given[tensor.name] = (np.arange(shape[-1]) < ends[..., None]).astype(np.int64)
        elif tensor.name == "object_masks":
            given[tensor.name] = (rng.random(shape) < 0.3).astype(np.float32)
        elif tensor.name == "box_weights":
            given[tensor.name] = np.full(shape, 8, np.float32)
        else:
            given[tensor.name] = rng.standard_normal(shape).astype(tensor.dtype)
    return given


def limit_of(encoder):
    """Two libraries may each be as far from PyTorch as `verify` allows."""
    return 2 * TOLERANCES[encoder.manifest.precision].cosine_distance


@pytest.mark.parametrize("graph", ["vision", "image_query", "text", "itm"])
@pytest.mark.parametrize("end", ["min", "opt", "max"])
def test_a_graph_computes_what_the_cpu_computes_over_its_profile(on_gpu, on_cpu, graph, end):
    session = on_gpu.sessions[graph]
    given = random_inputs(session.spec, lengths_at(session.spec, end))
    if "box_weights" in given:  # what boxes do at rank's edge in half precision is for `verify` to judge
        given["box_weights"][:] = 0
    (name,) = session.spec.output_names
    found, expected = (encoder.sessions[graph].run(given)[name] for encoder in (on_gpu, on_cpu))
    assert np.isfinite(found).all()
    if graph == "itm":
        assert np.abs(found - expected).max() <= 2 * TOLERANCES[on_gpu.manifest.precision].itm_abs
    else:
        assert cosine_distance(found.astype(np.float64), expected.astype(np.float64)) <= limit_of(on_gpu)


@pytest.mark.parametrize("graph", ["vision", "image_query", "text"])
def test_a_row_does_not_depend_on_its_place_or_its_neighbours(on_gpu, graph):
    """Permuted, and with a row twice: an engine may be silently wrong at batches above 1 (TensorRT issue 4853)."""
    session = on_gpu.sessions[graph]
    given = random_inputs(session.spec, lengths_at(session.spec, "max"))
    count = len(next(iter(given.values())))
    order = np.random.default_rng(1).permutation(count)
    order[0] = order[-1]
    (name,) = session.spec.output_names
    straight = session.run(given)[name]
    shuffled = session.run({key: np.ascontiguousarray(array[order]) for key, array in given.items()})[name]
    limit = TOLERANCES[on_gpu.manifest.precision].neighbour_abs
    np.testing.assert_allclose(shuffled.astype(np.float64), straight[order].astype(np.float64), rtol=0, atol=limit)


def test_verify_passes(served, provider, capsys):
    """Recorded outputs of PyTorch, in every shape, with rows permuted and repeated."""
    code = run(["verify", str(served), "--provider", provider, "--json"])
    document = json.loads(capsys.readouterr().out)
    assert code == 0, [gate for gate in document["gates"] if not gate["pass"]]


def test_a_shape_that_comes_again_and_again_gives_the_same_result(on_gpu):
    """From its third time on it is replayed, between runs of other shapes."""
    session = on_gpu.sessions["text"]
    shapes = [{"T": 1, "L": 4}, {"T": 3, "L": 7}]
    given = [random_inputs(session.spec, lengths, seed) for seed, lengths in enumerate(shapes)]
    first = [session.run(inputs)["text_embeds"] for inputs in given]
    for _ in range(6):
        for inputs, expected in zip(given, first, strict=True):
            np.testing.assert_array_equal(session.run(inputs)["text_embeds"], expected)
    changed = {"input_ids": given[0]["input_ids"] + 1, "attention_mask": given[0]["attention_mask"]}
    assert np.abs(session.run(changed)["text_embeds"] - first[0]).max() > 1e-3, "a replay must read its new inputs"


def test_features_that_stay_on_the_gpu_give_what_features_from_the_host_give(on_gpu):
    vision, query = on_gpu.sessions["vision"], on_gpu.sessions["image_query"]
    pixels = random_inputs(vision.spec, {"B": 2})
    kept = run_on_device(vision, pixels)["image_embeds"]
    assert isinstance(kept, DeviceArray)
    np.testing.assert_array_equal(kept.numpy(), vision.run(pixels)["image_embeds"])
    boxes = random_inputs(query.spec, {"B": 2, "O": 2})
    expected = query.run(boxes | {"image_embeds": kept.numpy()})["query_embeds"]
    np.testing.assert_array_equal(query.run(boxes | {"image_embeds": kept})["query_embeds"], expected)


def test_no_boxes_and_boxes_of_weight_zero_are_the_same(on_gpu):
    query = on_gpu.sessions["image_query"]
    boxes = random_inputs(query.spec, {"B": 2, "O": 3})
    boxes["box_weights"][:] = 0
    none = boxes | {name: boxes[name][:, :0] for name in ("object_masks", "box_weights")}
    limit = TOLERANCES[on_gpu.manifest.precision].zero_weight_abs
    np.testing.assert_allclose(query.run(none)["query_embeds"], query.run(boxes)["query_embeds"], rtol=0, atol=limit)


def test_more_than_the_profile_takes_is_an_error_or_split(on_gpu, on_cpu, random_pictures):
    session = on_gpu.sessions["vision"]
    most = session.spec.ranges["B"].max
    with pytest.raises(LimitError, match=f"got {most + 1} images"):
        session.run(random_inputs(session.spec, {"B": most + 1}))
    pictures = random_pictures(2 * most + 1)
    found, expected = (encoder.encode_images(pictures).query_embeds for encoder in (on_gpu, on_cpu))
    assert cosine_distance(found.astype(np.float64), expected.astype(np.float64)) <= limit_of(on_gpu)


def test_threads_that_share_an_encoder_get_their_own_results(on_gpu):
    texts = [f"a {colour} dog" for colour in ("red", "blue", "small", "big")]
    alone = [on_gpu.encode_texts([text]) for text in texts]
    found = {}

    def work(number):
        found[number] = [on_gpu.encode_texts([texts[number]]) for _ in range(50)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, expected in enumerate(alone):
        for result in found[number]:
            np.testing.assert_array_equal(result, expected)


def free_gpu_bytes():
    gc.collect()
    device = Device()
    try:
        return device.free_bytes()[0]
    finally:
        device.close()


def test_ten_thousand_calls_do_not_grow_gpu_memory(on_gpu):
    """64 MiB is what drivers and other programs move it by; a leak of 7 kB a call would be more."""
    pytest.importorskip("cuda.bindings.runtime")
    vision, text = on_gpu.sessions["vision"], on_gpu.sessions["text"]
    pixels = random_inputs(vision.spec, {"B": 1})
    given = [random_inputs(text.spec, {"T": t, "L": n}) for t in (1, 3, 6) for n in (2, 5, 12)]

    def calls(count):
        for number in range(count):
            text.run(given[number % len(given)])
            if number % 10 == 0:
                run_on_device(vision, pixels)

    calls(500)
    before = free_gpu_bytes()
    calls(10_000)
    assert before - free_gpu_bytes() < 64 << 20


def test_closing_frees_gpu_memory_and_ends_the_sessions(served, provider):
    pytest.importorskip("cuda.bindings.runtime")
    Encoder(Bundle.open(served), provider).close()  # what the libraries take once, they keep
    before = free_gpu_bytes()
    for _ in range(5):
        encoder = Encoder(Bundle.open(served), provider)
        encoder.encode_texts(["a dog"])
        encoder.close()
        with pytest.raises(InputError, match="is closed"):
            encoder.encode_texts(["a dog"])
    assert before - free_gpu_bytes() < 64 << 20
