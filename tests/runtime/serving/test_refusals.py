"""What a service refuses, how it says so, and that a refusal is all that happens."""

from __future__ import annotations

import base64
import io
import socket
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from PIL import Image
from running_service import array_of, data_uri, running

TOKEN = "correct-horse-battery"


def encoded(size=(8, 8), kind="PNG", mode="RGB"):
    stream = io.BytesIO()
    Image.new(mode, size, 100).save(stream, kind)
    return stream.getvalue()


def png_header(width, height):
    """A PNG that says it is large; there is nothing else in it."""
    data = encoded((1, 1))
    header = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + data[24:29]
    return data[:12] + header + zlib.crc32(header).to_bytes(4, "big") + data[33:]


def jpeg_cut():
    stream = io.BytesIO()
    Image.effect_noise((400, 400), 60).convert("RGB").save(stream, "JPEG")
    return stream.getvalue()[: len(stream.getvalue()) // 2]


PICTURES = {
    "truncated": (jpeg_cut(), 422, "image-broken"),
    "text": (b"this is no picture", 422, "image-format"),
    "nothing": (b"", 422, "image-format"),
    "huge": (png_header(60_000, 60_000), 413, "picture-pixels"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", 422, "image-format"),
    "floating point": (encoded((4, 4), "TIFF", "F"), 422, "image-float"),
}


def post(service, body, path="/v1/embeddings", **more):
    return service.client.post(path, json=body, **more)


def check(answer, status, code):
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text
    assert answer.json()["error"]["message"].strip()
    assert ("Retry-After" in answer.headers) is (status == 503)


@pytest.mark.parametrize("kind", PICTURES)
def test_a_picture_that_cannot_be_used_is_refused_and_named(service, kind):
    data, status, code = PICTURES[kind]
    good = data_uri(encoded())
    answer = post(service, {"input": [{"image": good}, {"image": data_uri(data)}]})
    check(answer, status, code)
    assert answer.json()["error"]["message"].startswith("input 1 ")


def test_bad_pictures_do_not_touch_good_ones_beside_them(service, retriever, photos):
    expected = retriever.encode_images([photos[0]]).query_embeds[0]
    tiny = retriever.encode_images([np.asarray(Image.open(io.BytesIO(encoded((1, 1)))).convert("RGB"))]).query_embeds[0]
    bad = [(data, status) for data, status, _ in PICTURES.values()]

    def ask(turn):
        if turn % 3 == 0:
            data, status = bad[turn // 3 % len(bad)]
            return post(service, {"input": {"image": data_uri(data)}}).status_code == status
        data, wanted = (photos[0].read_bytes(), expected) if turn % 3 == 1 else (encoded((1, 1)), tiny)
        answer = post(service, {"input": {"image": data_uri(data)}})
        return np.array_equal(array_of(answer.json()["data"][0]), wanted)

    with ThreadPoolExecutor(16) as clients:
        assert all(clients.map(ask, range(90)))
    assert service.client.get("/health/ready").status_code == 200


GOOD = data_uri(encoded((40, 30)))


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"input": ""}, 422, "text-blank"),
        ({"input": []}, 422, "no-inputs"),
        ({"input": ["a", " "]}, 422, "text-blank"),
        ({"input": "a" * 10_001}, 413, "text-characters"),
        ({"input": ["a"] * 65}, 413, "request-inputs"),
        ({"input": "a", "model": "gpt-4"}, 404, "model-unknown"),
        ({"input": "a", "dimensions": 12}, 422, "request-invalid"),
        ({"input": "a", "encoding_format": "hex"}, 422, "request-invalid"),
        ({"input": 3}, 422, "request-invalid"),
        ({}, 422, "request-invalid"),
        ([], 422, "request-invalid"),
        ({"input": {"image": "data:image/png,plain"}}, 422, "picture-encoding"),
        ({"input": {"image": "not base64!"}}, 422, "picture-encoding"),
        ({"input": {"image": "http://example.org/a.jpg"}}, 422, "url-refused"),
        ({"input": {"image": "https://127.0.0.1/a.jpg"}}, 422, "url-refused"),
        ({"input": {"image": "file:///etc/passwd"}}, 422, "picture-encoding"),
        ({"input": {"image": "/etc/hostname"}}, 422, "picture-encoding"),
        ({"input": {"image": GOOD, "boxes": [[1, 2, 3]]}}, 422, "request-invalid"),
        ({"input": {"image": GOOD, "boxes": [[9, 9, 3, 3]]}}, 422, "box-inverted"),
        ({"input": {"image": GOOD, "boxes": [[3, 3, 3, 3]]}}, 422, "box-empty"),
        ({"input": {"image": GOOD, "boxes": [[300, 300, 400, 400]]}}, 422, "box-outside"),
        ({"input": {"image": GOOD, "boxes": [[1, 1, 9, 9]] * 33}}, 413, "boxes-limit"),
    ],
)
def test_embeddings_refuse(service, body, status, code):
    check(post(service, body), status, code)


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("/v1/rerank", {"query": "a", "documents": ["b"]}, 422, "rerank-kinds"),
        ("/v1/rerank", {"query": {"image": GOOD}, "documents": ["b", {"image": GOOD}]}, 422, "rerank-kinds"),
        ("/v1/rerank", {"query": "a", "documents": []}, 422, "request-invalid"),
        ("/v1/rerank", {"query": "a", "documents": [{"image": GOOD}], "top_n": 0}, 422, "request-invalid"),
        ("/v1/rerank", {"query": " ", "documents": [{"image": GOOD}]}, 422, "text-blank"),
        ("/v1/search", {}, 422, "search-query"),
        ("/v1/search", {"text": "a", "image": GOOD}, 422, "search-query"),
        ("/v1/search", {"text": "a", "boxes": [[1, 1, 9, 9]]}, 422, "search-query"),
        ("/v1/search", {"text": "a", "k": 0}, 422, "request-invalid"),
        ("/v1/search", {"text": "a", "k": 1001}, 413, "search-results"),
        ("/v1/search", {"text": "", "k": 1}, 422, "text-blank"),
    ],
)
def test_the_other_routes_refuse(service, path, body, status, code):
    check(post(service, body, path), status, code)


