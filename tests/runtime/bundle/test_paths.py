"""Which files a bundle may name. The layout of the hub's cache is huggingface_hub's: links into the folder `blobs`."""

import hashlib
import os
import shutil
from pathlib import Path

import pytest

from qpert.runtime import Bundle, Retriever
from qpert.runtime.bundle.paths import bundle_path
from qpert.runtime.errors import BundleError


def in_hub_layout(bundle: Path, repository: Path, below: str = "") -> Path:
    """A copy of `bundle` as `huggingface_hub.snapshot_download` leaves it; returns the bundle's folder."""
    blobs, folder = repository / "blobs", repository / "snapshots" / ("0" * 40) / below
    blobs.mkdir(parents=True)
    for file in filter(Path.is_file, bundle.rglob("*")):
        blob = blobs / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copy(file, blob)
        link = folder / file.relative_to(bundle)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return folder


@pytest.mark.parametrize("below", ["", "bundles/fp32"])
def test_a_bundle_in_the_hubs_cache_opens_and_encodes(tiny_bundle, tmp_path, below):
    folder = in_hub_layout(tiny_bundle, tmp_path / "models--me--tiny", below)
    with Retriever.open(folder) as linked, Retriever.open(tiny_bundle) as plain:
        assert (linked.encode_texts(["a dog"]) == plain.encode_texts(["a dog"])).all()
    assert all(state.ok for state in Bundle.open(folder).check_files())


def test_a_link_to_a_bundle_in_the_hubs_cache_opens(tiny_bundle, tmp_path):
    folder = in_hub_layout(tiny_bundle, tmp_path / "models--me--tiny")
    (tmp_path / "here").symlink_to(folder)
    Bundle.open(tmp_path / "here")


@pytest.fixture
def hub(tmp_path):
    """An empty snapshot of one repository beside another one and a secret: (snapshot, hub)."""
    for name in ("models--me--tiny", "models--me--other"):
        (tmp_path / name / "blobs").mkdir(parents=True)
        (tmp_path / name / "blobs" / "a").write_text("content")
        (tmp_path / name / "refs").mkdir()
        (tmp_path / name / "refs" / "main").write_text("0" * 40)
    (tmp_path / "secret").write_text("secret")
    snapshot = tmp_path / "models--me--tiny" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    return snapshot


def test_a_link_into_the_blobs_of_the_same_repository_is_inside(hub):
    (hub / "x").symlink_to("../../blobs/a")
    assert bundle_path(hub, "x").read_text() == "content"


@pytest.mark.parametrize(
    "target",
    [
        "../../refs/main",
        "../../../models--me--other/blobs/a",
        "../../../secret",
        "../../blobs/../../secret",
        "/etc/passwd",
    ],
)
def test_a_link_to_anything_else_is_outside_in_the_hubs_cache_too(hub, target):
    (hub / "x").symlink_to(target)
    with pytest.raises(BundleError) as caught:
        bundle_path(hub, "x")
    assert caught.value.code == "bundle-link"
    assert "cp -rL" in str(caught.value)


def test_blobs_that_are_a_link_themselves_do_not_widen_the_bundle(hub, tmp_path):
    shutil.rmtree(hub.parents[1] / "blobs")
    (hub.parents[1] / "blobs").symlink_to(tmp_path)
    (hub / "x").symlink_to("../../blobs/secret")
    with pytest.raises(BundleError) as caught:
        bundle_path(hub, "x")
    assert caught.value.code == "bundle-link"


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../../blobs/a", "a/../../x", "a\\b", "C:a"])
def test_a_name_that_climbs_out_is_refused_in_the_hubs_cache_too(hub, name):
    with pytest.raises(BundleError) as caught:
        bundle_path(hub, name)
    assert caught.value.code == "bundle-path"


def test_folders_that_only_look_like_blobs_do_not_count(tmp_path):
    folder = tmp_path / "bundles" / "snapshots" / "1"
    folder.mkdir(parents=True)
    (tmp_path / "bundles" / "blobs").mkdir()
    (tmp_path / "bundles" / "blobs" / "a").write_text("content")
    (folder / "x").symlink_to("../../blobs/a")
    with pytest.raises(BundleError) as caught:
        bundle_path(folder, "x")
    assert caught.value.code == "bundle-link"
