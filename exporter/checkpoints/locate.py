"""`--checkpoint`: a published name, a file, a Hugging Face folder or id."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from qpert.exporter.checkpoints.download import HUB_FILES, download_snapshot
from qpert.runtime.errors import CheckpointError

FILE_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".safetensors")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w][\w.-]*")
HUB_URL = "https://huggingface.co/"


@dataclass(frozen=True)
class Located:
    """What `--checkpoint` names. Exactly one of `published`, `file` and `folder` is set.

    `name`: the bundle's name for it. `source`: where it came from.
    """

    name: str
    source: str
    published: str | None = None
    file: Path | None = None
    folder: Path | None = None


def locate(source: str, published: Collection[str], expected: str, *, files: Collection[str] = HUB_FILES) -> Located:
    """Find `source`, downloading a hub repository if it is an id.

    Args:
        published: names that the family knows.
        expected: the kinds of checkpoint that the family reads, for the message.
        files: patterns of the files that the family needs from a hub repository.

    Raises:
        CheckpointError: nothing has that name.
        UnavailableError: the hub cannot be reached.
    """
    if source in published:
        return Located(source, source, published=source)
    try:
        path = Path(source).expanduser()
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, RuntimeError) as error:  # a parent folder without access, a name too long, ~nobody
        raise CheckpointError(
            f"{source} cannot be read ({error}); check its name and permissions", code="checkpoint-unreadable"
        ) from error
    if is_folder:
        return Located(path.resolve().name, str(path), folder=path)
    if exists or path.suffix in FILE_SUFFIXES:
        return Located(path.stem, source, file=path)
    if HUB_ID.fullmatch(source):
        return Located(source, HUB_URL + source, folder=download_snapshot(source, files))
    names = f"one of {', '.join(published)}, " if published else ""
    raise CheckpointError(
        f"{source!r} is not a checkpoint: no file or folder has that name; expected {names}{expected}",
        code="checkpoint-not-found",
    )