def test_bodies_that_are_no_requests(service):
    headers = {"content-type": "application/json"}
    check(service.client.post("/v1/embeddings", content=b'{"input":', headers=headers), 400, "json-invalid")
    check(service.client.post("/v1/embeddings", content=b"\xff\xfe", headers=headers), 400, "json-invalid")
    nan = b'{"input": {"image": "' + GOOD.encode() + b'", "boxes": [[NaN, 1, 9, 9]]}}'
    assert service.client.post("/v1/embeddings", content=nan, headers=headers).status_code in (400, 422)
    check(
        service.client.post("/v1/embeddings", content=b"input=a", headers={"content-type": "text/plain"}),
        400,
        "content-type",
    )
    broken = {"content-type": "multipart/form-data"}
    check(service.client.post("/v1/embeddings", content=b"--x", headers=broken), 400, "malformed")
    check(service.client.post("/v1/embeddings", files={"inputs": b"x"}), 422, "request-invalid")
    check(
        service.client.post("/v1/embeddings", files={"input": encoded()}, data={"boxes": "[[], []]"}),
        422,
        "boxes-count",
    )
    check(service.client.get("/v1/nothing"), 404, "not-found")
    check(service.client.put("/v1/images"), 405, "method-not-allowed")
    check(service.client.get("/v1/images/nothing.jpg"), 404, "gallery-image-unknown")


def test_without_a_gallery_there_is_nothing_to_search(demo_bundle, tmp_path):
    token = tmp_path / "token"
    token.write_text(TOKEN + "\n")
    options = (
        "--token-file",
        token,
        "--cors",
        "https://shop.example",
        "--allow-host",
        "proxy.example",
        "--max-body",
        20_000,
        "--max-picture",
        4_000,
    )
    options += ("--max-pixels", 10_000, "--deadline", 3, "--max-requests", 4)
    with running(demo_bundle, *options) as service:
        client, allowed = service.client, {"Authorization": f"Bearer {TOKEN}"}
        check_token(client, allowed)
        check_origins(client, allowed)
        for path, body in (("search", {"text": "a"}), ("images", {"images": [{"name": "a", "image": GOOD}]})):
            check(client.post(f"/v1/{path}", json=body, headers=allowed), 404, "serve-without-gallery")
        large = data_uri(encoded((200, 200)))
        check(client.post("/v1/embeddings", json={"input": {"image": large}}, headers=allowed), 413, "picture-pixels")
        noise = base64.b64encode(bytes(range(256)) * 20).decode()
        check(client.post("/v1/embeddings", json={"input": {"image": noise}}, headers=allowed), 413, "picture-bytes")
        check_body_length(client, allowed)
        check_slow_bodies(service, allowed)


def check_token(client, allowed):
    assert client.get("/health/ready").status_code == client.get("/").status_code == 200
    for headers in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": f"Basic {TOKEN}"},
        {"Authorization": TOKEN},
    ):
        for path in ("/v1/models", "/metrics", "/openapi.json", "/v2/models/text"):
            answer = client.get(path, headers=headers)
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
    assert client.get("/v1/models", headers=allowed).status_code == 200
    assert client.post("/v1/embeddings", json={"input": "a"}, headers=allowed).status_code == 200


