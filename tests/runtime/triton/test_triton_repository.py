"""The model repository in the real tritonserver: answers by HTTP and gRPC are those of the runtime."""

import base64
import json

import numpy as np
import pytest
from PIL import Image
from triton_server import TritonServer, require_triton

from qpert.runtime import Boxes, Bundle, Perturbation, Retriever
from qpert.runtime.cli import run
from qpert.runtime.triton.repository import write_repository

pytestmark = pytest.mark.slow

TOLERANCE = 1e-5
"""The graphs are the same ONNX Runtime's on the same machine, batched otherwise; values are below 1, scores 10."""
TEXTS = ["a cup", "A round, BLUE patch on the left of a very small red house!", "two dogs", "a boat at night"]
CORNERS = [[3.0, 4.0, 20.0, 25.0], [8.5, 9.0, 30.0, 31.0], [0.0, 0.0, 12.0, 12.0]]


@pytest.fixture(scope="module")
def each_bundle(demo_bundle, tmp_path_factory, edit_manifest):
    """The demonstration with a query set for each box, as it ships calibrated."""
    import shutil

    folder = tmp_path_factory.mktemp("each") / "bundle"
    shutil.copytree(demo_bundle, folder)
    settings = Bundle.open(demo_bundle).manifest.perturbation.to_dict() | {"reduction": "each", "keep_stock": True}
    edit_manifest(folder, lambda values: values.update(perturbation=Perturbation.from_dict(settings).to_dict()))
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory, random_pictures):
    folder = tmp_path_factory.mktemp("pictures")
    paths = [folder / f"{number}.png" for number in range(4)]
    for path, pixels in zip(paths, random_pictures(4), strict=True):
        Image.fromarray(pixels).save(path)
    return paths


def served(bundle, folder):
    require_triton()
    write_repository(Bundle.open(bundle), folder / "models", backend="python")
    return TritonServer(folder / "models", folder / "server.log")


@pytest.fixture(scope="module")
def each_server(each_bundle, tmp_path_factory):
    with served(each_bundle, tmp_path_factory.mktemp("triton-each")) as server:
        yield server


@pytest.fixture(scope="module")
def tiny_server(tiny_bundle, tmp_path_factory):
    with served(tiny_bundle, tmp_path_factory.mktemp("triton-tiny")) as server:
        yield server


def cells(values):
    """Strings or bytes as `triton_client.py` takes them."""
    encoded = [[cell if isinstance(cell, bytes) else cell.encode() for cell in row] for row in values]
    return [[base64.b64encode(cell).decode() for cell in row] for row in encoded]


def call(model, outputs, **inputs):
    return {"model": model, "inputs": inputs, "outputs": outputs}


def answers(server, tmp_path, calls, arrays=None, **more):
    """By kind of client, of each call its outputs as arrays, or its error; and the server's statistics."""
    arrays = {"none": np.zeros(1)} | (arrays or {})
    np.savez(tmp_path / "arrays.npz", **arrays)
    found = server.call({"calls": calls, **more}, tmp_path / "arrays.npz")
    kept = np.load(tmp_path / "arrays.out.npz")
    kinds = {
        kind: [
            {name: kept[value] if name not in ("error", "status") else value for name, value in answer.items()}
            for answer in found[kind]
        ]
        for kind in ("http", "grpc")
        if kind in found
    }
    return kinds, {entry["name"]: entry for entry in found["statistics"]}


def padded_boxes(counts):
    """float32 [B, most, 4]: so many of CORNERS for each picture, zeros behind them."""
    return np.stack([np.array([*CORNERS[:n], *[[0.0] * 4] * (3 - n)], np.float32) for n in counts])


def boxes_of(files, counts):
    return [Boxes(np.array(CORNERS[:n]).reshape(-1, 4), Image.open(f).size) for f, n in zip(files, counts, strict=True)]


