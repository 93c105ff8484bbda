"""Boxes of many pictures to a box file: resumable, and written whole or not at all.

While it runs, `.NAME.partial` beside the file holds a line for each finished picture; the same call resumes from it.
The box file itself is written at the end, and the partial file deleted.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from qpert.runtime.detection.source import BoxSource, boxes_of, source_identity
from qpert.runtime.errors import ImageError, InputError, UnavailableError
from qpert.runtime.files import portable_name, write_atomically
from qpert.runtime.inputs.boxes import Boxes
from qpert.runtime.inputs.images import load_image
from qpert.runtime.progress import Progress, Silent

if TYPE_CHECKING:
    from PIL.Image import Image

    from qpert.runtime.gallery.entries import ImageEntry

PICTURES_AT_ONCE = 8
"""Decoded pictures in memory."""


@dataclass(frozen=True)
class DetectSummary:
    """What `detect_images` did, in pictures and boxes. skipped: (name, reason) of pictures that could not be read;
    resumed: pictures that an interrupted run had finished; labels: boxes by label, the most frequent first."""

    images: int
    boxes: int
    without_boxes: int
    resumed: int
    skipped: tuple[tuple[str, str], ...]
    labels: dict[str, int]


def detect_images(
    source: BoxSource,
    entries: Sequence[ImageEntry],
    out: Path,
    *,
    force: bool = False,
    skip_unreadable: bool = False,
    progress: Progress | None = None,
) -> DetectSummary:
    """Find the boxes of `entries` and write them to `out` as JSONL, a line a box, in the order of the entries.

    Args:
        source: a `Detector`, or anything else that yields boxes.
        entries: the pictures; their names are what the file calls them.
        out: a `.jsonl` file, which `read_box_file` reads back.
        force: replace a file that exists.
        skip_unreadable: leave out, and count, pictures that cannot be read, instead of stopping at them.
        progress: advances once a picture's boxes are on the disk.

    Raises:
        InputError: `out` exists, has another extension, or its folder does not exist.
        ImageError: a picture that cannot be read.
        UnavailableError: the file cannot be written.
    """
    check_out(out, force=force)
    partial = out.with_name(f".{out.name}.partial")
    done = finished(partial, source_identity(source), entries)
    resumed = len(done)
    todo = [entry for entry in entries if portable_name(entry.name) not in done]
    skipped: list[tuple[str, str]] = []
    shown = progress or Silent()
    if resumed:
        shown.say(f"{resumed} pictures were finished by an interrupted run")
    with (
        journal(partial, source_identity(source), done) as stream,
        shown.stage(f"finding boxes in {len(todo)} pictures", total=len(todo)) as advance,
    ):
        for start in range(0, len(todo), PICTURES_AT_ONCE):
            part = todo[start : start + PICTURES_AT_ONCE]
            read, unreadable = loaded(part, skip_unreadable=skip_unreadable)
            skipped += unreadable
            for (entry, _), boxes in zip(read, boxes_of(source, [image for _, image in read]), strict=True):
                row = record(entry, boxes)
                done[row["image"]] = row
                stream.write(json.dumps(row) + "\n")
            stream.flush()
            advance(len(part))
    ordered = [done[name] for name in map(portable_name, (entry.name for entry in entries)) if name in done]
    lines = [json.dumps({"image": row["image"]} | box) + "\n" for row in ordered for box in row["boxes"]]
    try:
        write_atomically(out, "".join(lines))
        partial.unlink(missing_ok=True)
    except OSError as error:
        raise write_failure(out, error) from error
    return summary(ordered, resumed, skipped)


def check_out(out: Path, *, force: bool) -> None:
    """Raises InputError where `out` cannot be the box file."""
    if out.suffix.lower() != ".jsonl":
        raise InputError(f"--out {out} has the extension {out.suffix!r}; expected .jsonl", code="box-file-extension")
    if out.exists() and (not force or not out.is_file()):
        raise InputError(f"{out} exists; pass --force to replace it, or another --out", code="out-exists")
    if not out.parent.is_dir():
        raise InputError(f"the folder {out.parent} of --out does not exist; make it first", code="out-folder")


def write_failure(path: Path, error: OSError) -> UnavailableError:
    return UnavailableError(
        f"{path} cannot be written ({error.strerror or error}); make room or choose another --out. What was found is "
        "kept: the same command resumes from it",
        code="boxes-not-written",
    )


def stamp_of(entry: ImageEntry) -> list[int]:
    """Size and modification time of a picture's file."""
    try:
        state = entry.path.stat()
    except OSError as error:
        raise ImageError(
            f"{entry.path} cannot be read: {error.strerror}; check the path", code="image-missing"
        ) from error
    return [state.st_size, state.st_mtime_ns]


