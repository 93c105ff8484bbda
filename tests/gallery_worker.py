"""A process that indexes, deletes and compacts, and says what it has been told is done: what crash tests kill.

    python gallery_worker.py BUNDLE PICTURES GALLERY [PAUSE]

Goes on from whatever state the gallery is in. Each line on stdout is an acknowledgement. After PAUSE of them it
waits, to be killed there.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.gallery.catalogue import has_catalogue
from qpert.runtime.gallery.entries import ImageEntry
from qpert.runtime.gallery.indexing import index_images
from qpert.runtime.gallery.writer import open_writer
from qpert.runtime.inputs.boxes import Boxes
from qpert.runtime.retrieval.encoder import Encoder

DELETED = 5
"""The first images, which are taken out at the end."""
RECORDS_A_SHARD = 3


def entries_of(pictures: Path) -> list[ImageEntry]:
    """Every picture, with none to three boxes and one or two captions, depending on its number."""
    found = []
    for number, path in enumerate(sorted(pictures.iterdir())):
        size = Image.open(path).size
        corners = [[3 * i, 2 * i, 12 + 5 * i, 14 + 3 * i] for i in range(number % 4)]
        boxes = Boxes(corners, size) if corners else None
        captions = tuple(f"a {word} number {number}" for word in ("dog", "cat")[: 1 + number % 2])
        found.append(ImageEntry(path.name, path, boxes, captions))
    return found


class Acknowledging:
    """Progress that prints the number of images that are durable, in order; after `pause` times it waits for ever."""

    def __init__(self, pause: int = 0) -> None:
        self.pause, self.times = pause, 0

    @contextmanager
    def stage(self, what: str, total: int | None = None, *, unit: str = "") -> Iterator:
        yield self.acknowledge

    def acknowledge(self, count: int) -> None:
        print("indexed", count, flush=True)
        self.times += 1
        if self.times == self.pause:
            threading.Event().wait()

    def say(self, line: str) -> None:
        return


def work(encoder: Encoder, entries: list[ImageEntry], gallery: Path, progress) -> None:
    """Index everything; once that is done, delete some and compact. Idempotent."""
    if not deletion_began(gallery):
        index_images(gallery, encoder, entries, records_a_shard=RECORDS_A_SHARD, progress=progress)
    with open_writer(gallery, encoder) as writer:
        names = {record.name for record in writer.catalogue.images()}
        writer.delete([entry.name for entry in entries[:DELETED] if entry.name in names])
        writer.compact()


def deletion_began(gallery: Path) -> bool:
    if not gallery.is_dir() or not has_catalogue(gallery):
        return False
    with open_writer(gallery) as writer:
        return writer.catalogue.generation > 1 or len(writer.catalogue.images()) < writer.catalogue.count("image")


if __name__ == "__main__":
    bundle, pictures, gallery = map(Path, sys.argv[1:4])
    pause = int(sys.argv[4]) if len(sys.argv) > 4 else 0
    encoder = Encoder(Bundle.open(bundle), "cpu", threads=1)
    listed = entries_of(pictures)
    print("ready", flush=True)
    work(encoder, listed, gallery, Acknowledging(pause))
    print("finished", flush=True)