def check_origins(client, allowed):
    def origin(name, **more):
        return client.post("/v1/embeddings", json={"input": "a"}, headers={**allowed, "Origin": name, **more})

    check(origin("https://elsewhere.example"), 403, "origin-refused")
    good = origin("https://shop.example")
    assert (good.status_code, good.headers["access-control-allow-origin"]) == (200, "https://shop.example")
    assert origin(f"http://{client.base_url.host}:{client.base_url.port}").status_code == 200
    check(client.get("/v1/models", headers={**allowed, "Host": "rebound.example"}), 403, "host-unknown")
    assert client.get("/v1/models", headers={**allowed, "Host": "proxy.example:8443"}).status_code == 200
    asked = {"Origin": "https://shop.example", "Access-Control-Request-Method": "POST"}
    assert client.options("/v1/embeddings", headers=asked).status_code == 200


def check_body_length(client, allowed):
    check(client.post("/v1/embeddings", json={"input": "a" * 30_000}, headers=allowed), 413, "body-bytes")

    def chunks():
        for _ in range(30):
            yield b" " * 1_000

    headers = {**allowed, "content-type": "application/json"}
    check(client.post("/v1/embeddings", content=chunks(), headers=headers), 413, "body-bytes")


def check_slow_bodies(service, allowed):
    """Three clients that never finish take their places and are refused in time; others are answered meanwhile."""
    lines = ["POST /v1/embeddings HTTP/1.1", "Host: localhost", f"Authorization: Bearer {TOKEN}", "Content-Length: 100"]
    head = "\r\n".join([*lines, "", ""])
    slow = [socket.create_connection(("127.0.0.1", service.port)) for _ in range(3)]
    for one in slow:
        one.sendall(head.encode() + b"{")
    while service.client.get("/metrics", headers=allowed).text.count("qpert_requests_active 4.0") == 0:
        time.sleep(0.02)
    assert service.client.post("/v1/embeddings", json={"input": "a"}, headers=allowed).status_code == 200
    fourth = socket.create_connection(("127.0.0.1", service.port))
    fourth.sendall(head.encode() + b"{")
    statuses = []
    for _ in range(2_000):
        statuses.append(service.client.get("/v1/models", headers=allowed))
        if statuses[-1].status_code == 503:
            break
        time.sleep(0.01)
    check(statuses[-1], 503, "too-many-requests")
    for one in (*slow, fourth):
        one.settimeout(60)
        assert one.recv(4096).startswith(b"HTTP/1.1 408 ")
        one.close()
    assert service.client.get("/v1/models", headers=allowed).status_code == 200


def test_a_full_queue_refuses_with_retry_after_and_goes_on(demo_bundle, photos):
    with running(demo_bundle, "--max-queue", 2, "--max-inputs", 2, "--workers", 1) as service:
        body = {"input": [{"image": data_uri(photos[0]), "boxes": [[10 * i, 10, 300 + i, 300] for i in range(8)]}] * 2}
        done, statuses = threading.Event(), []

        def ask():
            with httpx.Client(base_url=service.url, timeout=120, trust_env=False) as client:
                while not done.is_set():
                    answer = client.post("/v1/embeddings", json=body)
                    statuses.append(answer.status_code)
                    if answer.status_code == 503:
                        check(answer, 503, "queue-full")
                        done.set()

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert set(statuses) == {200, 503}
        assert post(service, {"input": "a"}).status_code == 200
        assert service.metric("qpert_refused_total", reason="queue") >= 1


def test_a_client_that_goes_takes_its_work_out_of_the_queue(demo_bundle, photos):
    with running(demo_bundle, "--workers", 1) as service:
        boxes = [[i, 10, 300 + i, 300] for i in range(32)]
        body = {"input": [{"image": data_uri(photos[0]), "boxes": boxes}] * 32}  # four batches of eight
        before = service.metric("qpert_batch_rows_sum", work="image")

        def leave():
            with httpx.Client(base_url=service.url, trust_env=False) as client, pytest.raises(httpx.ReadTimeout):
                client.post("/v1/embeddings", json=body, timeout=httpx.Timeout(120, read=0.01))

        with ThreadPoolExecutor(3) as clients:
            list(clients.map(lambda _: leave(), range(3)))
        end = time.monotonic() + 120
        while service.metric("qpert_requests_total", status="499") < 3 and time.monotonic() < end:
            time.sleep(0.05)
        assert service.metric("qpert_requests_total", status="499") == 3
        while service.metric("qpert_queue_rows") and time.monotonic() < end:
            time.sleep(0.05)
        assert service.metric("qpert_queue_rows") == 0
        done = service.metric("qpert_batch_rows_sum", work="image") - before
        assert done < 96, "work of clients that had gone was done"
