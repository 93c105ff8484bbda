"""Which files a bundle may name: those inside it, and in the cache of the Hugging Face hub those that it links to."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from qpert.runtime.errors import BundleError

HUB_REPOSITORY = re.compile(r"(models|datasets|spaces)--.+")
"""A repository's folder in the hub's cache: `models--owner--name`, which holds `snapshots/<revision>/…` of links into
`blobs/`. Source: "Understand caching" in the documentation of huggingface_hub."""


def bundle_path(folder: Path, name: str) -> Path:
    """The path of a bundle's file, which must be inside the bundle, links followed.

    In the hub's cache a bundle is a folder of links to files in `blobs/` of the same repository: these count as inside.

    Raises:
        BundleError: `name` is absolute, climbs out with `..` (code `bundle-path`), or a link leads out of the bundle
            (code `bundle-link`).
    """
    relative = PurePosixPath(name)
    if not name or relative.is_absolute() or ".." in relative.parts or "\\" in name or ":" in name:
        raise BundleError(
            f"the manifest names {name!r}, which is outside the bundle {folder}; do not trust this bundle",
            code="bundle-path",
        )
    path = folder / relative
    try:
        path.exists()  # raises where no such path can be
        inside = is_inside(path.resolve(), folder.resolve())
    except (OSError, RuntimeError, ValueError):  # a name too long, links in a circle, a null byte
        inside = False
    if not inside:
        raise BundleError(
            f"the manifest names {name!r}, which is outside the bundle {folder}: a link there leads out of it; do not "
            "trust this bundle. If you made the links yourself, copy the files in their place (`cp -rL`)",
            code="bundle-link",
        )
    return path


def is_inside(path: Path, folder: Path) -> bool:
    """Whether a file belongs to the bundle in `folder`; both are resolved."""
    if path.is_relative_to(folder):
        return True
    blobs = hub_blobs(folder)
    return blobs is not None and path.is_relative_to(blobs)


def hub_blobs(folder: Path) -> Path | None:
    """The hub's folder of file contents for a bundle in `models--x/snapshots/<revision>` or below; None elsewhere."""
    for snapshots in folder.parents:
        repository = snapshots.parent
        if snapshots.name == "snapshots" and HUB_REPOSITORY.fullmatch(repository.name):
            blobs = repository / "blobs"
            return blobs if blobs.resolve() == blobs else None  # a link of that name could lead anywhere
    return None
