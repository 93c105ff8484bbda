"""Data that lies beside the repository and is not part of it: `../shared`, or the folder that QPERT_SHARED names."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def shared_folder(part: str) -> Path:
    """`part` of the shared folder; the test is skipped where that is not there."""
    root = Path(os.environ.get("QPERT_SHARED") or Path(__file__).parents[2] / "shared")
    folder = root / part
    if not folder.exists():
        pytest.skip(f"{folder} is not here; QPERT_SHARED can name the shared folder")
    return folder
