"""Galleries whose images have a query set for each box (reduction `each`), so each its own number of vectors."""

import json
import shutil
import sqlite3

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.cli import run
from qpert.runtime.cli.search import command as search_command
from qpert.runtime.gallery import scan
from qpert.runtime.gallery.entries import ImageEntry
from qpert.runtime.gallery.indexing import index_images
from qpert.runtime.gallery.scan import encode_codes, nearest
from qpert.runtime.gallery.writer import open_writer
from qpert.runtime.inputs.boxes import Boxes
from qpert.runtime.inputs.perturbation import Perturbation
from qpert.runtime.retrieval.encoder import Encoder
from qpert.runtime.retriever import Gallery, Retriever

TEXTS = ["a red star", "a small blue ring", "a green heart on a wall"]
# float32 sums of the same numbers in matrix products of other shapes
CLOSE = {"rtol": 0, "atol": 2e-6}


@pytest.fixture(scope="module")
def entries(tmp_path_factory, random_pictures):
    """Nine pictures with none to four boxes."""
    folder = tmp_path_factory.mktemp("pictures")
    found = []
    for number, pixels in enumerate(random_pictures(9)):
        path = folder / f"{number}.png"
        Image.fromarray(pixels).save(path)
        height, width = pixels.shape[:2]
        corners = [[2 * i, i, width / 3 + 2 * i, height / 2 + i] for i in range(number % 5)]
        labels = tuple(f"thing {i}" for i in range(len(corners)))
        boxes = Boxes(corners, (width, height), labels=labels) if corners else None
        found.append(ImageEntry(path.name, path, boxes))
    return found


@pytest.fixture(scope="module")
def retriever(demo_bundle):
    settings = Perturbation(alpha=4.0, reduction="each", keep_stock=True)
    with Retriever(Encoder(Bundle.open(demo_bundle), "cpu", settings, threads=1)) as opened:
        yield opened


@pytest.fixture(scope="module")
def made(tmp_path_factory, retriever, entries):
    folder = tmp_path_factory.mktemp("made") / "gallery"
    index_images(folder, retriever.encoder, entries, records_a_shard=4)
    return folder


@pytest.fixture
def gallery(made, tmp_path):
    return shutil.copytree(made, tmp_path / "gallery")


def in_memory(retriever, entries):
    boxes = [entry.boxes for entry in entries]
    features = retriever.encode_images([entry.path for entry in entries], boxes)
    return Gallery(tuple(entry.name for entry in entries), features, tuple(boxes))


def assert_same_search(retriever, folder, entries):
    """Whatever happened to the folder, it answers as these entries encoded anew do."""
    expected = in_memory(retriever, entries)
    with retriever.open_gallery(folder) as opened:
        assert opened.images == expected.images
        np.testing.assert_allclose(opened.query_embeds, expected.features.query_embeds, rtol=0, atol=1e-5)
        for exact in (False, True):
            for got, want in zip(
                retriever.search_batch(TEXTS, opened, rerank=3, exact=exact),
                retriever.search_batch(TEXTS, expected, rerank=3),
                strict=True,
            ):
                assert [(hit.image, hit.box) for hit in got] == [(hit.image, hit.box) for hit in want]
                np.testing.assert_allclose([hit.itc for hit in got], [hit.itc for hit in want], rtol=0, atol=1e-5)


def test_a_gallery_on_disk_answers_as_the_images_in_memory(retriever, made, entries, monkeypatch):
    monkeypatch.setattr(scan, "FAST_FROM", 1)
    assert_same_search(retriever, made, entries)
    with retriever.open_gallery(made) as opened:
        counts = [1 + len(entry.boxes or ()) for entry in entries]
        assert opened.query_sets.counts.tolist() == counts
        assert (made / "query_embeds.1").stat().st_size == sum(counts) * 4 * np.prod(
            opened.query_sets.vectors.shape[1:]
        )
        np.testing.assert_array_equal(opened.features_of([4, 2]).query_sets.counts, [5, 3])


def test_after_deleting_replacing_and_compacting_every_image_has_its_own_sets(retriever, gallery, entries):
    with open_writer(gallery) as writer:
        writer.delete([entries[3].name])
    changed = ImageEntry(
        entries[1].name, entries[1].path, entries[8].boxes and Boxes([[0, 0, 9, 9]], entries[1].boxes.size)
    )
    index_images(gallery, retriever.encoder, [changed], replace=True)
    now = [entry for entry in entries if entry.name not in (entries[3].name, changed.name)] + [changed]
    assert_same_search(retriever, gallery, now)
    with open_writer(gallery) as writer:
        assert writer.compact() == 2
    assert_same_search(retriever, gallery, now)


