"""Drivers of engines: loaded when an engine is used, and named where they are missing."""

from __future__ import annotations

import importlib
from typing import Any

from qpert.runtime.errors import UnavailableError


def load(module: str, purpose: str, extra: str) -> Any:
    """A driver's module. Raises UnavailableError with what to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UnavailableError(
            f"{purpose} needs {module.partition('.')[0]}, which cannot be loaded here ({error}); pip install "
            f"'qpert[{extra}]'",
            code="missing-extra",
        ) from error
