"""Adding and deleting pictures while the service runs: what it has answered is on the disk, whatever happens next."""

from __future__ import annotations

import io
import json
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import httpx
import numpy as np
import pytest
from PIL import Image
from running_service import RunningService, data_uri, running

from qpert.runtime.cli import run
from qpert.runtime.gallery.catalogue import open_catalogue

KILLS = 8
"""`benchmarks/serving.py --kills 50` does the fifty that were measured; these are for every test run."""


def drawn(seed):
    """A small picture of its own, as JPEG."""
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (24, 32, 3), np.uint8)).save(stream, "JPEG")
    return stream.getvalue()


def add(client, *names, seed=None, **more):
    images = [{"name": name, "image": data_uri(drawn(len(name) if seed is None else seed))} for name in names]
    return client.post("/v1/images", json={"images": images, **more})


def names_in(folder):
    with closing(open_catalogue(folder)) as catalogue:
        return [record.name for record in catalogue.images()]


def kept_files(folder):
    return sorted(path.name for path in (folder / "pictures").iterdir())


@pytest.fixture(scope="module")
def changing(demo_bundle, tmp_path_factory):
    """A service whose gallery began with nothing, and its folder."""
    folder = tmp_path_factory.mktemp("changing") / "gallery"
    with running(demo_bundle, "--gallery", folder) as service:
        assert service.client.get("/v1/images").json() == {"images": [], "total": 0}
        assert service.client.post("/v1/search", json={"text": "a cup"}).json() == {"query": "a cup", "hits": []}
        yield service, folder


def test_added_pictures_are_found_as_if_qpert_index_had_added_them(
    changing, demo_bundle, photos, photo_boxes, tmp_path, capfd
):
    service, folder = changing
    boxes = [one.xyxy.tolist() for one in photo_boxes]
    files = [("image", (photo.name, photo.read_bytes())) for photo in photos]
    answer = service.client.post("/v1/images", files=files, data={"boxes": json.dumps(boxes)})
    assert answer.json() == {"added": 4, "replaced": 0, "unchanged": 0, "images": 4}
    assert names_in(folder) == [photo.name for photo in photos]
    listing = tmp_path / "list.txt"
    for photo in photos:
        (tmp_path / photo.name).symlink_to(photo)
    listing.write_text("\n".join(photo.name for photo in photos))
    other = tmp_path / "gallery"
    assert (
        run(
            [
                "index",
                str(demo_bundle),
                str(listing),
                "--boxes",
                str(photos[0].parent / "boxes.jsonl"),
                "--out",
                str(other),
            ]
        )
        == 0
    )
    capfd.readouterr()
    assert run(["search", str(other), "a cup of coffee", "--json"]) == 0
    assert service.client.post("/v1/search", json={"text": "a cup of coffee"}).json() == json.loads(
        capfd.readouterr().out
    )
    again = service.client.post("/v1/images", files=files, data={"boxes": json.dumps(boxes)})
    assert again.json() == {"added": 0, "replaced": 0, "unchanged": 4, "images": 4}
    for photo in photos:
        assert service.client.delete(f"/v1/images/{photo.name}").status_code == 200
    assert (names_in(folder), kept_files(folder)) == ([], [])


def test_a_name_keeps_its_picture_unless_told(changing):
    service, folder = changing
    assert add(service.client, "shelf/one.jpg", seed=1).json()["added"] == 1
    refused = add(service.client, "shelf/one.jpg", "shelf/two.jpg", seed=2)
    assert (refused.status_code, refused.json()["error"]["code"]) == (422, "image-changed")
    assert names_in(folder) == ["shelf/one.jpg"], "a part of a refused request was carried out"
    assert add(service.client, "shelf/one.jpg", seed=2, replace=True).json()["replaced"] == 1
    assert len(kept_files(folder)) == 1, "the file of before is still there"
    assert service.client.delete("/v1/images/shelf/one.jpg").json() == {"deleted": 1, "images": 0}
    gone = service.client.delete("/v1/images/shelf/one.jpg")
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "gallery-image-unknown")


@pytest.mark.parametrize(
    ("images", "code"),
    [
        (
            [{"name": "a", "image": data_uri(drawn(1))}, {"name": "b", "image": data_uri(drawn(1)[:300])}],
            "image-broken",
        ),
        ([{"name": "a", "image": data_uri(drawn(1))}] * 2, "image-names-repeated"),
        ([{"name": "../a", "image": data_uri(drawn(1))}], "image-name"),
        ([{"name": "a\n", "image": data_uri(drawn(1))}], "image-name"),
        ([{"name": "a", "image": data_uri(drawn(1)), "boxes": [[1, 1, 500, 2], [400, 1, 500, 2]]}], "box-outside"),
        ([{"name": "a", "image": data_uri(drawn(1)), "captions": [" "]}], "text-blank"),
        ([{"name": "a", "image": data_uri(drawn(1)), "path": "/etc/passwd"}], "request-invalid"),
    ],
)
def test_a_request_with_something_wrong_adds_nothing(changing, images, code):
    service, folder = changing
    answer = service.client.post("/v1/images", json={"images": images})
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, code)
    assert (names_in(folder), kept_files(folder)) == ([], [])


