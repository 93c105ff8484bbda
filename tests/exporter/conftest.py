"""Fixtures shared by the tests that compare with stock LAVIS."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import lavis_models
import pytest

from qpert.exporter.families.blip2.reference_lavis import ENVIRONMENT
from qpert.runtime.errors import UnavailableError


@pytest.fixture(scope="session")
def lavis_folder(made_once: Callable) -> Path:
    """Folders `eva`, `clip` and `stage1`, made by stock LAVIS (see lavis_models.py); skips where LAVIS is not."""
    try:
        python = ENVIRONMENT.python()
    except UnavailableError as error:
        pytest.skip(str(error))
    return made_once("lavis-models", lambda folder: lavis_models.generate(python, folder))
