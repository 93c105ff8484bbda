"""The gallery behind a running service: searched by many, changed by one at a time, refreshed when others change it."""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from qpert.runtime.detection.source import BoxSource
from qpert.runtime.errors import GalleryError, InputError, QpertError
from qpert.runtime.files import write_atomically
from qpert.runtime.filters.metadata import Metadata
from qpert.runtime.filters.tree import Condition
from qpert.runtime.gallery.catalogue import ImageRecord, has_catalogue, open_catalogue
from qpert.runtime.gallery.entries import ImageEntry
from qpert.runtime.gallery.fields import read_fields
from qpert.runtime.gallery.fresh import FreshGallery
from qpert.runtime.gallery.indexing import index_images
from qpert.runtime.gallery.reader import StoredGallery
from qpert.runtime.gallery.search import Searchable, TextGallery
from qpert.runtime.gallery.writer import open_writer
from qpert.runtime.inputs.boxes import Boxes
from qpert.runtime.retrieval.encoder import Encoder

PICTURES = "pictures"
"""The folder in the gallery that keeps what was sent: re-ranking may need the pictures again (`--features
recomputed`, `--repair`), and people want to see them."""
KEPT_FILE = re.compile(r"[0-9a-f]{64}\.picture")
"""Files of that folder, named by the SHA-256 of what is in them. Nothing else there is ever deleted."""
SWEEP_SECONDS = 3600.0


@dataclass(frozen=True, eq=False)
class Upload:
    """One picture to index: the bytes of its file, which were found to be a picture."""

    name: str
    data: bytes
    boxes: Boxes | None
    captions: tuple[str, ...]
    metadata: Metadata = field(default_factory=dict)


@dataclass(frozen=True)
class AddRequest:
    """The pictures of one request."""

    uploads: tuple[Upload, ...]
    replace: bool


@dataclass(frozen=True)
class DeleteRequest:
    name: str


@dataclass(frozen=True)
class Change:
    """What became of one request: how many pictures of each kind, and how many the gallery holds now."""

    added: int = 0
    replaced: int = 0
    unchanged: int = 0
    deleted: int = 0
    images: int = 0


Kept = tuple[ImageRecord, Metadata]


@dataclass(frozen=True, eq=False)
class GalleryImage:
    """What is shown of one picture."""

    path: Path
    boxes: Boxes | None
    captions: tuple[str, ...]
    metadata: Metadata


class ServedGallery(Protocol):
    """What a service searches and changes: a gallery's folder, or a vector store. All but `change` may be called by any
    thread; `change` by one at a time."""

    @property
    def name(self) -> str:
        """For messages."""
        ...

    def searchable(self) -> Searchable: ...

    def captions(self, where: Condition | None = None) -> TextGallery: ...

    def count(self) -> int: ...

    def names(self, offset: int, limit: int) -> list[str]: ...

    def fields(self) -> Sequence[str]:
        """Keys of the metadata that pictures have: what a filter can be about."""
        ...

    def image(self, name: str) -> GalleryImage | None: ...

    def forget(self) -> None: ...

    def trouble(self) -> str | None: ...

    def change(self, requests: Sequence[AddRequest | DeleteRequest]) -> list[Change | Exception]: ...

    def sweep(self) -> None: ...

    def close(self) -> None: ...


