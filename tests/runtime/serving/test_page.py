"""The page at `/` in headless Chromium: filters are offered where there is metadata, and their errors shown in place.

Needs Node, the packages of examples/web and Chromium, which `make test-web` (or `make test-all`) installs; skips
elsewhere, with the reason. Screenshots go to a temporary folder, or to the one that QPERT_SCREENSHOTS names.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from running_service import data_uri, running

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
PACKAGES = ROOT / "examples" / "web" / "node_modules"
CHROMIUM = shutil.which(os.environ.get("QPERT_CHROMIUM", "chromium"))
ALBUMS = ({"album": "kitchen", "year": 2013}, {"album": "space"}, {}, {"album": "space"})


@pytest.fixture(scope="module")
def look(tmp_path_factory):
    """`look(service)`: what the probe saw of its page."""
    node = shutil.which("node")
    if node is None or CHROMIUM is None or not PACKAGES.is_dir():
        pytest.skip("no Node, no Chromium or no packages of examples/web here; `make web-env` gets them")
    folder = Path(os.environ.get("QPERT_SCREENSHOTS", "") or tmp_path_factory.mktemp("screenshots"))

    def run(service):
        request = {
            "url": service.url,
            "chromium": CHROMIUM,
            "folder": str(folder),
            "text": "a rocket at night",
            "where": "album = 'space'",
            "wrong": "album = space",
        }
        probe = Path(__file__).with_name("page_probe.mjs")
        done = subprocess.run(
            [node, str(probe)], input=json.dumps(request), capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def test_a_search_can_be_filtered_and_a_wrong_filter_is_said_beside_it(look, demo_bundle, photos, tmp_path):
    with running(demo_bundle, "--gallery", tmp_path / "gallery") as service:
        pairs = enumerate(zip(photos, ALBUMS, strict=True))
        images = [{"name": f"{n}.jpg", "image": data_uri(photo), "metadata": one} for n, (photo, one) in pairs]
        assert service.client.post("/v1/images", json={"images": images}).status_code == 200
        assert service.client.get("/v1/models").json()["data"][0]["fields"] == ["album", "year"]
        message = service.client.post("/v1/search", json={"text": "x", "where": "album = space"}).json()["error"]
        seen = look(service)
    assert seen["errors"] == []
    assert seen["filterable"]
    assert "album, year" in seen["hint"]
    assert len(seen["all"]["names"]) == 4
    assert set(seen["some"]["names"]) == {"1.jpg", "3.jpg"}
    assert (seen["some"]["fault"], seen["some"]["invalid"]) == ("", False)
    wrong = {"names": [], "status": "", "fault": message["message"], "invalid": True, "focused": "where"}
    assert seen["wrong"] == wrong
    assert seen["cleared"] == ""
    assert (seen["matching"], seen["captions"]) == (False, True), "a match looks at no gallery"
    assert [seen[f"overflow {name}"] for name in ("desk", "phone", "phone-dark")] == [0, 0, 0]


def test_no_filter_is_offered_where_pictures_have_no_metadata(look, service):
    assert service.client.get("/v1/models").json()["data"][0]["fields"] == []
    seen = look(service)
    assert (seen["errors"], seen["filterable"]) == ([], False)
