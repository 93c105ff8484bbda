"""A bundle and a gallery written by qpert before schema 2 (commit 94133b9): they work as before, for ever.

`fixtures/schema1` holds the tiny model with `--perturb both`, a gallery of examples/photos made from it, and the scores
that the old code gave (expected.json). Nothing here may be made anew with newer code.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qpert.runtime import Bundle, Retriever
from qpert.runtime.bundle.manifest import Manifest
from qpert.runtime.bundle.upgrade import split_source, upgrade_schema_1
from qpert.runtime.cli import run
from qpert.runtime.errors import BundleError
from qpert.runtime.gallery.spec import bundle_identity
from qpert.runtime.inputs.box_files import read_box_file

FOLDER = Path(__file__).parents[2] / "fixtures" / "schema1"
PHOTOS = Path(__file__).parents[3] / "examples" / "photos"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())
ROUNDING = 1e-5
"""Another ONNX Runtime, or another processor, sums float32 in another order."""


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    """A copy, since verification writes its verdict."""
    return Path(shutil.copytree(FOLDER, tmp_path_factory.mktemp("schema1") / "copy"))


@pytest.fixture(scope="module")
def retriever(old):
    with Retriever.open(old / "bundle") as opened:
        yield opened


def test_it_is_of_schema_1_and_reads_as_schema_2(old):
    values = json.loads((FOLDER / "bundle" / "manifest.json").read_text())
    assert values["schema_version"] == 1
    manifest = Bundle.open(old / "bundle").manifest
    assert manifest.family == "blip2"
    assert [graph.role for graph in manifest.graphs.values()] == [
        "image_tower",
        "query_head",
        "text_tower",
        "pair_scorer",
    ]
    assert (manifest.patches, manifest.patch_size, manifest.prefix_tokens) == ((4, 4), 14, 1)
    assert (manifest.tokenizer.kind, manifest.tokenizer.clean, manifest.tokenizer.pad) == (
        "wordpiece",
        "lavis",
        "longest",
    )
    assert Manifest.from_dict(json.loads(manifest.to_json())) == manifest


def test_its_scores_are_those_that_the_old_code_gave(retriever):
    table = read_box_file(PHOTOS / "boxes.jsonl")
    photos = [PHOTOS / name for name in EXPECTED["photos"]]
    boxes = [table.for_image(photo.name, Image.open(photo).size) for photo in photos]
    features = retriever.encode_images(photos, boxes=boxes)
    texts = retriever.encode_texts(EXPECTED["texts"])
    itc = retriever.itc_scores(features.query_embeds, texts)
    np.testing.assert_allclose(itc, EXPECTED["itc"], rtol=0, atol=ROUNDING)
    itm = retriever.itm_scores(features, EXPECTED["texts"])
    np.testing.assert_allclose(itm, EXPECTED["itm"], rtol=0, atol=ROUNDING)


def test_its_gallery_is_still_its_own_and_finds_what_it_found(retriever, old):
    with retriever.open_gallery(old / "gallery") as gallery:
        hits = retriever.search(EXPECTED["texts"][0], gallery, k=4, rerank=2)
    assert [(hit.image, hit.rank_itc) for hit in hits] == [(row[0], row[4]) for row in EXPECTED["hits"]]
    np.testing.assert_allclose([hit.score for hit in hits], [row[1] for row in EXPECTED["hits"]], atol=ROUNDING)


def test_it_verifies_against_what_it_recorded_and_stays_of_schema_1(old, capsys):
    assert run(["verify", str(old / "bundle"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == "pass"
    written = json.loads((old / "bundle" / "manifest.json").read_text())
    assert written["schema_version"] == 1, "an older qpert must still read it"
    assert written["verification"]["verdict"] == "pass"
    assert run(["inspect", str(old / "bundle"), "--json"]) == 0


def test_it_evaluates_and_searches_from_the_command_line(old, capsys, tmp_path):
    arguments = ["eval", str(old / "bundle"), "--dataset", "demo", "--limit", "6", "--rerank", "3"]
    assert run([*arguments, "--boxes", "none", "--work", str(tmp_path / "work"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == 6
    assert found["itm_pairs"] > 0
    assert run(["search", str(old / "gallery"), "a cat", "--bundle", str(old / "bundle"), "-k", "2", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["hits"]) == 2


def test_a_squash_is_not_part_of_a_bundles_identity(old):
    """The hash that schema 1 computed over files, length and preprocessing, taken from the gallery itself."""
    import sqlite3

    with sqlite3.connect(f"file:{old / 'gallery' / 'gallery.sqlite'}?mode=ro", uri=True) as catalogue:
        texts = [str(value) for row in catalogue.execute("select * from meta") for value in row]
    identity = bundle_identity(Bundle.open(old / "bundle").manifest)
    assert any(identity in text for text in texts)


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("/data/cats and dogs/blip2.pth", ("/data/cats and dogs/blip2.pth", "", "")),
        ("/x/a.pth and /y/eva_vit_g.pth", ("/x/a.pth", " and ", "/y/eva_vit_g.pth")),
        ("/x/cats and dogs/a.pth and /y/c and d/v.pth", ("/x/cats and dogs/a.pth", " and ", "/y/c and d/v.pth")),
        ("Salesforce/blip2-itm-vit-g", ("Salesforce/blip2-itm-vit-g", "", "")),
    ],
)
def test_a_source_of_two_files_is_split_and_a_folder_called_so_is_not(source, parts):
    assert split_source(source) == parts


def test_what_is_no_manifest_of_schema_1_is_refused():
    with pytest.raises((KeyError, TypeError)):
        upgrade_schema_1({"architecture": {"vision": {"image_size": 56}}})
    with pytest.raises(BundleError):
        Manifest.from_dict({"schema_version": 3})