class LiveGallery:
    """Use `open`. `current` may be called by any thread; `change` by one at a time."""

    def __init__(
        self, folder: Path, encoder: Encoder, pictures: Path | None = None, detector: BoxSource | None = None
    ) -> None:
        self.folder, self.encoder, self.detector = folder, encoder, detector
        self.pictures = (pictures or folder / PICTURES).absolute()  # as the catalogue keeps paths
        self._fresh = FreshGallery(folder, lambda found: StoredGallery.open(found, encoder))

    @classmethod
    def open(
        cls, folder: Path, encoder: Encoder, pictures: Path | None = None, detector: BoxSource | None = None
    ) -> LiveGallery:
        """Open a gallery; a new one is made where there is none. `detector`: for pictures that come without boxes.

        Raises:
            GalleryError: it is damaged, or was made with another bundle or other settings.
            UnavailableError: it cannot be read, or not be made.
        """
        gallery = cls(folder, encoder, pictures, detector)
        if not has_catalogue(folder):
            with open_writer(folder, encoder):
                pass
        gallery.current()
        return gallery

    def current(self) -> StoredGallery:
        """The gallery as it was last committed, by whichever process. Raises GalleryError."""
        return self._fresh.current()

    @property
    def name(self) -> str:
        return str(self.folder)

    def searchable(self) -> StoredGallery:
        return self.current()

    def captions(self, where: Condition | None = None) -> TextGallery:
        """Of the pictures of which `where` is true."""
        return self.current().captions(where)

    def count(self) -> int:
        return len(self.current())

    def names(self, offset: int, limit: int) -> list[str]:
        """In the order in which they were added."""
        return list(self.current().images[offset : offset + limit])

    def fields(self) -> Sequence[str]:
        return self.current().metadata_keys

    def image(self, name: str) -> GalleryImage | None:
        images = self.current()
        row = images.row_of(name)
        if row is None:
            return None
        texts = (text for text, owner in zip(images.texts, images.image_of_text, strict=True) if owner == row)
        return GalleryImage(images.paths[row], images.boxes_of(row), tuple(texts), images.metadata[row])

    def trouble(self) -> None:
        """A folder that cannot be read is said by each request."""

    def close(self) -> None:
        """Nothing is held open."""

    def forget(self) -> None:
        """Read everything again at the next use."""
        self._fresh.forget()

    def change(self, requests: Sequence[AddRequest | DeleteRequest]) -> list[Change | Exception]:
        """Carry out requests in order; what is returned as done is on the disk. Requests whose pictures can be
        committed together are; one that fails leaves no trace, and does not concern the others."""
        results: list[Change | Exception] = []
        for group in together(requests):
            results += self._attempt(group)
        return results

    def _attempt(self, group: Sequence[AddRequest | DeleteRequest]) -> list[Change | Exception]:
        try:
            return self._carry_out(group)
        except Exception as error:
            if len(group) == 1:
                return [error]
            if not isinstance(error, QpertError):
                raise
        return [result for request in group for result in self._attempt([request])]

    def _carry_out(self, group: Sequence[AddRequest | DeleteRequest]) -> list[Change | Exception]:
        first = group[0]
        if isinstance(first, DeleteRequest):
            return [self._delete(first.name)]
        added = [request for request in group if isinstance(request, AddRequest)]
        uploads = [upload for request in added for upload in request.uploads]
        names = [upload.name for upload in uploads]
        before = self._records(names)
        entries = [self._kept(upload) for upload in uploads]
        try:
            index_images(self.folder, self.encoder, entries, boxes=self.detector, replace=first.replace)
        finally:
            self._sweep([*(entry.path for entry in entries), *(Path(record.path) for record, _ in before.values())])
        after = self._records(names)
        images = len(self.current())
        return [changed([upload.name for upload in request.uploads], before, after, images) for request in added]

    def _delete(self, name: str) -> Change:
        with closing(open_catalogue(self.folder)) as catalogue:
            record = catalogue.image(name)
        with open_writer(self.folder) as writer:
            writer.delete([name])
        if record is not None:
            self._sweep([Path(record.path)])
        return Change(deleted=1, images=len(self.current()))

    def _kept(self, upload: Upload) -> ImageEntry:
        """The picture in a file of our own, on the disk before it is indexed."""
        self.pictures.mkdir(parents=True, exist_ok=True)
        path = self.pictures / f"{hashlib.sha256(upload.data).hexdigest()}.picture"
        if path.is_file():
            os.utime(path)
        else:
            write_atomically(path, upload.data)
        return ImageEntry(upload.name, path, upload.boxes, upload.captions, upload.metadata)

    def _sweep(self, paths: Sequence[Path]) -> None:
        """Delete those kept files that no picture of the gallery refers to."""
        ours = {path for path in paths if path.parent == self.pictures and KEPT_FILE.fullmatch(path.name)}
        for path in ours - {self.pictures / one.name for one in self.current().paths}:
            path.unlink(missing_ok=True)

    def sweep(self) -> None:
        """Delete kept files that a crash has left; not young ones, which another process may be indexing."""
        if self.pictures.is_dir():
            oldest = time.time() - SWEEP_SECONDS
            self._sweep([path for path in self.pictures.iterdir() if path.stat().st_mtime < oldest])

    def _records(self, names: Sequence[str]) -> dict[str, Kept]:
        """Those pictures that are there, with their metadata."""
        with closing(open_catalogue(self.folder)) as catalogue:
            found = {name: catalogue.image(name) for name in names}
            return {
                name: (record, read_fields(catalogue, record.row).get(record.row, {}))
                for name, record in found.items()
                if record is not None
            }


def together(requests: Sequence[AddRequest | DeleteRequest]) -> Iterator[list[AddRequest | DeleteRequest]]:
    """Neighbouring requests to add pictures, of different names and with the same `replace`, in one group."""
    group: list[AddRequest | DeleteRequest] = []
    names: set[str] = set()
    for request in requests:
        own = {upload.name for upload in request.uploads} if isinstance(request, AddRequest) else set()
        first = group[0] if group else None
        fits = isinstance(first, AddRequest) and isinstance(request, AddRequest) and first.replace == request.replace
        if group and not (fits and not names & own):
            yield group
            group, names = [], set()
        group.append(request)
        names |= own
    if group:
        yield group


def changed(names: Sequence[str], before: Mapping[str, Kept], after: Mapping[str, Kept], images: int) -> Change:
    """What became of the pictures of one request: one that was encoded again has another row."""
    added = sum(name not in before for name in names)
    unchanged = sum(name in before and name in after and before[name] == after[name] for name in names)
    return Change(added, len(names) - added - unchanged, unchanged, images=images)


def check_name(name: str) -> str:
    """A picture's name as it can be stored and be part of a URL.

    Raises:
        InputError: it is empty, too long, absolute, or holds control characters, lone surrogates, `.` or `..`.
    """
    wrong = not name or len(name) > 500 or any(ord(letter) < 32 or 0xD800 <= ord(letter) < 0xE000 for letter in name)
    if wrong or any(part in ("", ".", "..") for part in name.split("/")):
        raise InputError(
            f"the name of a picture is {name[:80]!a}; expected 1 to 500 characters, such as cups/3.jpg, without "
            "control characters and without empty parts, . and .. between slashes",
            code="image-name",
        )
    return name


def require_gallery(gallery: ServedGallery | None) -> ServedGallery:
    """Raises GalleryError where the service has none."""
    if gallery is None:
        raise GalleryError(
            "this service has no gallery; start it with --gallery DIR or --store URL to search, add and delete",
            code="serve-without-gallery",
        )
    return gallery
