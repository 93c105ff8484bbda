"""`qpert index --from`: the gallery of encoded images is the one that `qpert index` makes of the pictures."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from PIL import Image

from qpert.runtime import Boxes, Perturbation, Retriever
from qpert.runtime.batch import EncodeImages
from qpert.runtime.batch.importing import index_vectors
from qpert.runtime.cli import run
from qpert.runtime.errors import InputError
from qpert.runtime.gallery.entries import ImageEntry
from qpert.runtime.gallery.indexing import index_images

CORNERS = [[3.0, 4.0, 20.0, 25.0], [8.5, 9.0, 30.0, 31.0]]
CAPTIONS = [["a dog on a mat"], [], ["a cat", "a red boat"], [], ["two houses"]]


@pytest.fixture(scope="module")
def files(tmp_path_factory, random_pictures):
    folder = tmp_path_factory.mktemp("pictures")
    paths = [folder / f"{number}.png" for number in range(5)]
    for path, pixels in zip(paths, random_pictures(5), strict=True):
        Image.fromarray(pixels).save(path)
    return paths


def table_of(encode, files):
    boxes = pa.array([None, CORNERS, None, CORNERS[:1], []], pa.list_(pa.list_(pa.float64())))
    columns = {"file": [str(path) for path in files], "key": [path.name for path in files], "boxes": boxes}
    return encode(pa.table(columns | {"texts": CAPTIONS}))


@pytest.fixture(scope="module")
def vectors(tmp_path_factory, tiny_bundle, files):
    """Two Parquet files below a folder, with image tokens. Not to be written to."""
    folder = tmp_path_factory.mktemp("vectors")
    encode = EncodeImages(tiny_bundle, image="file", name="key", boxes="boxes", captions="texts", features=True)
    table = table_of(encode, files)
    (folder / "b").mkdir()
    pq.write_table(table.slice(0, 3), folder / "a.parquet")
    pq.write_table(table.slice(3), folder / "b" / "c.parquet")
    return folder


def changed(vectors, tmp_path, name, change):
    """A copy of the vectors in one file, with one column changed."""
    table = pa.concat_tables([pq.read_table(vectors / "a.parquet"), pq.read_table(vectors / "b" / "c.parquet")])
    table = table.set_column(table.schema.get_field_index(name), name, change(table[name]))
    pq.write_table(table, tmp_path / "changed.parquet")
    return tmp_path / "changed.parquet"


def test_it_is_the_gallery_that_the_pictures_give(tiny_bundle, files, vectors, tmp_path, capsys):
    """The bundle re-ranks with boxes, so masks are made anew from them: search agrees in every score."""
    assert run(["index", str(tiny_bundle), "--from", str(vectors), "--out", str(tmp_path / "from"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {key: report[key] for key in ("images", "added", "unchanged", "texts")} == {
        "images": 5, "added": 5, "unchanged": 0, "texts": 4,
    }  # fmt: skip
    with Retriever.open(tiny_bundle) as retriever:
        boxes = {1: CORNERS, 3: CORNERS[:1], 4: []}
        entries = [
            ImageEntry(path.name, path, captions=tuple(CAPTIONS[number]), boxes=None if number not in boxes else Boxes(
                np.array(boxes[number], float).reshape(-1, 4), Image.open(path).size))
            for number, path in enumerate(files)
        ]  # fmt: skip
        index_images(tmp_path / "direct", retriever.encoder, entries)
        again = index_images(tmp_path / "from", retriever.encoder, entries)
        assert (again.added, again.unchanged) == (0, 5), "`qpert index` of the pictures finds nothing to do"
        with (
            retriever.open_gallery(tmp_path / "from") as ours,
            retriever.open_gallery(tmp_path / "direct") as theirs,
        ):
            assert ours.images == theirs.images
            assert ours.texts == theirs.texts
            np.testing.assert_allclose(ours.query_embeds, theirs.query_embeds, rtol=0, atol=1e-6)  # other batches
            found, wanted = (retriever.search("a red boat", gallery, k=5) for gallery in (ours, theirs))
            assert [hit.image for hit in found] == [hit.image for hit in wanted]
            np.testing.assert_allclose([h.score for h in found], [h.score for h in wanted], rtol=0, atol=1e-5)


def test_a_query_set_for_each_box_comes_along(demo_bundle, files, tmp_path):
    each = Perturbation(reduction="each", keep_stock=True)
    encode = EncodeImages(demo_bundle, image="file", name="key", boxes="boxes", captions="texts", perturbation=each)
    pq.write_table(table_of(encode, files), tmp_path / "v.parquet")
    with Retriever.open(demo_bundle, perturbation=each) as retriever:
        summary = index_vectors(tmp_path / "gallery", retriever.encoder, tmp_path / "v.parquet")
        assert summary.added == 5
        with retriever.open_gallery(tmp_path / "gallery") as gallery:
            assert gallery.spec.features == "recomputed", "no tokens came along, and the files are here"
            assert gallery.query_sets.counts.tolist() == [1, 3, 1, 2, 1]
            assert len(retriever.search("a boat", gallery, k=5)) == 5
    with Retriever.open(demo_bundle) as other, pytest.raises(InputError) as caught:
        index_vectors(tmp_path / "other", other.encoder, tmp_path / "v.parquet")
    assert caught.value.code == "vectors-perturbation"
    assert not (tmp_path / "other").exists()


def test_the_same_call_adds_nothing_and_changes_need_replace(tiny_bundle, vectors, tmp_path, capsys):
    out = str(tmp_path / "gallery")
    assert run(["index", str(tiny_bundle), "--from", str(vectors / "a.parquet"), "--out", out]) == 0
    assert run(["index", str(tiny_bundle), "--from", str(vectors), "--out", out]) == 0
    assert "2 added, 3 unchanged" in capsys.readouterr().out
    other = changed(vectors, tmp_path, "sha256", lambda column: pa.array(["0" * 64] * 5))
    assert run(["index", str(tiny_bundle), "--from", str(other), "--out", out]) == 2
    assert "--replace" in capsys.readouterr().err
    assert run(["index", str(tiny_bundle), "--from", str(other), "--out", out, "--replace"]) == 0
    assert "5 replaced" in capsys.readouterr().out


def test_images_that_could_not_be_encoded_are_left_out_on_request_only(tiny_bundle, files, tmp_path, capsys):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    out = EncodeImages(tiny_bundle)(pa.table({"image": [str(files[0]), str(tmp_path / "bad.png")]}))
    pq.write_table(out, tmp_path / "v.parquet")
    command = ["index", str(tiny_bundle), "--from", str(tmp_path / "v.parquet"), "--out", str(tmp_path / "g"), "--json"]
    assert run(command) == 2
    assert "bad.png" in capsys.readouterr().err
    assert not (tmp_path / "g").exists()
    assert run([*command, "--skip-unreadable"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["added"] == 1
    assert [entry["image"] for entry in report["skipped"]] == [str(tmp_path / "bad.png")]


def nan_in(column):
    rows = column.to_pylist()
    rows[2][0][0] = float("nan")
    return pa.array(rows, column.type)


def long_in(column):
    rows = column.to_pylist()
    rows[2][0] = [2 * value for value in rows[2][0]]
    return pa.array(rows, column.type)


@pytest.mark.parametrize(
    ("name", "change", "code"),
    [
        ("image", lambda column: pa.array(["same"] * 5), "image-names-repeated"),
        ("image", lambda column: pa.array([None] * 5, pa.string()), "vectors-name"),
        ("bundle", lambda column: pa.array(["0" * 64] * 5), "vectors-other-bundle"),
        ("perturbation", lambda column: pa.array(["{}"] * 5), "vectors-perturbation"),
        ("query_embeds", nan_in, "vectors-not-finite"),
        ("query_embeds", long_in, "vectors-not-unit"),
        ("query_embeds", lambda column: pa.array([row[:-1] for row in column.to_pylist()]), "vectors-shape"),
        ("query_embeds", lambda column: pa.array([None] * 5, column.type), "vectors-shape"),
        ("image_embeds", lambda column: pa.array([row[1:] for row in column.to_pylist()]), "vectors-shape"),
        ("image_embeds", lambda column: pa.array([None] * 5, column.type), "vectors-without-tokens"),
    ],
)
def test_what_a_gallery_cannot_take_is_refused_before_anything_is_written(
    tiny_bundle, vectors, tmp_path, name, change, code
):
    source = changed(vectors, tmp_path, name, change)
    with Retriever.open(tiny_bundle) as retriever, pytest.raises(InputError) as caught:
        index_vectors(tmp_path / "gallery", retriever.encoder, source)
    assert caught.value.code == code
    assert not (tmp_path / "gallery").exists()


def test_other_files_and_other_columns_are_refused(tiny_bundle, vectors, tmp_path):
    (tmp_path / "text.parquet").write_text("no parquet")
    pq.write_table(pq.read_table(vectors / "a.parquet").drop_columns(["sha256"]), tmp_path / "less.parquet")
    (tmp_path / "empty").mkdir()
    cases = {"text.parquet": "vectors-unreadable", "less.parquet": "vectors-columns"}
    cases |= {"empty": "vectors-missing", "nothing.parquet": "vectors-missing"}
    with Retriever.open(tiny_bundle) as retriever:
        for name, code in cases.items():
            with pytest.raises(InputError) as caught:
                index_vectors(tmp_path / "gallery", retriever.encoder, tmp_path / name, features="none")
            assert caught.value.code == code, name


def test_features_are_recomputed_only_where_the_files_are(tiny_bundle, files, tmp_path):
    moved = tmp_path / "moved.png"
    shutil.copy(files[0], moved)
    pq.write_table(EncodeImages(tiny_bundle)(pa.table({"image": [str(moved)]})), tmp_path / "v.parquet")
    moved.unlink()
    with Retriever.open(tiny_bundle) as retriever:
        with pytest.raises(InputError) as caught:
            index_vectors(tmp_path / "gallery", retriever.encoder, tmp_path / "v.parquet")
        assert caught.value.code == "vectors-without-file"
        assert index_vectors(tmp_path / "g", retriever.encoder, tmp_path / "v.parquet", features="none").added == 1
        with retriever.open_gallery(tmp_path / "g") as gallery:
            assert len(retriever.search("a boat", gallery, rerank=0)) == 1


def test_vectors_of_other_engines_list_types_are_read_too(tiny_bundle, vectors, tmp_path):
    table = pq.read_table(vectors / "a.parquet")
    large = pa.large_list(pa.large_list(pa.float32()))
    column = pa.array(table["query_embeds"].to_pylist(), large)
    table = table.set_column(table.schema.get_field_index("query_embeds"), "query_embeds", column)
    table = table.set_column(0, "image", pc.cast(table["image"], pa.large_string()))
    pq.write_table(table, tmp_path / "large.parquet")
    with Retriever.open(tiny_bundle) as retriever:
        assert index_vectors(tmp_path / "gallery", retriever.encoder, tmp_path / "large.parquet").added == 3


def test_it_takes_no_images_beside(tiny_bundle, vectors, tmp_path, capsys):
    assert run(["index", str(tiny_bundle), "x", "--from", str(vectors), "--out", str(tmp_path / "g")]) == 2
    assert "--from takes images that are already encoded" in capsys.readouterr().err
