"""Metadata and filters over HTTP, with a gallery and with a vector store behind the service."""

from __future__ import annotations

import json
import time

import pytest
from running_postgres import is_available, running_postgres
from running_service import data_uri, running

from qpert.runtime.stores.opening import open_store
from qpert.runtime.stores.searching import StoreGallery

ALBUMS = ({"album": "kitchen", "year": 2013}, {"album": "space", "year": 1999, "ok": True}, {}, {"album": "space"})


def bodies(photos):
    return [
        {"name": f"{number}/é.jpg", "image": data_uri(photo), "metadata": metadata}
        for number, (photo, metadata) in enumerate(zip(photos, ALBUMS, strict=True))
    ]


def found(client, **body):
    answer = client.post("/v1/search", json={"text": "a rocket at night", **body})
    assert answer.status_code == 200, answer.text
    return [hit["image"] for hit in answer.json()["hits"]]


def check_filters(client, photos):
    """What both kinds do."""
    answer = client.post("/v1/images", json={"images": bodies(photos)})
    assert answer.status_code == 200, answer.text
    assert answer.json() == {"added": 4, "replaced": 0, "unchanged": 0, "images": 4}
    assert set(found(client)) == {f"{number}/é.jpg" for number in range(4)}
    assert set(found(client, where="album = 'space'")) == {"1/é.jpg", "3/é.jpg"}
    assert found(client, where="album = 'space' and year < 2000") == ["1/é.jpg"]
    assert found(client, where="year > 3000") == []
    shown = client.get("/v1/images/1/é.jpg").json()
    assert shown["metadata"] == ALBUMS[1]
    wrong = client.post("/v1/search", json={"text": "x", "where": "album = space"})
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (422, "filter")
    assert "column 9" in wrong.json()["error"]["message"]
    for metadata, code in (({"a b": 1}, "metadata"), ({"a": [1]}, "request-invalid"), ({"a": 2**60}, "metadata")):
        body = {"name": "x.jpg", "image": data_uri(photos[0]), "metadata": metadata}
        refused = client.post("/v1/images", json={"images": [body]})
        assert (refused.status_code, refused.json()["error"]["code"]) == (422, code), refused.text
    changed = [{**bodies(photos)[2], "metadata": {"album": "new"}}]
    assert client.post("/v1/images", json={"images": changed}).json()["error"]["code"] == "image-changed"
    again = client.post("/v1/images", json={"images": changed, "replace": True})
    assert again.json() == {"added": 0, "replaced": 1, "unchanged": 0, "images": 4}
    assert found(client, where="album = 'new'") == ["2/é.jpg"]
    listed = client.get("/v1/images", params={"offset": 1, "limit": 2}).json()
    assert (len(listed["images"]), listed["total"]) == (2, 4)
    assert client.delete("/v1/images/3/é.jpg").json() == {"deleted": 1, "images": 3}
    assert client.delete("/v1/images/3/é.jpg").status_code == 404
    assert found(client, where="album = 'space'") == ["1/é.jpg"]


def test_a_gallery(demo_bundle, photos, tmp_path):
    with running(demo_bundle, "--gallery", tmp_path / "g") as service:
        check_filters(service.client, photos)
        form = {"metadata": json.dumps([{"album": "form"}]), "captions": json.dumps([["a cup"]])}
        files = {"image": ("form.jpg", photos[0].read_bytes(), "image/jpeg")}
        assert service.client.post("/v1/images", data=form, files=files).json()["added"] == 1
        assert found(service.client, where="album = 'form'") == ["form.jpg"]
        by_picture = {"image": data_uri(photos[0]), "rerank": 0}
        for where, count in (("album = 'form'", 1), ("album != 'form'", 0)):
            answer = service.client.post("/v1/search", json={**by_picture, "where": where})
            assert len(answer.json()["hits"]) == count, answer.text


@pytest.fixture(scope="module")
def postgres():
    pytest.importorskip("psycopg", reason="needs the extra [postgres]")
    if not is_available():
        pytest.skip("no PostgreSQL with pgvector here; `make postgres-env` gets one")
    with running_postgres() as server:
        yield server


def test_a_store(demo_bundle, photos, tmp_path, postgres, retriever):
    with running(demo_bundle, "--store", postgres.url, "--pictures", tmp_path / "kept") as service:
        check_filters(service.client, photos)
        assert len(list((tmp_path / "kept").iterdir())) == 3, "the deleted picture's file has gone"
        captions = [{"name": "c.jpg", "image": data_uri(photos[0]), "captions": ["a cup"]}]
        refused = service.client.post("/v1/images", json={"images": captions})
        assert (refused.status_code, refused.json()["error"]["code"]) == (422, "store-captions")
        with open_store(postgres.url) as store:
            opened = StoreGallery.open(store, retriever.encoder)
            wanted = retriever.search("a rocket at night", opened, where="album = 'space' or album = 'new'")
        answer = service.client.post(
            "/v1/search", json={"text": "a rocket at night", "where": "album in ('space', 'new')"}
        ).json()["hits"]
        assert [hit["image"] for hit in answer] == [hit.image for hit in wanted]
        # 1e-4: the pair graph with as many threads as the service gives it
        assert [hit["score"] for hit in answer] == pytest.approx([hit.score for hit in wanted], abs=1e-4)
        postgres.stop()
        down = service.client.post("/v1/search", json={"text": "x"})
        assert (down.status_code, down.json()["error"]["code"]) == (503, "store-unreachable")
        assert service.client.get("/health/ready").status_code == 503
        assert service.client.get("/health/live").status_code == 200
        postgres.start()
        end = time.monotonic() + 60
        while service.client.get("/health/ready").status_code != 200 and time.monotonic() < end:
            time.sleep(0.1)
        assert len(found(service.client)) == 3
        spoken = "".join(service.lines) + down.text
        assert "s3cret" not in spoken
        assert "p%40ss" not in spoken


def test_a_store_without_a_folder_for_pictures_only_searches(demo_bundle, photos, tmp_path):
    pytest.importorskip("qdrant_edge", reason="needs the extra [qdrant]")
    with running(demo_bundle, "--store", f"qdrant-edge:{tmp_path / 'edge'}") as service:
        refused = service.client.post("/v1/images", json={"images": bodies(photos)[:1]})
        assert (refused.status_code, refused.json()["error"]["code"]) == (422, "serve-without-pictures")
        assert found(service.client) == []
        by_picture = service.client.post("/v1/search", json={"image": data_uri(photos[0])})
        assert by_picture.json()["error"]["code"] == "gallery-without-texts"