def test_every_model_is_ready(each_server, tiny_server):
    for server in (each_server, tiny_server):
        states = server.models
        assert {state for state, _ in states.values()} == {"READY"}, states
    assert {"encode_texts", "encode_images", "match_texts", "image_query_sets"} <= each_server.models.keys()
    assert "image_query_sets" not in tiny_server.models


@pytest.mark.parametrize("which", ["each", "tiny"])
def test_the_ensembles_give_what_the_runtime_gives(which, request, pictures, tmp_path):
    """`each`: a query set a box, of which pictures have 0 to 3. `tiny`: boxes in the pair scorer too."""
    server, bundle = request.getfixturevalue(f"{which}_server"), request.getfixturevalue(f"{which}_bundle")
    counts = [0, 2, 3] if which == "each" else [0, 2, 1]  # no more pictures than the tiny bundle takes in a call
    files = pictures[:3]
    data = cells([[path.read_bytes()] for path in files])
    with_boxes = {"image": data, "boxes": "boxes"}
    candidates = {"text": cells([TEXTS[:3]] * 3)} | (with_boxes if which == "tiny" else {"image": data})
    calls = [
        call("encode_texts", ["text_embeds"], text=cells([[text] for text in TEXTS])),
        call("encode_images", ["query_embeds"], **with_boxes),
        call("match_texts", ["itm_scores"], **candidates),
    ]
    kinds, _ = answers(server, tmp_path, calls, {"boxes": padded_boxes(counts)})
    with Retriever.open(bundle, threads=1) as retriever:
        features = retriever.encode_images(files, boxes_of(files, counts))
        expected = [retriever.encode_texts(TEXTS), features.query_embeds, retriever.itm_scores(features, TEXTS[:3])]
    for kind, (texts, images, pairs) in kinds.items():
        assert pairs["itm_scores"].shape == (3, 4), "three texts are padded to four"
        for found, wanted in zip(
            (texts["text_embeds"], images["query_embeds"], pairs["itm_scores"][:, :3]), expected, strict=True
        ):
            np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE, err_msg=kind)


@pytest.mark.parametrize("which", ["each", "tiny"])
def test_each_graph_alone_gives_what_its_session_gives(which, request, tmp_path):
    server, bundle = request.getfixturevalue(f"{which}_server"), request.getfixturevalue(f"{which}_bundle")
    rng = np.random.default_rng(1)
    lengths = {"B": 2, "T": 2, "I": 2, "L": 5, "O": 2}
    with Retriever.open(bundle, threads=1) as retriever:
        sessions = retriever.encoder.sessions
        arrays, calls, expected = {}, [], []
        for name, session in sessions.items():
            inputs = {}
            for spec in session.spec.inputs:
                shape = tuple(lengths.get(axis, axis) for axis in spec.shape)
                values = rng.integers(1, 20, shape) if "int" in spec.dtype else rng.random(shape)
                inputs[spec.name] = (np.ones(shape) if spec.slot == "token_mask" else values).astype(spec.dtype)
            arrays |= {f"{name}-{key}": value for key, value in inputs.items()}
            calls.append(call(name, list(session.spec.output_names), **{key: f"{name}-{key}" for key in inputs}))
            expected.append(session.run(inputs))
        kinds, _ = answers(server, tmp_path, calls, arrays)
        assert len(calls) == 4
        for kind, found in kinds.items():
            for one, wanted in zip(found, expected, strict=True):
                for output, value in wanted.items():
                    np.testing.assert_allclose(one[output], value, rtol=0, atol=TOLERANCE, err_msg=f"{kind} {output}")


