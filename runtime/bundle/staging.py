"""A folder that appears whole or not at all: written aside under another name, then renamed."""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qpert.runtime.bundle.manifest import MANIFEST_NAME
from qpert.runtime.errors import InputError
from qpert.runtime.files import sync_folder


def check_target(target: Path, *, force: bool) -> None:
    """Refuse a target that exists, unless `force` and it is a bundle or empty (so that --force never deletes a home).

    Raises:
        InputError: the target may not be written.
    """
    if not target.exists() and not target.is_symlink():
        return
    if not force:
        raise InputError(f"{target} exists; pass --force to replace it, or another --out", code="out-exists")
    is_bundle = target.is_dir() and not target.is_symlink() and (target / MANIFEST_NAME).is_file()
    is_empty = target.is_dir() and not any(target.iterdir())
    if not (is_bundle or is_empty):
        raise InputError(
            f"{target} exists and is not a bundle; --force replaces bundles only, choose another --out",
            code="out-not-a-bundle",
        )


@contextmanager
def staged_folder(target: Path, *, force: bool) -> Iterator[Path]:
    """A new folder next to `target`, which becomes `target` when the block ends well and is deleted when it does not.

    A process that is killed leaves a folder named `.NAME.partial-PID`; the next export to the same target removes it.
    The manifest is written last, so that only a complete bundle has one.
    """
    check_target(target, force=force)
    with scratch_folder(target) as staging:
        yield staging
        check_target(target, force=force)
        swap_in(staging, target)
        remove_leftovers(target)


@contextmanager
def scratch_folder(target: Path) -> Iterator[Path]:
    """A new folder `.NAME.partial-PID` next to `target`, deleted when the block ends if it is still there. What dead
    processes left for the same target is deleted first.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target)
    staging = target.with_name(f".{target.name}.partial-{os.getpid()}")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        yield staging
    except OSError as error:
        if error.errno is not None and error.filename is None:  # a write that failed does not say where
            error.filename = str(target)
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def swap_in(staging: Path, target: Path) -> None:
    """Rename `staging` to `target`; what was there is moved aside first and deleted last."""
    old = target.with_name(f".{target.name}.replaced-{os.getpid()}")
    if target.exists():
        target.rename(old)
    try:
        staging.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    sync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove_leftovers(target: Path) -> None:
    """Delete what exports to `target` whose process no longer runs have left: staging folders, and once a bundle stands
    at `target`, those that it replaced.
    """
    kinds = ("partial", "replaced") if target.exists() else ("partial",)
    found = [path for kind in kinds for path in target.parent.glob(f".{glob.escape(target.name)}.{kind}-*")]
    for leftover in found:
        owner = leftover.name.rpartition("-")[2]
        if owner.isdigit() and not process_runs(int(owner)):
            shutil.rmtree(leftover, ignore_errors=True)


def process_runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
