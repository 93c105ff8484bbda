"""Addresses of stores: what they mean, and that they hide passwords; drivers that are missing are named."""

import sys

import pytest

from qpert.runtime.cli import run
from qpert.runtime.errors import GalleryError, InputError, UnavailableError
from qpert.runtime.stores.address import parse_address
from qpert.runtime.stores.opening import open_store


def test_addresses_say_what_they_are():
    found = parse_address("qdrant://host:7000/photos")
    assert (found.kind, found.location, found.name) == ("qdrant", "http://host:7000", "photos")
    assert parse_address("qdrant+https://h/c").location == "https://h:6333"
    assert parse_address("qdrant://[::1]/c").location == "http://[::1]:6333"
    found = parse_address("postgresql://me@host:5433/db?gallery=two&sslmode=require")
    assert (found.kind, found.location, found.name) == (
        "postgresql", "postgresql://me@host:5433/db?sslmode=require", "two",
    )  # fmt: skip
    assert parse_address("postgresql:///db").name == "qpert"
    assert parse_address("qdrant-edge:some/folder").location == "some/folder"
    for text in ("some/folder", "/a/b c", "C", "with:colon", "./qdrant"):
        assert parse_address(text).kind == "gallery"


@pytest.mark.parametrize(
    "text",
    ["qdrant://host:6333", "qdrant://host/a/b", "qdrant:///c", "qdrant://host:x/c", "qdrant://host/c?x=1", "mysql://h/d",
     "http://h/c", "qdrant-edge:", "qdrant-edge://x", "postgresql://h/d?gallery=A-b", "qdrant://key@host/c",
     "qdrant://u:s3cret@host/c", "postgresql://u:s3cret@h:x/d", "mysql://u:s3cret@h/d"],
)  # fmt: skip
def test_what_is_no_address_is_said_without_passwords(text):
    with pytest.raises(InputError) as found:
        parse_address(text)
    assert found.value.code == "store-address"
    assert "s3cret" not in str(found.value)


@pytest.mark.parametrize(
    "text", ["postgresql://u:s3%2Fcret@h/d", "postgresql://h/d?user=u&password=s3%2Fcret", "postgres://u:s3%2Fcret@h"]
)
def test_passwords_are_not_shown(text):
    found = parse_address(text)
    for shown in (str(found), repr(found), found.redacted(f"failed for s3/cret in {text}")):
        assert "cret" not in shown
    assert "***" in str(found)


@pytest.mark.parametrize(
    ("module", "address", "extra"),
    [("psycopg", "postgresql://h/d", "postgres"), ("qdrant_client", "qdrant://h/c", "qdrant"),
     ("qdrant_edge", "qdrant-edge:x", "qdrant")],
)  # fmt: skip
def test_a_driver_that_is_missing_is_named(monkeypatch, capsys, module, address, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UnavailableError) as found:
        open_store(address)
    assert found.value.code == "missing-extra"
    assert f"qpert[{extra}]" in str(found.value)
    assert run(["search", address, "x"]) == 3
    assert f"pip install 'qpert[{extra}]'" in capsys.readouterr().err


def test_a_folder_is_a_gallery_or_becomes_one(tmp_path):
    with open_store(str(tmp_path / "new")) as store:
        assert store.spec() is None
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(GalleryError) as found:
        open_store(str(tmp_path))
    assert found.value.code == "gallery-path"
