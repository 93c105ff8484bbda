"""The gallery on disk: what comes back is what the encoder gave, and what is wrong is said."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.bundle.manifest import read_manifest
from qpert.runtime.errors import BoxError, GalleryError, ImageError, InputError
from qpert.runtime.gallery.entries import ImageEntry
from qpert.runtime.gallery.indexing import index_images
from qpert.runtime.gallery.reader import StoredGallery
from qpert.runtime.gallery.spec import bundle_identity
from qpert.runtime.gallery.writer import open_writer
from qpert.runtime.inputs.boxes import Boxes
from qpert.runtime.retrieval.encoder import Encoder
from qpert.runtime.retriever import Gallery, Retriever

COUNT = 11
HOST_FILES = ("onnx/preprocess.onnx", "onnx/boxes.onnx")


@pytest.fixture(scope="module")
def entries(tmp_path_factory, random_pictures):
    """Pictures with none to three boxes, and captions for every other one."""
    folder = tmp_path_factory.mktemp("pictures")
    found = []
    for number, pixels in enumerate(random_pictures(COUNT)):
        path = folder / f"picture {number}.png"
        Image.fromarray(pixels).save(path)
        size = (pixels.shape[1], pixels.shape[0])
        boxes = Boxes([[4 * i, 3 * i, 15 + 4 * i, 20 + 2 * i] for i in range(number % 4)], size) if number % 4 else None
        found.append(ImageEntry(path.name, path, boxes, (f"a dog number {number}",) * (number % 2)))
    return found


@pytest.fixture(scope="module")
def retriever(tiny_bundle):
    with Retriever.open(tiny_bundle, threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def encoder(retriever):
    return retriever.encoder


@pytest.fixture(scope="module")
def in_memory(encoder, entries):
    """The same images by one call of the encoder."""
    features = encoder.encode_images([entry.path for entry in entries], [entry.boxes for entry in entries])
    return Gallery(tuple(entry.name for entry in entries), features)


@pytest.fixture(scope="module")
def made(tmp_path_factory, encoder, entries):
    """A gallery of all of them, in several shards. Not to be written to."""
    folder = tmp_path_factory.mktemp("made") / "gallery"
    index_images(folder, encoder, entries, records_a_shard=3)
    return folder


@pytest.fixture
def gallery(made, tmp_path):
    """A copy to be changed or damaged."""
    return shutil.copytree(made, tmp_path / "gallery")


def assert_same_features(found, expected, *, atol):
    """Equal, but for the padding of masks, which depends on the neighbours."""
    np.testing.assert_allclose(found.query_embeds, expected.query_embeds, rtol=0, atol=atol)
    np.testing.assert_allclose(found.image_embeds, expected.image_embeds, rtol=0, atol=atol)
    assert found.image_embeds.dtype == expected.image_embeds.dtype
    most = min(found.box_weights.shape[1], expected.box_weights.shape[1])
    for name in ("object_masks", "box_weights"):
        one, other = getattr(found, name), getattr(expected, name)
        np.testing.assert_array_equal(one[:, :most], other[:, :most])
        assert not one[:, most:].any()
        assert not other[:, most:].any()


def test_a_gallery_holds_what_the_encoder_gives(made, retriever, encoder, entries, in_memory):
    with retriever.open_gallery(made) as gallery:
        assert gallery.images == in_memory.images
        assert gallery.paths == tuple(entry.path for entry in entries)
        assert gallery.query_embeds.dtype == np.float32
        # the encoder batched otherwise: a matrix product of another shape may round otherwise
        assert_same_features(gallery.features_of(range(COUNT)), in_memory.features, atol=1e-5)
        np.testing.assert_array_equal(gallery.features_of(range(COUNT)).query_embeds, gallery.query_embeds)
        rows = [7, 2, 2, 10, 0]
        assert_same_features(gallery.features_of(rows), in_memory.features.rows(rows), atol=1e-5)
        assert gallery.texts == tuple(caption for entry in entries for caption in entry.captions)
        assert [entries[row].captions[0] for row in gallery.image_of_text] == list(gallery.texts)
        np.testing.assert_allclose(gallery.text_embeds, encoder.encode_texts(gallery.texts), rtol=0, atol=1e-5)
        for row, entry in enumerate(entries):
            boxes = gallery.boxes_of(row)
            assert (boxes is None) == (entry.boxes is None)
            assert boxes is None or (boxes.xyxy.tolist(), boxes.size) == (entry.boxes.xyxy.tolist(), entry.boxes.size)


def test_search_on_disk_finds_what_search_in_memory_finds(made, retriever, in_memory):
    texts = ["a dog", "a cat number 3", "a round table"]
    with retriever.open_gallery(made) as gallery:
        for k, rerank in ((3, 0), (5, 4), (100, 64)):
            found = retriever.search_batch(texts, gallery, k=k, rerank=rerank)
            expected = retriever.search_batch(texts, in_memory, k=k, rerank=rerank)
            for one, other in zip(found, expected, strict=True):
                assert [(hit.image, hit.rank_itc) for hit in one] == [(hit.image, hit.rank_itc) for hit in other]
                # batches of other shapes round otherwise
                np.testing.assert_allclose([h.score for h in one], [h.score for h in other], rtol=0, atol=1e-4)


def test_half_precision_features_come_back_bit_for_bit(tmp_path, half_bundle, entries):
    with Retriever.open(half_bundle, threads=1) as retriever:
        index_images(tmp_path / "g", retriever.encoder, entries[:2])
        expected = retriever.encode_images([e.path for e in entries[:2]], [e.boxes for e in entries[:2]])
        with retriever.open_gallery(tmp_path / "g") as gallery:
            found = gallery.features_of([0, 1])
    assert found.image_embeds.dtype == np.float16
    np.testing.assert_array_equal(found.image_embeds, expected.image_embeds)
    np.testing.assert_array_equal(found.query_embeds, expected.query_embeds)


def test_a_gallery_of_one_image_is_searched(tmp_path, retriever, entries):
    index_images(tmp_path / "g", retriever.encoder, entries[:1])
    with retriever.open_gallery(tmp_path / "g") as gallery:
        (hit,) = retriever.search("a dog", gallery, k=10)
    assert (hit.image, hit.rank_itc) == (entries[0].name, 1)
    assert hit.score == pytest.approx(hit.itc + hit.itm, abs=1e-6)


def test_indexing_again_encodes_nothing_and_adds_what_is_new(gallery, encoder, entries):
    before = (gallery / "query_embeds.1").read_bytes()
    summary = index_images(gallery, encoder, entries)
    assert (summary.images, summary.added, summary.unchanged, summary.texts) == (COUNT, 0, COUNT, COUNT // 2)
    assert (gallery / "query_embeds.1").read_bytes() == before


def test_a_touched_file_is_the_same_image_and_a_changed_one_is_not(tmp_path, encoder, entries):
    path = tmp_path / "a.png"
    shutil.copy(entries[0].path, path)
    index_images(tmp_path / "g", encoder, [ImageEntry("a", path)])
    path.touch()
    assert index_images(tmp_path / "g", encoder, [ImageEntry("a", path)]).unchanged == 1
    shutil.copy(entries[1].path, path)
    with pytest.raises(GalleryError, match=r"1 images .* differ, a in its file .*--replace"):
        index_images(tmp_path / "g", encoder, [ImageEntry("a", path)])


@pytest.mark.parametrize(
    "change", [{"boxes": Boxes([[1, 1, 9, 9]], (60, 40))}, {"captions": ("another",)}], ids=["boxes", "captions"]
)
def test_other_boxes_or_captions_are_refused_without_replace(gallery, encoder, entries, change):
    with pytest.raises(GalleryError, match=f"{entries[0].name} in its {next(iter(change))}"):
        index_images(gallery, encoder, [dataclasses.replace(entries[0], **change)])


def test_a_replaced_image_has_the_new_boxes_and_the_old_name_once(gallery, retriever, encoder, entries):
    boxes = Boxes([[1, 1, 30, 30]], (60, 40))
    changed = dataclasses.replace(entries[0], boxes=boxes)
    summary = index_images(gallery, encoder, [changed, *entries[1:]], replace=True)
    assert (summary.replaced, summary.added, summary.unchanged, summary.images) == (1, 0, COUNT - 1, COUNT)
    with retriever.open_gallery(gallery) as opened:
        assert opened.images == tuple(entry.name for entry in [*entries[1:], changed])
        expected = encoder.encode_images([changed.path], [boxes])
        assert_same_features(opened.features_of([COUNT - 1]), expected, atol=1e-5)
        assert len(opened.query_embeds) == COUNT


def test_deleted_images_are_not_found_and_compaction_gives_their_space_back(gallery, retriever, encoder, entries):
    gone = [entries[row].name for row in (0, 4, 5, 9)]
    kept = [row for row, entry in enumerate(entries) if entry.name not in gone]
    with retriever.open_gallery(gallery) as opened:
        before = opened.features_of(kept)
        embeds = opened.query_embeds[kept]
    with open_writer(gallery, encoder) as writer:
        writer.delete(gone)
    sizes = []
    for compacted in (False, True):
        if compacted:
            with open_writer(gallery, encoder) as writer:
                assert writer.compact() == len(gone)
        with retriever.open_gallery(gallery) as opened:
            assert opened.images == tuple(entries[row].name for row in kept)
            after = opened.features_of(range(len(kept)))
            np.testing.assert_array_equal(after.image_embeds, before.image_embeds)
            np.testing.assert_array_equal(after.box_weights, before.box_weights)
            np.testing.assert_array_equal(opened.query_embeds, embeds)
            assert opened.texts == tuple(caption for row in kept for caption in entries[row].captions)
            hits = retriever.search("a dog", opened, k=100)
            assert {hit.image for hit in hits} == set(opened.images)
        sizes.append(sum(path.stat().st_size for path in gallery.rglob("*") if path.is_file()))
    assert sizes[1] < sizes[0]
    assert index_images(gallery, encoder, entries).added == len(gone)


def test_a_reader_that_opens_while_the_gallery_is_compacted_gets_the_compacted_one(
    gallery, encoder, entries, monkeypatch
):
    check, opened = StoredGallery._check_columns, []

    def compacted_first(self):
        if not opened:
            with open_writer(gallery, encoder) as writer:
                writer.delete([entries[2].name])
                writer.compact()
        opened.append(self)
        check(self)

    monkeypatch.setattr(StoredGallery, "_check_columns", compacted_first)
    with StoredGallery.open(gallery, encoder) as found:
        assert found.images == tuple(entry.name for entry in entries if entry is not entries[2])
        assert found.features_of(range(COUNT - 1)).image_embeds.shape[0] == COUNT - 1
    assert len(opened) == 2


def test_deleting_an_unknown_image_deletes_nothing(gallery, encoder, entries):
    with open_writer(gallery, encoder) as writer, pytest.raises(GalleryError, match="no image named 'x'; nothing was"):
        writer.delete([entries[0].name, "x"])
    assert index_images(gallery, encoder, entries).unchanged == COUNT


def test_recomputed_features_are_the_stored_ones(tmp_path, made, retriever, encoder, entries):
    index_images(tmp_path / "g", encoder, entries, features="recomputed")
    assert not (tmp_path / "g" / "features").exists()
    with retriever.open_gallery(tmp_path / "g") as recomputed, retriever.open_gallery(made) as stored:
        rows = [3, 8, 1]
        # encoded in a batch of another size: its products may round otherwise
        assert_same_features(recomputed.features_of(rows), stored.features_of(rows), atol=1e-5)
        one, other = (retriever.search("a dog", opened, k=COUNT) for opened in (recomputed, stored))
    assert [hit.image for hit in one] == [hit.image for hit in other]
    np.testing.assert_allclose([hit.score for hit in one], [hit.score for hit in other], rtol=0, atol=1e-4)


def test_a_recomputed_image_that_is_gone_or_changed_is_named(tmp_path, retriever, encoder, entries):
    path = tmp_path / "a.png"
    shutil.copy(entries[0].path, path)
    index_images(tmp_path / "g", encoder, [ImageEntry("a", path)], features="recomputed")
    with retriever.open_gallery(tmp_path / "g") as gallery:
        shutil.copy(entries[1].path, path)
        with pytest.raises(ImageError, match=r"a.png has changed since it was indexed as a; .*--replace"):
            gallery.features_of([0])
        path.unlink()
        with pytest.raises(ImageError, match=r"a.png, from which .* is gone"):
            gallery.features_of([0])
    with pytest.raises(GalleryError, match="made with recomputed features, now stored are asked"):
        index_images(tmp_path / "g", encoder, entries[:1], features="stored")


def flip(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_a_damaged_shard_is_named_with_its_remedy_and_repaired(gallery, retriever, encoder, entries):
    shard = gallery / "features" / "001-000002.safetensors"
    flip(shard, -5)
    with retriever.open_gallery(gallery) as opened:
        opened.features_of([0])
        with pytest.raises(GalleryError, match=r"001-000002.safetensors was altered: .*--repair"):
            opened.features_of([4])
    with open_writer(gallery, encoder) as writer:
        assert writer.repair() == [entry.name for entry in entries[3:6]]
    assert index_images(gallery, encoder, entries).added == 3
    with retriever.open_gallery(gallery) as opened:
        assert set(opened.images) == {entry.name for entry in entries}
        opened.features_of(range(COUNT))


def test_a_missing_shard_is_named(gallery, retriever):
    (gallery / "features" / "001-000001.safetensors").unlink()
    with retriever.open_gallery(gallery) as opened, pytest.raises(GalleryError, match=r"000001.safetensors is miss"):
        opened.features_of([0])


@pytest.mark.parametrize("column", ["query_embeds.1", "codes.1", "code_stats.1", "text_embeds.1"])
def test_damaged_vectors_are_named_and_repaired(gallery, retriever, encoder, entries, column):
    flip(gallery / column, -3)
    with pytest.raises(GalleryError, match=rf"{column} was altered: rows \d+ to \d+ .*--repair"):
        retriever.open_gallery(gallery)
    with open_writer(gallery, encoder) as writer:
        writer.delete([entries[0].name])
        with pytest.raises(GalleryError, match="was altered"):
            writer.compact()  # which would otherwise write the damage anew, with a hash of its own
        assert writer.repair()
    index_images(gallery, encoder, entries)
    with retriever.open_gallery(gallery) as opened:
        assert set(opened.images) == {entry.name for entry in entries}


def test_vectors_that_were_cut_off_are_named(gallery, retriever, encoder, entries):
    with (gallery / "codes.1").open("r+b") as stream:
        stream.truncate(100)
    for act in (
        lambda: retriever.open_gallery(gallery),
        lambda: index_images(gallery, encoder, [dataclasses.replace(entries[0], name="new")]),
    ):
        with pytest.raises(GalleryError, match=r"codes.1 has 100 bytes, \d+ were committed"):
            act()


def test_a_catalogue_that_is_no_database_is_named(gallery, retriever):
    (gallery / "gallery.sqlite").write_bytes(b"SQLite format 3\0" + bytes(range(256)) * 40)
    with pytest.raises(GalleryError, match=r"gallery.sqlite is damaged"):
        retriever.open_gallery(gallery)


def test_another_bundle_is_refused_in_words(made, gallery, tmp_path, half_bundle, entries):
    with Retriever.open(half_bundle, threads=1) as other:
        with pytest.raises(GalleryError, match=r"was made with the bundle .* now .* is used; use the bundle that made"):
            other.open_gallery(made)
        with pytest.raises(GalleryError, match="was made with the bundle"):
            index_images(gallery, other.encoder, entries)


def test_other_perturbation_settings_are_refused_in_words(made, tiny_bundle, encoder):
    settings = dataclasses.replace(encoder.perturbation, alpha=3.0)
    other = Encoder(Bundle.open(tiny_bundle), "cpu", settings, threads=1)
    with pytest.raises(GalleryError, match=r"other perturbation settings: alpha 8.0 \(now 3.0\)"):
        StoredGallery.open(made, other)
    with StoredGallery.open(made, encoder) as gallery, pytest.raises(GalleryError, match="alpha 8"):
        Retriever(other).search("a dog", gallery)
    other.close()


def test_reports_leave_a_bundle_the_same_and_other_weights_do_not(tiny_bundle, edit_manifest, copy_of):
    original = Bundle.open(tiny_bundle)
    copy = copy_of(tiny_bundle)
    edit_manifest(copy, lambda values: values.update(command="another", verification=None))
    edit_manifest(copy, lambda values: values["files"].update({"reports/new.json": "0" * 64}))
    assert bundle_identity(read_manifest(copy)) == bundle_identity(original.manifest)
    values = json.loads((copy / "manifest.json").read_text())
    values["files"]["onnx/vision.onnx"] = "0" * 64
    changed = dataclasses.replace(original.manifest, files=values["files"])
    assert bundle_identity(changed) != bundle_identity(original.manifest)


def test_host_graphs_are_no_part_of_a_bundles_identity(tiny_bundle):
    """Their settings are compared by themselves, and bundles exported before they existed keep their galleries."""
    manifest = read_manifest(tiny_bundle)
    files = {name: digest for name, digest in manifest.files.items() if name not in HOST_FILES}
    assert len(files) == len(manifest.files) - 2
    before = dataclasses.replace(manifest, files=files, host_graphs={})
    changed = dataclasses.replace(manifest, files=manifest.files | dict.fromkeys(HOST_FILES, "0" * 64))
    assert bundle_identity(before) == bundle_identity(changed) == bundle_identity(manifest)
    other = dataclasses.replace(manifest, preprocessing=dataclasses.replace(manifest.preprocessing, resample="lanczos"))
    assert bundle_identity(other) != bundle_identity(manifest)


def test_names_given_twice_are_refused(tmp_path, encoder, entries):
    with pytest.raises(GalleryError, match=f"1 image names are given twice: {entries[0].name}"):
        index_images(tmp_path / "g", encoder, [*entries, entries[0]])


def test_an_unreadable_image_stops_indexing_or_is_counted(tmp_path, encoder, entries):
    broken = tmp_path / "broken.png"
    broken.write_bytes(entries[0].path.read_bytes()[:100])
    given = [entries[0], ImageEntry("broken", broken), ImageEntry("gone", tmp_path / "gone.png"), entries[1]]
    with pytest.raises(ImageError, match=r"broken.png"):
        index_images(tmp_path / "g", encoder, given)
    summary = index_images(tmp_path / "g", encoder, given, skip_unreadable=True)
    assert (summary.images, summary.added) == (2, 2)
    assert [name for name, _ in summary.skipped] == ["broken", "gone"]
    assert "broken or truncated" in summary.skipped[0][1]


def test_boxes_of_another_picture_size_are_named(tmp_path, encoder, entries):
    wrong = dataclasses.replace(entries[0], boxes=Boxes([[0, 0, 5, 5]], (99, 99)))
    with pytest.raises(
        BoxError, match=rf"the boxes of {entries[0].name} are for a picture of 99×99 pixels, it has 60×40"
    ):
        index_images(tmp_path / "g", encoder, [wrong])


def test_an_image_that_is_encoded_to_nan_never_reaches_the_gallery(tmp_path, encoder, entries, monkeypatch):
    encode = encoder.encode_images

    def overflowing(images, boxes=None):
        features = encode(images, boxes)
        features.image_embeds[-1, 0, 0] = np.inf
        return features

    monkeypatch.setattr(encoder, "encode_images", overflowing)
    with pytest.raises(ImageError, match=f"{entries[2].name} was encoded to NaN or infinity"):
        index_images(tmp_path / "g", encoder, entries[:3])


def test_a_folder_of_something_else_is_not_written_into(tmp_path, encoder, retriever, entries):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(GalleryError, match=r"is not a gallery \(it holds thesis.txt\); choose another"):
        index_images(tmp_path, encoder, entries)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(GalleryError, match=r"thesis.txt is a file; expected a folder"):
        index_images(tmp_path / "thesis.txt", encoder, entries)
    for missing in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(GalleryError, match="is not a gallery; expected a folder made by `qpert index`"):
            retriever.open_gallery(missing)


def test_a_newer_gallery_is_refused(gallery, retriever, encoder):
    with open_writer(gallery, encoder) as writer:
        writer.catalogue.connection.execute("UPDATE meta SET schema_version = 99")
    with pytest.raises(GalleryError, match="schema version 99, this qpert reads up to 3"):
        retriever.open_gallery(gallery)


def test_a_gallery_without_captions_has_no_texts(tmp_path, retriever, entries):
    index_images(tmp_path / "g", retriever.encoder, entries[:1])
    with retriever.open_gallery(tmp_path / "g") as gallery:
        assert gallery.texts == ()
        assert gallery.text_embeds.shape == (0, gallery.query_embeds.shape[2])


def test_a_shard_of_no_images_is_refused(tmp_path, encoder, entries):
    with pytest.raises(InputError, match="records_a_shard is 0; expected at least 1"):
        index_images(tmp_path / "g", encoder, entries, records_a_shard=0)
