"""Reopens the checkpoint that a bundle was exported from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from qpert.exporter.checkpoints.checkpoint import Checkpoint, no_progress
from qpert.exporter.families.base import Family
from qpert.runtime.bundle.manifest import Manifest
from qpert.runtime.errors import InputError


@contextmanager
def reopened(family: Family, manifest: Manifest, checkpoint: str | None) -> Iterator[Checkpoint]:
    """The exported weights, at the bundle's image size. `checkpoint`: their current location.

    Raises:
        InputError: the checkpoint is not the one that was exported.
        CheckpointError, UnavailableError: it cannot be opened.
    """
    source, options = family.reopening(manifest, checkpoint)
    size = manifest.preprocessing.size
    with family.open(source, image_size=size, options=options, progress=no_progress) as opened:
        check_same(opened, manifest)
        yield opened


def check_same(checkpoint: Checkpoint, manifest: Manifest) -> None:
    """Raises InputError if the weights are not those that were exported."""
    found, exported = checkpoint.record.sha256, manifest.checkpoint.sha256
    if found != exported:
        raise InputError(
            f"the checkpoint {checkpoint.record.source} has SHA-256 {found}, the bundle was exported from "
            f"{manifest.checkpoint.source} with {exported}; pass that one as --checkpoint",
            code="checkpoint-differs",
        )
