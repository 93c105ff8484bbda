"""Galleries under SIGKILL, full disks, two writers, and readers while one writes."""

import errno
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import gallery_worker
import numpy as np
import pytest
from gallery_worker import DELETED, RECORDS_A_SHARD, Acknowledging, entries_of, work
from PIL import Image

from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.errors import GalleryError, UnavailableError
from qpert.runtime.gallery import catalogue as catalogue_module
from qpert.runtime.gallery.indexing import index_images
from qpert.runtime.gallery.reader import StoredGallery
from qpert.runtime.gallery.writer import open_writer
from qpert.runtime.retrieval.encoder import Encoder

KILLS = int(os.environ.get("QPERT_KILLS", "6"))
"""QPERT_KILLS=50 for the full run."""
PICTURES = 48
SHARDS = PICTURES // RECORDS_A_SHARD
"""Acknowledgements of a whole run."""
DELAYS = (0, 0, 0.001, 0.01, 0.1)
"""Seconds between an acknowledgement and the kill: into the next shard, or the deletion and compaction at the end."""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(11)
    for number in range(PICTURES):
        pixels = rng.integers(0, 256, (30 + number, 64 - number // 2, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03d}.png")
    return folder


@pytest.fixture(scope="module")
def entries(pictures):
    return entries_of(pictures)


@pytest.fixture(scope="module")
def encoder(tiny_bundle):
    opened = Encoder(Bundle.open(tiny_bundle), "cpu", threads=1)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def indexed(tmp_path_factory, encoder, entries):
    """A gallery that was never interrupted, before anything is deleted: what it holds of each image, by name."""
    folder = tmp_path_factory.mktemp("indexed") / "gallery"
    index_images(folder, encoder, entries, records_a_shard=RECORDS_A_SHARD)
    return contents(folder, encoder)


def contents(folder, encoder):
    """Name → everything that is kept of the image, as bytes, in row order."""
    with StoredGallery.open(folder, encoder) as gallery:
        features = gallery.features_of(range(len(gallery)))
        captions = {row: [] for row in range(len(gallery))}
        for row, text, embed in zip(gallery.image_of_text, gallery.texts, gallery.text_embeds, strict=True):
            captions[int(row)].append((text, embed.tobytes()))
        return {
            name: (
                features.query_embeds[row].tobytes(),
                features.image_embeds[row].tobytes(),
                features.object_masks[row][features.box_weights[row] > 0].tobytes(),
                features.box_weights[row][features.box_weights[row] > 0].tobytes(),
                captions[row],
            )
            for row, name in enumerate(gallery.images)
        }


def killed_after(lines_before, delay, bundle, pictures, gallery, *, pause=0):
    """Run the worker and kill it `delay` seconds after that many acknowledgements; returns how many images it had
    acknowledged by then, and whether it had finished. With `pause` it waits for the kill after so many."""
    command = [sys.executable, gallery_worker.__file__, str(bundle), str(pictures), str(gallery), str(pause)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    lines = []
    assert process.stdout.readline() == "ready\n"
    while len(lines) < lines_before and (line := process.stdout.readline()):  # empty: it has ended
        lines.append(line)
    time.sleep(delay)  # where in the next step it is hit is left to chance, and to the machine
    process.send_signal(signal.SIGKILL)
    lines += process.stdout.readlines()
    process.wait()
    finished = "finished\n" in lines
    return sum(int(line.split()[1]) for line in lines if line.startswith("indexed")), finished


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_a_killed_indexer_loses_nothing_it_acknowledged_and_a_rerun_ends_as_if_never_interrupted(
    tmp_path, tiny_bundle, pictures, entries, encoder, indexed
):
    reference = tmp_path / "reference"
    work(encoder, entries, reference, Acknowledging())
    expected = contents(reference, encoder)
    assert list(expected) == [entry.name for entry in entries[DELETED:]]

    rng, gallery, number, cut, kills = random.Random(5), tmp_path / "gallery-0", 0, 0, 0
    while kills < KILLS:
        before = len(contents(gallery, encoder)) if catalogue_there(gallery) else 0
        # The first kill hits an indexer that waits for it halfway; those after it, any moment.
        moment = (SHARDS // 2, 0) if not kills else (rng.randrange(SHARDS + 1), rng.choice(DELAYS))
        pause = 0 if kills else SHARDS // 2
        acknowledged, finished = killed_after(*moment, tiny_bundle, pictures, gallery, pause=pause)
        kills += 1
        if catalogue_there(gallery):
            held = contents(gallery, encoder)
            assert all(held[name] == indexed[name] for name in held)
            names = [entry.name for entry in entries]
            missing = set(names[: before + acknowledged]) - set(held)
            assert not missing or (missing <= set(names[:DELETED]) and len(held) >= len(names) - DELETED)
            cut += 0 < len(held) < len(names)
        else:
            assert acknowledged == 0
        if finished or rng.random() < 0.3:  # go on from here without a kill, and begin another
            work(encoder, entries, gallery, Acknowledging())
            assert list(contents(gallery, encoder).items()) == list(expected.items())
            number += 1
            gallery = tmp_path / f"gallery-{number}"
    work(encoder, entries, gallery, Acknowledging())
    assert list(contents(gallery, encoder).items()) == list(expected.items())
    assert cut, "no kill hit an unfinished gallery"


def catalogue_there(gallery):
    return gallery.is_dir() and catalogue_module.has_catalogue(gallery)


@pytest.mark.parametrize("call", [0, 1, 2, 3, 4, 5, 6, 7, 9, 12, 15, 18])
def test_a_disk_that_fills_up_loses_nothing_and_a_rerun_ends_the_same(
    tmp_path, monkeypatch, encoder, entries, indexed, call
):
    """Every write ends in an fsync; the one that fails moves through all the files of the first commits."""
    calls, fsync = iter(range(10**6)), os.fsync

    def full(descriptor):
        if next(calls) == call:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    counted = Counting()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UnavailableError, match=r"no space left for the gallery .* run the same command again"):
            index_images(tmp_path / "g", encoder, entries[:12], records_a_shard=3, progress=counted)
    held = contents(tmp_path / "g", encoder)
    assert list(held) == [entry.name for entry in entries[: counted.done]]
    index_images(tmp_path / "g", encoder, entries[:12], records_a_shard=3)
    assert contents(tmp_path / "g", encoder) == {entry.name: indexed[entry.name] for entry in entries[:12]}


class Counting:
    """Progress that counts what was acknowledged, and perhaps does something then."""

    def __init__(self, act=lambda done: None):
        self.done, self.act = 0, act

    @contextmanager
    def stage(self, what, total=None, *, unit=""):
        def advance(count):
            self.done += count
            self.act(self.done)

        yield advance

    def say(self, line):
        pass


def test_a_catalogue_that_cannot_grow_is_a_full_disk_too(tmp_path, monkeypatch, encoder, entries, indexed):
    connect = catalogue_module._connect

    def small(path, *, writable):
        connection = connect(path, writable=writable)
        connection.execute("PRAGMA max_page_count = 1")  # SQLite takes it for the present size: it cannot grow
        return connection

    index_images(tmp_path / "g", encoder, entries[:3], records_a_shard=3)
    counted = Counting()
    with monkeypatch.context() as patch:
        patch.setattr(catalogue_module, "_connect", small)
        with pytest.raises(UnavailableError, match="no space left"):
            index_images(tmp_path / "g", encoder, entries, records_a_shard=3, progress=counted)
    assert counted.done < len(entries) - 3
    assert len(contents(tmp_path / "g", encoder)) == 3 + counted.done
    index_images(tmp_path / "g", encoder, entries, records_a_shard=3)
    assert contents(tmp_path / "g", encoder) == indexed


def test_a_second_writer_is_refused_and_readers_are_not(tmp_path, encoder, entries):
    index_images(tmp_path / "g", encoder, entries[:4])
    with open_writer(tmp_path / "g", encoder):
        with pytest.raises(GalleryError, match=rf"being written by another process \(process {os.getpid()}\); wait"):
            index_images(tmp_path / "g", encoder, entries)
        with StoredGallery.open(tmp_path / "g", encoder) as gallery:
            assert len(gallery) == 4
    assert index_images(tmp_path / "g", encoder, entries[:5]).added == 1


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_the_lock_of_a_killed_process_is_released(tmp_path, encoder, entries):
    index_images(tmp_path / "g", encoder, entries[:2])
    script = (
        "import sys, time; from pathlib import Path; from qpert.runtime.gallery.writer import open_writer\n"
        "with open_writer(Path(sys.argv[1])): print('locked', flush=True); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "g")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "locked\n"
    with pytest.raises(GalleryError, match=rf"process {process.pid}\)"):
        index_images(tmp_path / "g", encoder, entries[:3])
    process.kill()
    process.wait()
    assert index_images(tmp_path / "g", encoder, entries[:3]).added == 1


def test_readers_see_what_is_committed_while_another_is_indexing(tmp_path, encoder, entries, indexed):
    folder, opened = tmp_path / "g", []

    def look(done):
        gallery = StoredGallery.open(folder, encoder)
        assert gallery.images == tuple(entry.name for entry in entries[:done])
        opened.append((done, gallery))

    index_images(folder, encoder, entries[:9], records_a_shard=3, progress=Counting(look))
    text = encoder.encode_texts(["a dog"])
    for done, gallery in opened:  # each still shows the moment at which it was opened
        assert len(gallery) == done == gallery.nearest(text, 100).rows.shape[1]
        row = done - 1
        assert gallery.features_of([row]).image_embeds[0].tobytes() == indexed[entries[row].name][1]
        gallery.close()


def test_files_that_a_crash_left_are_removed_by_the_next_writer(tmp_path, encoder, entries):
    folder: Path = tmp_path / "g"
    index_images(folder, encoder, entries[:3])
    for name in ("features/001-000009.safetensors", "features/.001-000002.safetensors.abc", "codes.2"):
        (folder / name).write_bytes(b"left")
    with (folder / "query_embeds.1").open("ab") as stream:
        stream.write(b"a row that was never committed")
    index_images(folder, encoder, entries[:4])
    assert sorted(path.name for path in (folder / "features").iterdir()) == [
        "001-000001.safetensors",
        "001-000002.safetensors",
    ]
    assert not (folder / "codes.2").exists()
    assert (folder / "query_embeds.1").stat().st_size == 4 * encoder_row_bytes(encoder)


def encoder_row_bytes(encoder):
    _, queries, width = encoder.manifest.graphs["image_query"].outputs[0].shape
    return 4 * queries * width