def test_damage_takes_out_the_images_whose_sets_it_hit(retriever, gallery, entries):
    with retriever.open_gallery(gallery) as opened:
        counts = opened.query_sets.counts
        row_bytes = opened.query_sets.vectors[0].nbytes
    with (gallery / "query_embeds.1").open("r+b") as file:
        file.seek(int(counts[:5].sum()) * row_bytes)  # the first set of the sixth image, in the second block of four
        file.write(b"\xff" * 8)
    with open_writer(gallery) as writer:
        assert writer.repair() == [entry.name for entry in entries[4:8]]
    index_images(gallery, retriever.encoder, entries)
    assert_same_search(retriever, gallery, [*entries[:4], entries[8], *entries[4:8]])


def test_a_first_schema_gallery_is_read_and_written_on(tmp_path, demo_bundle, entries):
    with Retriever.open(demo_bundle, threads=1) as retriever:
        folder = tmp_path / "gallery"
        index_images(folder, retriever.encoder, entries[:4])
        as_first_schema(folder)
        assert_same_search(retriever, folder, entries[:4])
        assert version_of(folder) == 1, "reading changes nothing"
        index_images(folder, retriever.encoder, entries)
        assert version_of(folder) == 3
        assert_same_search(retriever, folder, entries)


def as_first_schema(folder):
    connection = sqlite3.connect(folder / "gallery.sqlite")
    connection.execute("ALTER TABLE image DROP COLUMN sets")
    connection.execute("DROP TABLE field")
    connection.execute("UPDATE meta SET schema_version = 1")
    connection.commit()
    connection.close()


def version_of(folder):
    connection = sqlite3.connect(folder / "gallery.sqlite")
    (version,) = connection.execute("SELECT schema_version FROM meta").fetchone()
    connection.close()
    return version


def test_the_command_says_and_draws_which_box_matched(made, retriever, entries, tmp_path):
    page = tmp_path / "page.html"
    ran = CliRunner().invoke(search_command, [str(made), "a red star", "--rerank", "0", "--json", "--html", str(page)])
    assert ran.exit_code == 0, ran.output
    hits = json.loads(ran.stdout)["hits"]
    expected = retriever.search("a red star", in_memory(retriever, entries), rerank=0)
    for hit, want in zip(hits, expected, strict=True):
        assert hit["image"] == want.image
        if want.box is None:
            assert hit["box"] is None
        else:
            assert hit["box"]["index"] == want.box.index
            assert hit["box"]["xyxy"] == list(want.box.xyxy)
            assert hit["box"]["label"] == f"thing {want.box.index}"
    matched = sum(hit["box"] is not None for hit in hits)
    assert matched > 0
    assert page.read_text(encoding="utf-8").count('class="matched"') == matched


@given(seed=st.integers(0, 2**32 - 1), dead=st.booleans())
def test_both_scans_rank_images_by_the_best_of_their_sets(seed, dead):
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 6, 40)
    vectors = rng.standard_normal((counts.sum(), 3, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    texts = rng.standard_normal((4, 16)).astype(np.float32)
    alive = rng.random(40) < 0.8 if dead else np.ones(40, bool)
    if not alive.any():
        alive[0] = True
    ends = np.cumsum(counts)
    scores = np.stack(
        [
            np.einsum("sqe,te->tsq", vectors[end - count : end].astype(np.float64), texts).max(axis=(1, 2))
            for end, count in zip(ends, counts, strict=True)
        ],
        axis=1,
    )  # [T, n]
    scores[:, ~alive] = -np.inf
    expected = np.argsort(-scores, axis=1, kind="stable")[:, : min(5, alive.sum())]
    for fast_from, exact in ((1, False), (1, True)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(scan, "FAST_FROM", fast_from)
            codes = encode_codes(vectors)
            found = nearest(vectors, texts, 5, counts=counts, codes=codes, alive=alive, exact=exact)
        np.testing.assert_array_equal(found.rows, expected)
        np.testing.assert_allclose(found.scores, np.take_along_axis(scores, expected, 1), **CLOSE)


def test_more_boxes_than_the_bundle_takes_are_kept_by_score_only_when_asked(demo_bundle, entries, tmp_path, capsys):
    picture = entries[0].path
    rows = [
        {
            "image": picture.name,
            "x1": i % 20,
            "y1": i % 7,
            "x2": i % 20 + 9,
            "y2": i % 7 + 9,
            "score": ((7 * i) % 40) / 40,
        }
        for i in range(40)
    ]
    (tmp_path / "boxes.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "list.txt").write_text(str(picture))
    (tmp_path / "boxes.jsonl").write_text("\n".join(json.dumps({**row, "image": str(picture)}) for row in rows))
    command = ["index", str(demo_bundle), str(tmp_path / "list.txt"), "--out", str(tmp_path / "gallery")]
    command += ["--boxes", str(tmp_path / "boxes.jsonl")]
    assert run(command) == 2
    assert "has 40 boxes, this bundle takes up to 32" in capsys.readouterr().err
    assert run([*command, "--max-boxes", "5"]) == 0
    with Retriever.open(demo_bundle, threads=1) as retriever, retriever.open_gallery(tmp_path / "gallery") as opened:
        assert sorted(opened.boxes_of(0).scores.tolist()) == [35 / 40, 36 / 40, 37 / 40, 38 / 40, 39 / 40]
