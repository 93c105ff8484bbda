"""Where reports are written: into their bundle, and to a copy where the user asks for one."""

from __future__ import annotations

import datetime
import json
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.errors import InputError
from qpert.runtime.files import write_atomically
from qpert.runtime.progress import Progress

LIBRARIES = ("qpert", "onnxruntime", "onnxruntime-gpu", "torch", "transformers", "numpy", "pillow", "tokenizers")


def environment(bundle: Bundle, provider: str) -> dict[str, str]:
    """Machine, versions and checkpoint of a measurement."""
    found = {"machine": platform.machine(), "system": platform.platform(), "python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return found | {"provider": provider, "checkpoint": bundle.manifest.checkpoint.name, "when": now}


def json_text(document: object) -> str:
    """A document as JSON, as stored in a bundle."""
    return json.dumps(document, indent=1) + "\n"


def keep_reports(
    bundle: Bundle, reports: Mapping[str, str], progress: Progress, *, verification: dict[str, object] | None = None
) -> None:
    """`Bundle.add_reports`; for a bundle that cannot be written (a read-only deployment) only report that."""
    try:
        bundle.add_reports(reports, verification=verification)
    except OSError as error:
        progress.say(f"the report was not saved: {bundle.folder} cannot be written ({error})")


def write_copy(option: str, path: Path | None, content: str) -> None:
    """Write a report to the `path` given with `option`, if any.

    Raises:
        InputError: it cannot be written there.
    """
    if path is None:
        return
    try:
        if path.is_symlink() or (path.exists() and not path.is_file()):  # /dev/stdout or a pipe: do not replace it
            path.write_text(content, encoding="utf-8")
        else:
            write_atomically(path, content)
    except OSError as error:
        raise InputError(
            f"{option} {path} cannot be written ({error.strerror or error}); choose another file", code="report-copy"
        ) from error
