"""Fixtures shared by the tests that compare with stock LAVIS and stock open_clip."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import coca_models
import lavis_models
import pytest

from qpert.exporter.families.blip2.reference_lavis import ENVIRONMENT
from qpert.exporter.families.coca.reference_open_clip import ENVIRONMENT as OPEN_CLIP
from qpert.runtime.errors import UnavailableError


@pytest.fixture(scope="session")
def lavis_folder(made_once: Callable) -> Path:
    """Folders `eva`, `clip` and `stage1`, made by stock LAVIS (see lavis_models.py); skips where LAVIS is not."""
    try:
        python = ENVIRONMENT.python()
    except UnavailableError as error:
        pytest.skip(str(error))
    return made_once("lavis-models", lambda folder: lavis_models.generate(python, folder))


@pytest.fixture(scope="session")
def open_clip_python() -> Path:
    """The interpreter of the open_clip environment; skips where it is not."""
    try:
        return OPEN_CLIP.python()
    except UnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def coca_folder(made_once: Callable, open_clip_python: Path) -> Path:
    """Folders `a`, `b` and `c`, made by stock open_clip (see coca_models.py)."""
    return made_once("coca-models", lambda folder: coca_models.generate(open_clip_python, folder))
