"""Downloads of weights: a single file with resume, and a Hugging Face repository through huggingface-hub.

A file is downloaded as `NAME.part`, which the next attempt or the next run resumes; it is renamed only when its length
is right. `NAME.part.json` records which version of the file it belongs to.
"""

from __future__ import annotations

import http.client
import json
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qpert.runtime.errors import CheckpointError, UnavailableError
from qpert.runtime.files import sha256_of, sync_folder, write_atomically
from qpert.runtime.libraries import turn_off_telemetry

CHUNK = 1 << 20
HUB_FILES = ("*.safetensors", "*.safetensors.index.json", "config.json", "preprocessor_config.json", "tokenizer.json",
             "tokenizer_config.json", "vocab.txt", "README.md")  # fmt: skip

Progress = Callable[[str, int, int | None], None]
"""progress(what, bytes done, total bytes or None)."""


@dataclass(frozen=True)
class Version:
    """The file that a `.part` belongs to, as the server described it."""

    url: str
    total: int | None
    etag: str | None


class InterruptedDownloadError(Exception):
    """An attempt failed in a way that a retry may fix."""


class FileChangedError(InterruptedDownloadError):
    """The server has another version of the file than the `.part`."""


def download(
    url: str, target: Path, *, progress: Progress, attempts: int = 5, pause: float = 1.0, timeout: float = 30.0
) -> Path:
    """Download `url` to `target`, resuming an earlier attempt, and record its SHA-256 in `TARGET.sha256`.

    Args:
        progress: progress(what, bytes done, total bytes or None).
        attempts: consecutive attempts without new data before giving up.
        pause: seconds before the second attempt, doubled for each further one.
        timeout: seconds without data after which a connection counts as broken.

    Raises:
        UnavailableError: no network, or the server does not send the whole file.
    """
    part = target.with_name(target.name + ".part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        fetch_with_retries(url, part, progress, attempts, pause, timeout)
        finish(part, target, progress)
    except InterruptedDownloadError as error:
        raise unavailable(url, target, f"{error}, after {attempts} attempts without new data") from error
    except urllib.error.HTTPError as error:
        raise unavailable(url, target, f"the server answered {error.code} {error.reason}") from error
    except OSError as error:
        raise unavailable(url, target, f"it cannot be written ({error})") from error
    return target


def fetch_with_retries(url: str, part: Path, progress: Progress, attempts: int, pause: float, timeout: float) -> None:
    """Fetch until `part` is complete; give up after `attempts` consecutive attempts without new data."""
    failures = 0
    while True:
        before = size_of(part)
        try:
            return fetch_part(url, part, progress, timeout)
        except InterruptedDownloadError as error:
            failures = 1 if size_of(part) > before else failures + 1
            if isinstance(error, FileChangedError):
                part.unlink(missing_ok=True)
            if failures >= attempts:
                raise
            time.sleep(pause * 2 ** (failures - 1))


def unavailable(url: str, target: Path, reason: str) -> UnavailableError:
    return UnavailableError(
        f"cannot download {url}: {reason}. What has arrived is kept: run the command again to "
        f"resume, or download the file on another machine and copy it to {target}",
        code="download-failed",
    )


def size_of(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def fetch_part(url: str, part: Path, progress: Progress, timeout: float) -> None:
    """One connection: complete `part`, from its current length if the server supports ranges.

    Raises:
        InterruptedDownloadError: the connection failed, or the server did for now.
        HTTPError: the server refused permanently.
    """
    known, start = read_version(part), size_of(part)
    if known is None or known.url != url:
        start = 0
    if known and start and start == known.total:
        return
    try:
        with urllib.request.urlopen(request_from(url, start, known), timeout=timeout) as reply:
            start, version = start_of_reply(url, reply, start, known)
            remember_version(part, version)
            append(reply, part, start, version.total, progress)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing from there on: the part is of another version
            raise FileChangedError("the server has another version of the file") from error
        if error.code < 500 and error.code not in (408, 429):
            raise
        raise InterruptedDownloadError(f"the server answered {error.code} {error.reason}") from error
    except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError) as error:
        raise InterruptedDownloadError(f"no connection ({getattr(error, 'reason', None) or error!r})") from error
    if version.total is not None and size_of(part) != version.total:
        raise InterruptedDownloadError(f"the connection was lost at {size_of(part):,} of {version.total:,} bytes")


def request_from(url: str, start: int, known: Version | None) -> urllib.request.Request:
    """A request for the bytes from `start`; `If-Range` makes the server send the whole file if it has changed."""
    request = urllib.request.Request(url, headers={"User-Agent": "qpert", "Accept-Encoding": "identity"})
    if start:
        request.add_header("Range", f"bytes={start}-")
        if known and known.etag and not known.etag.startswith("W/"):
            request.add_header("If-Range", known.etag)
    return request


def start_of_reply(url: str, reply: Any, start: int, known: Version | None) -> tuple[int, Version]:
    """The offset in the file of a reply's first byte, and the file's version."""
    etag, length = reply.headers.get("ETag"), reply.headers.get("Content-Length")
    if reply.status != 206:  # the whole file: the server does not support ranges, or the file has changed
        return 0, Version(url, int(length) if length else None, etag)
    unit_range, _, total = (reply.headers.get("Content-Range") or "").partition("/")
    version = Version(url, int(total) if total.isdigit() else None, etag)
    changed = known is None or known.total != version.total or known.etag != etag
    if changed or not unit_range.startswith(f"bytes {start}-"):
        raise FileChangedError("the server has another version of the file")
    return start, version


def append(reply: Any, part: Path, start: int, total: int | None, progress: Progress) -> None:
    """Write a reply's body to `part`, starting at `start`."""
    with part.open("r+b" if start else "wb") as stream:
        stream.seek(start)
        stream.truncate()
        while chunk := reply.read(CHUNK):
            stream.write(chunk)
            progress(f"downloading {part.stem}", stream.tell(), total)


def version_file(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def read_version(part: Path) -> Version | None:
    try:
        return Version(**json.loads(version_file(part).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def remember_version(part: Path, version: Version) -> None:
    write_atomically(version_file(part), json.dumps(asdict(version)))


def finish(part: Path, target: Path, progress: Progress) -> None:
    """Write the hash in the format of `sha256sum`, then rename a complete part."""
    done, total = 0, size_of(part)

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        progress(f"hashing {target.name}", done, total)

    digest = sha256_of(part, on_bytes=on_bytes)
    write_atomically(target.with_name(target.name + ".sha256"), f"{digest}  {target.name}\n")
    part.replace(target)
    version_file(part).unlink(missing_ok=True)
    sync_folder(target.parent)


def download_snapshot(repository: str, files: Collection[str] = HUB_FILES) -> Path:
    """The folder of a Hugging Face repository in huggingface-hub's cache, downloaded if necessary.

    `files`: patterns of the files to download.

    Raises:
        UnavailableError: huggingface-hub is not installed, or there is no network and no cached copy.
        CheckpointError: the repository does not exist or is not accessible.
    """
    turn_off_telemetry()
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise UnavailableError(
            f"{repository} is not a local file or folder, and downloading it as a Hugging Face id needs "
            f"huggingface-hub ({error}): pip install 'qpert[hf]'",
            code="hf-extra-missing",
        ) from error
    try:
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=list(files)))
    except (errors.RepositoryNotFoundError, errors.HFValidationError, errors.RevisionNotFoundError) as error:
        raise CheckpointError(
            f"{repository} is neither a local file or folder nor an accessible repository on huggingface.co "
            f"({type(error).__name__}); check the spelling, or log in with `hf auth login` if it is private",
            code="hub-repository-not-found",
        ) from error
    except Exception as error:
        raise UnavailableError(
            f"{repository} is not a local file or folder, and cannot be downloaded from huggingface.co "
            f"({first_line(error)}). On a machine with a network run `hf download {repository} --local-dir DIR`, "
            "copy the folder here and pass it as --checkpoint DIR",
            code="hub-download-failed",
        ) from error


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