def test_many_clients_add_at_the_same_time_and_what_another_process_does_is_seen(
    changing, demo_bundle, tmp_path, capfd
):
    service, folder = changing
    with ThreadPoolExecutor(12) as clients:
        answers = list(clients.map(lambda n: add(service.client, f"crowd {n}.jpg", seed=n), range(24)))
        twice = list(clients.map(lambda n: add(service.client, "same.jpg", seed=5), range(6)))
    assert all(answer.json()["added"] == 1 for answer in answers)
    assert sorted(answer.json()["added"] for answer in twice) == [0, 0, 0, 0, 0, 1]
    assert set(names_in(folder)) == {*(f"crowd {n}.jpg" for n in range(24)), "same.jpg"}
    assert service.metric("qpert_batch_rows_count", work="index") < 30, "no two requests were committed together"
    (tmp_path / "other.jpg").write_bytes(drawn(99))
    assert run(["index", str(demo_bundle), str(tmp_path), "--out", str(folder)]) == 0
    assert run(["index", str(demo_bundle), "--out", str(folder), "--delete", "same.jpg", "--compact"]) == 0
    hits = service.client.post("/v1/search", json={"text": "a cup", "k": 100}).json()["hits"]
    assert {hit["image"] for hit in hits} == {*(f"crowd {n}.jpg" for n in range(24)), "other.jpg"}
    for name in names_in(folder):
        assert service.client.delete(f"/v1/images/{name}").status_code == 200


def writing(url, acknowledged, turn, stop):
    """Adds and deletes until the service is gone; what was answered with 200 is noted after the answer."""
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
        for number in range(10_000):
            name = f"{turn}-{threading.get_ident()}-{number}.jpg"
            try:
                if add(client, name, seed=number).status_code == 200:
                    acknowledged[name] = True
                    stop.release()
                if number % 3 == 2:
                    acknowledged[name] = None  # asked for, not answered yet: either is right
                    if client.delete(f"/v1/images/{name}").status_code == 200:
                        acknowledged[name] = False
            except httpx.TransportError:
                return


@pytest.mark.slow
def test_nothing_that_was_acknowledged_is_lost_to_kill_9(demo_bundle, tmp_path):
    folder, acknowledged = tmp_path / "gallery", {}
    for turn in range(KILLS):
        service = RunningService(demo_bundle, "--gallery", folder).wait_until_ready()
        answered = threading.Semaphore(0)
        threads = [threading.Thread(target=writing, args=(service.url, acknowledged, turn, answered)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(4 + 3 * turn):  # another moment each time
            assert answered.acquire(timeout=120)
        service.kill()
        for thread in threads:
            thread.join(120)
        there = set(names_in(folder))
        lost = {name for name, is_there in acknowledged.items() if is_there and name not in there}
        undone = {name for name, is_there in acknowledged.items() if is_there is False and name in there}
        assert (lost, undone) == (set(), set())
    assert sum(value is True for value in acknowledged.values()) > KILLS * 4
    with running(demo_bundle, "--gallery", folder) as service:  # and it is a whole gallery
        hits = service.client.post("/v1/search", json={"text": "a cup", "k": 1000, "rerank": 3}).json()["hits"]
        assert {hit["image"] for hit in hits} == set(names_in(folder))


def test_sigterm_answers_what_was_asked_and_keeps_what_it_acknowledged(demo_bundle, tmp_path):
    folder, acknowledged = tmp_path / "gallery", {}
    service = RunningService(demo_bundle, "--gallery", folder).wait_until_ready()
    answered = threading.Semaphore(0)
    threads = [threading.Thread(target=writing, args=(service.url, acknowledged, 0, answered)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(5):
        assert answered.acquire(timeout=120)
    assert service.stop() == 0
    for thread in threads:
        thread.join(120)
    there = set(names_in(folder))
    assert {name for name, is_there in acknowledged.items() if is_there} <= there
    assert not [line for line in service.lines if "Traceback" in line]
    assert service.process.returncode != -signal.SIGTERM


def test_a_gallery_without_features_is_served_and_says_what_it_cannot_do(demo_bundle, photos, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "one.jpg").write_bytes(photos[0].read_bytes())
    folder = tmp_path / "gallery"
    arguments = ["index", str(demo_bundle), str(tmp_path / "images"), "--out", str(folder), "--features", "none"]
    assert run(arguments) == 0
    with running(demo_bundle, "--gallery", folder) as service:
        refused = service.client.post("/v1/search", json={"text": "a cup"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (422, "gallery-without-features")
        found = service.client.post("/v1/search", json={"text": "a cup", "rerank": 0}).json()
        assert [hit["image"] for hit in found["hits"]] == ["one.jpg"]


def test_a_gallery_that_another_process_writes_is_busy_and_not_broken(changing):
    from qpert.runtime.gallery.lock import writer_lock

    service, folder = changing
    with writer_lock(folder):
        for _ in range(4):
            busy = add(service.client, "late.jpg")
            assert (busy.status_code, busy.json()["error"]["code"]) == (503, "gallery-locked")
            assert "Retry-After" in busy.headers
    assert service.client.get("/health/ready").status_code == 200
    assert add(service.client, "late.jpg").status_code == 200
    assert service.client.delete("/v1/images/late.jpg").status_code == 200
