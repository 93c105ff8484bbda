"""Starting, being ready, growing no fatter, stopping, and the parts that machines read."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path

import httpx
import numpy as np
import pytest
from running_service import RunningService, array_of, data_uri, running

from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.bundle.roles import TOKEN_IDS
from qpert.runtime.cli import run
from qpert.runtime.retrieval.encoder import Encoder
from qpert.runtime.serving.settings import LENGTH_STEP, Settings

AUDIT = """
import sys
def note(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        with open({log!r}, "a") as log:
            log.write(event + " " + repr(arguments[event != "socket.getaddrinfo":]) + chr(10))
sys.addaudithook(note)
"""
"""As `sitecustomize`: notes whom a process talks to."""


def test_a_start_is_live_at_once_ready_when_it_is_and_asks_no_network(demo_bundle, tmp_path):
    log = tmp_path / "asked"
    (tmp_path / "sitecustomize.py").write_text(AUDIT.format(log=str(log)))
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    service = RunningService(demo_bundle, environment={"PYTHONPATH": path})
    assert service.client.get("/health/live").json() == {"status": "live"}
    first = service.client.get("/health/ready")
    early = service.client.post("/v1/embeddings", json={"input": "a cup"})
    assert (first.status_code, first.json()["reason"]) == (503, "loading the bundle")
    assert (early.status_code, early.json()["error"]["code"]) == (503, "not-ready")
    assert service.client.get("/v2/health/ready").status_code == 503
    service.wait_until_ready()
    for work in ("text", "image", "pair"):  # what a first request needs was done before, by each of the two workers
        assert service.metric("qpert_batch_rows_count", work=work) >= 2
    assert service.client.post("/v1/embeddings", json={"input": "a cup"}).status_code == 200
    assert (
        service.client.get("/v2/health/ready").status_code
        == service.client.get("/v2/models/text/ready").status_code
        == 200
    )
    assert service.stop() == 0
    asked = log.read_text().splitlines() if log.exists() else []
    assert [line for line in asked if "127.0.0.1" not in line] == []


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["{missing}"], 2, "is not a folder"),
        (["{bundle}", "--provider", "cuda"], 3, "provider 'cuda'"),
        (["{bundle}", "--port", "{taken}"], 3, "cannot be bound"),
        (["{bundle}", "--max-queue", "3"], 2, "--max-queue is 3"),
        (["{bundle}", "--gallery", "{file}"], 2, "is a file"),
        (["{bundle}", "--token-file", "{missing}"], 2, "--token-file"),
    ],
)
def test_a_service_that_cannot_start_says_why_and_ends(demo_bundle, tmp_path, arguments, code, message):
    (tmp_path / "file").write_text("")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        places = {"bundle": demo_bundle, "missing": tmp_path / "missing", "file": tmp_path / "file"}
        filled = [argument.format(**places, taken=taken.getsockname()[1]) for argument in arguments]
        filled += [] if "--port" in filled else ["--port", "0"]
        command = [sys.executable, "-m", "qpert.runtime.cli", "serve", *filled]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_extra_is_named(demo_bundle, monkeypatch, capfd):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "uvicorn" else find(name, *rest)
    )
    assert run(["serve", str(demo_bundle)]) == 3
    assert "needs uvicorn, not installed here; pip install 'qpert[serve]'" in capfd.readouterr().err


@pytest.mark.parametrize(("host", "warned"), [("127.0.0.1", False), ("0.0.0.0", True)])
def test_other_machines_are_let_in_with_a_warning_only(demo_bundle, host, warned):
    service = RunningService(demo_bundle, "--host", host)
    assert any("no token is set" in line for line in service.lines) is warned
    assert Settings(demo_bundle, host=host).is_loopback is not warned
    service.kill()


def test_a_request_in_flight_is_answered_before_the_service_ends(demo_bundle, photos):
    service = RunningService(demo_bundle, "--workers", 1).wait_until_ready()
    body = {"input": [{"image": data_uri(photos[0]), "boxes": [[i, 9, 300 + i, 300] for i in range(8)]}] * 16}
    before = service.metric("qpert_batch_rows_count", work="image")
    with httpx.Client(base_url=service.url, timeout=120, trust_env=False) as client, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client.post, "/v1/embeddings", json=body)
        while service.metric("qpert_batch_rows_count", work="image") == before:
            time.sleep(0.01)
        assert service.stop() == 0
        assert answer.result(120).status_code == 200
        assert len(answer.result().json()["data"]) == 16
    with pytest.raises(httpx.ConnectError):
        httpx.get(service.url)


def test_the_text_graph_sees_few_lengths_and_gives_the_same_vectors(demo_bundle):
    texts = [" ".join(["cup"] * words) for words in range(1, 40)]
    bundle = Bundle.open(demo_bundle)
    exact, padded = Encoder(bundle, "cpu", threads=1), Encoder(bundle, "cpu", threads=1, length_step=LENGTH_STEP)
    lengths = {"exact": set(), "padded": set()}
    for name, encoder in (("exact", exact), ("padded", padded)):
        session = encoder.sessions[encoder.manifest.text_tower.name]
        ids, plain = session.spec.input(TOKEN_IDS).name, session.run

        def noting(inputs, ids=ids, plain=plain, name=name):
            lengths[name].add(inputs[ids].shape[1])
            return plain(inputs)

        session.run = noting
    for text in texts:
        np.testing.assert_array_equal(exact.encode_texts([text]), padded.encode_texts([text]))
    assert lengths == {"exact": set(range(3, 36)), "padded": {4, 8, 12, 16, 20, 24, 28, 32, 35}}


def resident(pid):
    """Megabytes of memory that a process holds."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 / 1e6


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_memory_does_not_grow_with_ever_new_requests(demo_bundle, photos, tmp_path):
    rng = random.Random(3)
    with running(demo_bundle, "--gallery", tmp_path / "gallery") as service:

        def some_requests(count):
            for number in range(count):
                texts = [" ".join(rng.choices("abcdefgh", k=rng.randint(1, 60))) for _ in range(rng.randint(1, 30))]
                assert service.client.post("/v1/embeddings", json={"input": texts}).status_code == 200
                if number % 4 == 0:
                    boxes = [[rng.randint(0, 100), 5, rng.randint(120, 300), 200] for _ in range(rng.randint(0, 32))]
                    pictures = [{"image": data_uri(rng.choice(photos)), "boxes": boxes}] * rng.randint(1, 8)
                    assert service.client.post("/v1/embeddings", json={"input": pictures}).status_code == 200
                    bad = {"input": {"image": data_uri(photos[0].read_bytes()[: rng.randint(1, 5000)])}}
                    assert service.client.post("/v1/embeddings", json=bad).status_code == 422

        some_requests(60)  # what the allocators keep is reached here: +100 MB
        before = resident(service.process.pid)
        some_requests(60)
        # As many new lengths and sizes again: 20 MB is what malloc's arenas move by; a leak of pictures (0.8 MB of
        # pixels each, 60 of them) or of a plan a shape would be more.
        assert resident(service.process.pid) - before < 20


def test_raw_graphs_by_the_open_inference_protocol(service, retriever):
    client = service.client
    tokens = retriever.encoder.tokenize(["a cup", "a large red circle"])
    expected = retriever.encode_texts(["a cup", "a large red circle"])
    arrays = {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask}
    assert client.get("/v2").json()["extensions"] == ["binary_tensor_data"]
    described = client.get("/v2/models/text").json()
    assert described["inputs"][0] == {"name": "input_ids", "datatype": "INT64", "shape": [-1, -1]}
    plain = [
        {"name": name, "datatype": "INT64", "shape": list(array.shape), "data": array.tolist()}
        for name, array in arrays.items()
    ]
    answer = client.post("/v2/models/text/infer", json={"id": "7", "inputs": plain}).json()
    (output,) = answer.pop("outputs")
    assert answer == {"id": "7", "model_name": "text", "model_version": "1"}
    np.testing.assert_array_equal(np.array(output["data"], np.float32).reshape(output["shape"]), expected)
    tail = b"".join(array.tobytes() for array in arrays.values())
    binary = [one | {"parameters": {"binary_data_size": arrays[one["name"]].nbytes}} for one in plain]
    for one in binary:
        del one["data"]
    head = json.dumps(
        {"inputs": binary, "outputs": [{"name": "text_embeds", "parameters": {"binary_data": True}}]}
    ).encode()
    headers = {"Inference-Header-Content-Length": str(len(head))}
    raw = client.post("/v2/models/text/versions/1/infer", content=head + tail, headers=headers)
    length = int(raw.headers["Inference-Header-Content-Length"])
    assert json.loads(raw.content[:length])["outputs"][0]["parameters"] == {"binary_data_size": expected.nbytes}
    np.testing.assert_array_equal(np.frombuffer(raw.content[length:], "<f4").reshape(2, -1), expected)


def tensor(**changes):
    return {"name": "input_ids", "datatype": "INT64", "shape": [1, 3], "data": [1, 2, 3]} | changes


MASK = {"name": "attention_mask", "datatype": "INT64", "shape": [1, 3], "data": [1, 1, 1]}


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"inputs": [tensor(), MASK]}, 200),
        ({"inputs": []}, 400),
        ({"inputs": [tensor(data=[1, 2])]}, 400),
        ({"inputs": [tensor(data=[1.5, 2, 3])]}, 400),
        ({"inputs": [tensor(data=[[1, 2], [3]])]}, 400),
        ({"inputs": [tensor(data=["a", "b", "c"])]}, 400),
        ({"inputs": [tensor(data=[1, 2, 1 << 70])]}, 400),
        ({"inputs": [tensor(shape=[1, -3])]}, 400),
        ({"inputs": [tensor(datatype="BYTES")]}, 400),
        ({"inputs": [tensor(parameters={"binary_data_size": 99})]}, 400),
        ({"inputs": [tensor(), MASK], "outputs": [{"name": "x"}]}, 400),
        ({"inputs": [tensor(datatype="INT32"), MASK]}, 422),
        ({"inputs": [tensor()]}, 422),
        ({"inputs": [tensor(data=[1, 2, 10_000_000]), MASK]}, 422),
        ({"inputs": [tensor(shape=[65, 1], data=[1] * 65), MASK | {"shape": [65, 1], "data": [1] * 65}]}, 413),
    ],
)
def test_inference_requests_that_are_wrong_are_refused_in_the_protocols_form(service, body, status):
    answer = service.client.post("/v2/models/text/infer", json=body)
    assert answer.status_code == status, answer.text
    assert isinstance(answer.json().get("error", ""), str)
    assert service.client.post("/v2/models/none/infer", json=body).status_code == 404


