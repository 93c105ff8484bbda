"""Threads that work ahead give what one after the other gives; so does `index_images` with several workers."""

from __future__ import annotations

import random
import threading
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.cli import run
from qpert.runtime.errors import ImageError
from qpert.runtime.gallery.entries import read_entries
from qpert.runtime.gallery.indexing import index_images
from qpert.runtime.gallery.pipeline import AHEAD, ordered
from qpert.runtime.gallery.reader import StoredGallery
from qpert.runtime.retrieval.encoder import Encoder


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_results_come_in_order(workers: int) -> None:
    rng = random.Random(1)
    pauses = [rng.random() / 200 for _ in range(40)]

    def square(number: int) -> int:
        time.sleep(pauses[number])
        return number * number

    with ordered(square, range(40), workers) as results:
        assert list(results) == [number * number for number in range(40)]


@pytest.mark.parametrize("workers", [1, 3])
def test_an_error_is_raised_in_its_place(workers: int) -> None:
    def work(number: int) -> int:
        if number == 3:
            raise ValueError("three")
        return number

    with ordered(work, range(9), workers) as results:
        assert [next(results) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(ValueError, match="three"):
            next(results)


def test_no_more_is_begun_than_is_needed_soon() -> None:
    begun, lock = [], threading.Lock()

    def work(number: int) -> int:
        with lock:
            begun.append(number)
        return number

    with ordered(work, range(100), 2) as results:
        assert next(results) == 0
        time.sleep(0.1)  # whatever would be begun has been: a bound, which more time cannot break
    assert len(begun) <= 2 * AHEAD + 1


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """71 small pictures: four full batches and a part of one."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(5)
    for number in range(71):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / f"{number:02}.png")
    return folder


def gallery_bytes(folder: Path) -> dict[str, bytes]:
    """Every file but the catalogue, which holds times."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix not in (".sqlite", ".lock"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_several_workers_write_the_gallery_that_one_writes(tiny_bundle: Path, pictures: Path, tmp_path: Path) -> None:
    (pictures / "30.png").write_bytes(b"no picture")
    with closing(Encoder(Bundle.open(tiny_bundle), "cpu", threads=1)) as encoder:
        found = {
            workers: index_images(
                tmp_path / str(workers),
                encoder,
                read_entries(pictures),
                skip_unreadable=True,
                workers=workers,
                records_a_shard=16,
            )
            for workers in (1, 3)
        }
        assert found[1] == found[3]
        assert (found[3].added, [name for name, _ in found[3].skipped]) == (70, ["30.png"])
        assert gallery_bytes(tmp_path / "1") == gallery_bytes(tmp_path / "3")
        with StoredGallery.open(tmp_path / "1", encoder) as one, StoredGallery.open(tmp_path / "3", encoder) as three:
            assert one.images == three.images


def test_what_was_committed_before_an_error_stays(tiny_bundle: Path, pictures: Path, tmp_path: Path) -> None:
    (pictures / "40.png").write_bytes(b"no picture")
    with closing(Encoder(Bundle.open(tiny_bundle), "cpu", threads=1)) as encoder:
        with pytest.raises(ImageError, match=r"40\.png"):
            index_images(tmp_path / "gallery", encoder, read_entries(pictures), workers=3, records_a_shard=16)
        with StoredGallery.open(tmp_path / "gallery", encoder) as gallery:
            assert len(gallery.images) == 32
        (pictures / "40.png").unlink()
        again = index_images(tmp_path / "gallery", encoder, read_entries(pictures), workers=3, records_a_shard=16)
    assert (again.added, again.unchanged) == (38, 32)


def test_the_command_takes_a_number_of_workers(tiny_bundle: Path, pictures: Path, tmp_path: Path) -> None:
    command = ["index", str(tiny_bundle), str(pictures), "--out", str(tmp_path / "gallery")]
    assert run([*command, "--workers", "3"]) == 0
    assert run([*command, "--workers", "-1"]) == 2
