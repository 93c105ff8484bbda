"""Small file habits that every command shares: hashing with progress, and writing whole or not at all."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from qpert.runtime.errors import InputError

CHUNK = 1 << 22


def sha256_of(path: Path, *, on_bytes: Callable[[int], None] | None = None) -> str:
    """Hexadecimal SHA-256 of a file; `on_bytes` hears how many bytes each step read."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
            if on_bytes is not None:
                on_bytes(len(chunk))
    return digest.hexdigest()


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader, or a crash, finds the old content or the new one, never a part."""
    # A file name that is no text (a lone surrogate in Python) is written `\udcff`, which is what JSON calls it too.
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def portable_name(name: str) -> str:
    """A file name as text that can be stored: what it says in UTF-8, with bytes that are no UTF-8 as `\\xff`.

    Python makes lone surrogates of bytes that it cannot decode, such as those of any name that is not ASCII under
    `LC_ALL=C`. Text without them comes back as it is.

    Raises:
        InputError: it holds other lone surrogates, which no file name has.
    """
    return name_bytes(name).decode("utf-8", "backslashreplace")


def local_path(path: str | Path) -> Path:
    """The path under which this process finds a file whose name is given as text or as the system gave it.

    Under `LC_ALL=C` Python cannot turn `ä` into the bytes of a name, only the surrogates that it makes of those bytes.

    Raises:
        InputError: as `portable_name`.
    """
    return Path(os.fsdecode(name_bytes(str(path))))


def name_bytes(name: str) -> bytes:
    try:
        return name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise InputError(
            f"got the file name {name!a}, which is not valid Unicode; rename it", code="file-name"
        ) from error


def sync_folder(folder: Path) -> None:
    """Make the renames in `folder` durable (a no-op where folders cannot be opened, as on Windows)."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cache_folder() -> Path:
    """Where qpert keeps what can be made again: `$QPERT_CACHE`, else `$XDG_CACHE_HOME/qpert`, else `~/.cache/qpert`."""
    if chosen := os.environ.get("QPERT_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qpert"