def test_the_openapi_document_describes_every_route_and_its_examples_are_right(service):
    from fastapi.openapi.models import OpenAPI
    from pydantic import TypeAdapter

    from qpert.runtime.serving import schemas

    document = service.client.get("/openapi.json").json()
    TypeAdapter(OpenAPI).validate_python(document)  # the 3.1 document as FastAPI models it
    references = {part.split('"')[0] for part in json.dumps(document).split("#/components/schemas/")[1:]}
    assert references <= set(document["components"]["schemas"])
    for path in ("/v1/embeddings", "/v1/rerank", "/v1/search", "/v1/images"):
        body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
        model = getattr(schemas, body.rpartition("/")[2])
        examples = document["components"]["schemas"][model.__name__]["examples"]
        assert [model.model_validate(example) for example in examples]
        assert set(document["paths"][path]["post"]["responses"]) >= {"200", "400", "404", "413", "422", "503"}


def test_metrics_count_what_happened(service):
    counted = {"route": "/v1/embeddings", "method": "POST"}
    before = [service.metric("qpert_requests_total", **counted, status=status) for status in ("200", "422")]
    assert service.client.post("/v1/embeddings", json={"input": ["a", "b"]}).status_code == 200
    assert service.client.post("/v1/embeddings", json={"input": ""}).status_code == 422
    after = [service.metric("qpert_requests_total", **counted, status=status) for status in ("200", "422")]
    assert [a - b for a, b in zip(after, before, strict=True)] == [1, 1]
    assert service.metric("qpert_gallery_images") == 4
    assert service.metric("qpert_ready") == 1
    for n in range(30):  # paths of strangers make no new time series
        service.client.get(f"/v1/stranger/{n}")
    assert service.client.get("/metrics").text.count("stranger") == 0


class Addresses(HTMLParser):
    """Every attribute of a page that could load something."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        self.found += [value for name, value in attributes if name in ("src", "href", "action", "srcset")]


def test_the_page_loads_nothing_from_elsewhere_and_runs_nothing_but_its_own(service):
    answer = service.client.get("/")
    page = Addresses()
    page.feed(answer.text)
    assert page.found == ["data:,"]
    assert "http:" not in answer.text.replace("http://www.w3.org/2000/svg", "")
    assert "https:" not in answer.text
    assert "url(" not in answer.text
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert array_of(service.client.post("/v1/embeddings", json={"input": "a"}).json()["data"][0]).shape == (128,)