def test_host_models_pad_to_buckets_so_that_requests_share_batches(each_server, pictures, tmp_path):
    data = cells([[pictures[0].read_bytes()]])
    calls = [
        call("tokenize_texts", ["input_ids", "attention_mask"], text=cells([["a cup"]])),
        call("tokenize_texts", ["input_ids", "attention_mask"], text=cells([[TEXTS[1]]])),
        call("tokenize_candidates", ["input_ids"], text=cells([TEXTS[:3]])),
        call("preprocess_images", ["object_masks", "box_weights", "box_counts"], image=data, boxes="boxes"),
        call("preprocess_images", ["object_masks", "box_counts"], image=data),
    ]
    kinds, _ = answers(each_server, tmp_path, calls, {"boxes": padded_boxes([3])})
    short, long, candidates, boxed, stock = kinds["grpc"]
    assert short["input_ids"].shape == (1, 8)
    assert long["input_ids"].shape[1] % 8 == 0
    assert candidates["input_ids"].shape[:2] == (1, 4)
    np.testing.assert_array_equal(candidates["input_ids"][0, 2], candidates["input_ids"][0, 3])
    assert boxed["object_masks"].shape[1] == 4
    assert (boxed["box_counts"].tolist(), boxed["box_weights"][0].astype(bool).tolist()) == (
        [[3]],
        [True] * 3 + [False],
    )
    assert (stock["object_masks"].shape[1], stock["object_masks"].any(), stock["box_counts"].tolist()) == (
        1,
        False,
        [[0]],
    )


def test_concurrent_requests_are_batched_and_their_answers_stay_their_own(each_server, each_bundle, tmp_path):
    texts = [f"{word} {count}" for word in ("cup", "boat", "dog", "house") for count in range(24)]
    calls = [call("encode_texts", ["text_embeds"], text=cells([[text]])) for text in texts]
    _, before = answers(each_server, tmp_path, calls[:1])
    kinds, after = answers(each_server, tmp_path, calls, parallel=16)
    with Retriever.open(each_bundle, threads=1) as retriever:
        expected = retriever.encode_texts(texts)
    found = np.concatenate([answer["text_embeds"] for answer in kinds["grpc"]])
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)
    rows, runs = (
        int(after["text"].get(key, 0)) - int(before["text"].get(key, 0))
        for key in ("inference_count", "execution_count")
    )
    assert rows == len(texts)
    assert runs < rows, "some requests shared a call of the graph"


def test_bad_input_is_one_requests_error_with_its_code(each_server, pictures, tmp_path):
    good = pictures[0].read_bytes()
    calls = [
        call("encode_images", ["query_embeds"], image=cells([[b"no picture"]]), boxes="none_given"),
        call("encode_images", ["query_embeds"], image=cells([[good[:200]]]), boxes="none_given"),
        call("encode_images", ["query_embeds"], image=cells([[good]]), boxes="inverted"),
        call("encode_texts", ["text_embeds"], text=cells([["  "]])),
        call("match_texts", ["itm_scores"], image=cells([[good]]), text=cells([["a"] * 65])),
        call("encode_images", ["query_embeds"], image=cells([[good]] * 9), boxes="nine"),
        call("encode_images", ["query_embeds"], image=cells([[good]]), boxes="none_given"),
    ]
    arrays = {"none_given": np.zeros((1, 1, 4), np.float32), "nine": np.zeros((9, 1, 4), np.float32)}
    arrays |= {"inverted": np.array([[[9, 9, 2, 2]]], np.float32)}
    kinds, _ = answers(each_server, tmp_path, calls, arrays)
    for found in kinds.values():
        texts = [answer.get("error", "") for answer in found]
        codes = ["image-format: ", "image-broken: ", "box-inverted: ", "text-blank: ", "texts-limit: ", "batch-size"]
        for text, code in zip(texts, codes, strict=False):
            assert code in text
        assert "query_embeds" in found[-1], "the server goes on"
    assert kinds["grpc"][0]["status"] == "StatusCode.INVALID_ARGUMENT"


