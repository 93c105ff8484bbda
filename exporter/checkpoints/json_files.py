"""Reads JSON files of a Hugging Face folder; errors name the file and the key."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qpert.runtime.errors import CheckpointError


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in `path`.

    Raises:
        CheckpointError: `hub-file-missing`, or `hub-file-unreadable` for what is not a JSON object.
    """
    if not path.is_file():
        folder = path.parent
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:10]) if folder.is_dir() else ""
        raise CheckpointError(
            f"{folder} has no {path.name} (it has {found or 'nothing'}); download the whole folder",
            code="hub-file-missing",
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}); download it again", code="hub-file-unreadable") from error
    if not isinstance(values, dict):
        raise CheckpointError(
            f"{path} holds a {type(values).__name__}, expected an object; download it again",
            code="hub-file-unreadable",
        )
    return values


def whole_number(where: str, values: Mapping[str, Any], key: str) -> int:
    """`values[key]`, at least 1. Raises CheckpointError (`hub-config-value`)."""
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(
            f"{where} has {key} {value!r}, expected a whole number of at least 1; correct or download it again",
            code="hub-config-value",
        )
    return value


def positive_number(where: str, values: Mapping[str, Any], key: str) -> float:
    """`values[key]`, above 0. Raises CheckpointError (`hub-config-value`)."""
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise CheckpointError(
            f"{where} has {key} {value!r}, expected a number above 0; correct or download it again",
            code="hub-config-value",
        )
    return float(value)