def record(entry: ImageEntry, boxes: Boxes | None) -> dict[str, Any]:
    """A picture's line in the partial file."""
    rows: list[dict[str, Any]] = []
    boxes = Boxes.empty((1, 1)) if boxes is None else boxes
    for place, corners in enumerate(boxes.xyxy.tolist()):
        row: dict[str, Any] = dict(zip(("x1", "y1", "x2", "y2"), corners, strict=True))
        if boxes.scores is not None:
            row["score"] = float(boxes.scores[place])
        if boxes.labels is not None:
            row["label"] = boxes.labels[place]
        rows.append(row)
    return {"image": portable_name(entry.name), "stamp": stamp_of(entry), "boxes": rows}


def loaded(
    entries: Sequence[ImageEntry], *, skip_unreadable: bool
) -> tuple[list[tuple[ImageEntry, Image]], list[tuple[str, str]]]:
    """The pictures that can be read, and (name, reason) of the others where these are to be skipped."""
    read, skipped = [], []
    for entry in entries:
        try:
            read.append((entry, load_image(entry.path)))
        except ImageError as error:
            if not skip_unreadable:
                raise
            skipped.append((entry.name, str(error)))
    return read, skipped


def finished(
    partial: Path, identity: Mapping[str, Any] | None, entries: Sequence[ImageEntry]
) -> dict[str, dict[str, Any]]:
    """The lines of an interrupted run by name: those of this source, of pictures that are still the same files.

    A source without identity starts over: nobody can say whether it is the same.
    """
    try:
        first, *lines = partial.read_text(encoding="utf-8").split("\n")
        if identity is None or json.loads(first) != {"identity": identity}:
            return {}
    except (OSError, ValueError):  # none, or one whose first line was not finished
        return {}
    wanted = {portable_name(entry.name): entry for entry in entries}
    done: dict[str, dict[str, Any]] = {}
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:  # the line that was being written, and the empty one at the end
            continue
        entry = wanted.get(row["image"])
        with suppress(ImageError):  # gone since: reported when its turn comes
            if entry is not None and stamp_of(entry) == row["stamp"]:
                done[row["image"]] = row
    return done


@contextmanager
def journal(
    partial: Path, identity: Mapping[str, Any] | None, done: Mapping[str, Mapping[str, Any]]
) -> Iterator[TextIO]:
    """The partial file, rewritten with what is already done, and open for more."""
    try:
        rows = "".join(json.dumps(row) + "\n" for row in done.values())
        write_atomically(partial, json.dumps({"identity": identity}) + "\n" + rows)
        with partial.open("a", encoding="utf-8") as stream:
            yield stream
    except OSError as error:
        if error.filename not in (None, str(partial)):
            raise
        raise write_failure(partial, error) from error


def summary(rows: Sequence[Mapping[str, Any]], resumed: int, skipped: Sequence[tuple[str, str]]) -> DetectSummary:
    counts: dict[str, int] = {}
    for row in rows:
        for box in row["boxes"]:
            label = str(box.get("label", ""))
            counts[label] = counts.get(label, 0) + 1
    ordered = dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
    empty = sum(not row["boxes"] for row in rows)
    return DetectSummary(len(rows), sum(counts.values()), empty, resumed, tuple(skipped), ordered)