def test_configurations_of_the_other_backends_are_parsed_by_the_server(demo_bundle, tmp_path):
    """It has neither backend: that it says so of each graph means that it took the configuration."""
    require_triton()
    plans(demo_bundle, tmp_path / "bundle")
    for backend, bundle in (("onnxruntime", demo_bundle), ("tensorrt", tmp_path / "bundle")):
        repository = write_repository(Bundle.open(bundle), tmp_path / backend, backend=backend)
        with TritonServer(repository.folder, tmp_path / f"{backend}.log") as server:
            states = server.models
            configs = [str(path) for path in sorted(repository.folder.glob("*/config.pbtxt"))]
            assert set(server.call({"configs": configs})["configs"].values()) == set(repository.models)
        for graph in ("vision", "image_query", "text", "itm"):
            assert f"unable to find backend library for backend '{backend}'" in states[graph][1]
        assert states["preprocess_images"][0] == "READY"
        assert "Poll failed" not in (tmp_path / f"{backend}.log").read_text(errors="replace")


def plans(bundle, folder):
    """A copy of a bundle with the record of engines for two GPUs; what the plans hold, nobody here can read."""
    import hashlib
    import shutil

    shutil.copytree(bundle, folder)
    graphs = Bundle.open(bundle).manifest.graphs
    for target in ("sm80", "sm89"):
        engines = folder / "engines" / f"{target}-classic10.3.0"
        engines.mkdir(parents=True)
        record = {}
        for name, graph in graphs.items():
            content = f"{name} for {target}".encode()
            (engines / f"{name}.engine").write_bytes(content)
            shapes = {spec.name: [[1], [2], [4 if target == "sm89" else 8]] for spec in graph.inputs}
            record[name] = {"file": f"{name}.engine", "sha256": hashlib.sha256(content).hexdigest(), "sources": {},
                            "bytes": len(content), "profile": shapes, "seconds": 1.0}  # fmt: skip
        values = {"schema_version": 1, "flavor": "classic", "flavor_version": "10.3.0", "architectures": [target],
                  "precision": "fp32", "tf32": False, "graphs": record, "qpert": "0.1.0", "command": "qpert build",
                  "created": f"2026-01-0{target[-1]}", "gpu": None, "driver": None, "cuda": None}  # fmt: skip
        (engines / "engine.json").write_text(json.dumps(values))


def test_engines_are_chosen_by_compute_capability(demo_bundle, tmp_path):
    plans(demo_bundle, tmp_path / "bundle")
    write_repository(Bundle.open(tmp_path / "bundle"), tmp_path / "models", backend="tensorrt")
    config = (tmp_path / "models" / "vision" / "config.pbtxt").read_text()
    assert 'cc_model_filenames { key: "8.0" value: "sm80.plan" }' in config
    assert 'cc_model_filenames { key: "8.9" value: "sm89.plan" }' in config
    assert "max_batch_size: 4\n" in config, "of the engines, the narrower one limits"
    assert (tmp_path / "models" / "text" / "1" / "sm80.plan").read_bytes() == b"text for sm80"


def test_weights_are_shared_inside_the_repository_and_never_with_the_bundle(demo_bundle, tmp_path, capsys):
    out = tmp_path / "models"
    assert run(["package", str(demo_bundle), "--for", "triton", "--out", str(out), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    weights = [out / graph / "1" / "qformer.data" for graph in ("image_query", "text", "itm")]
    assert {path.stat().st_ino for path in weights} == {weights[0].stat().st_ino}
    assert weights[0].read_bytes() == (demo_bundle / "onnx" / "qformer.data").read_bytes()
    assert all(path.stat().st_nlink == 1 for path in demo_bundle.rglob("*") if path.is_file())
    assert report["linked_bytes"] >= 2 * weights[0].stat().st_size
    assert not list((out / "vision").rglob("qformer.data"))


def test_what_cannot_be_packaged_is_refused(demo_bundle, tmp_path, capsys):
    command = ["package", str(demo_bundle), "--for", "triton", "--out"]
    (tmp_path / "there").mkdir()
    assert run([*command, str(tmp_path / "there")]) == 2
    assert run([*command, str(tmp_path / "new"), "--backend", "tensorrt"]) == 3
    assert "qpert build" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
