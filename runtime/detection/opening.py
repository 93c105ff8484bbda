"""Opening a folder that may be a bundle for search or a detector."""

from __future__ import annotations

from pathlib import Path

from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.bundle.manifest import is_detector, manifest_values
from qpert.runtime.detection.bundle import DetectorBundle


def open_bundle(folder: str | Path) -> Bundle | DetectorBundle:
    """The `Bundle` or `DetectorBundle` at `folder`, hashes checked. Raises BundleError where there is neither."""
    if isinstance(folder, str | Path) and Path(folder).is_dir() and is_detector(manifest_values(Path(folder))):
        return DetectorBundle.open(folder)
    return Bundle.open(folder)
