"""The published JSON Schemas of manifests, and checking a manifest against them.

`manifest.schema.json` and `detector.schema.json` (draft 7) are made from the dataclasses by
`tools/manifest_schema.py`; a test keeps them up to date. What a schema cannot say (that roles are complete, that paths
stay inside the bundle, that axes have ranges) the reader checks afterwards.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from importlib.resources import files
from typing import Any

MANIFEST, DETECTOR_MANIFEST = "manifest", "detector"


def read_schema(name: str) -> dict[str, Any]:
    """The schema `MANIFEST` or `DETECTOR_MANIFEST`."""
    text = files("qpert.runtime.bundle").joinpath(f"{name}.schema.json").read_text(encoding="utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema


def check_against(name: str, values: Mapping[str, Any]) -> None:
    """Raises ValueError, with the place in the document, where `values` does not follow the schema `name`."""
    from fastjsonschema import JsonSchemaValueException

    try:
        _validator(name)(values)
    except JsonSchemaValueException as error:
        shown = error.message.removeprefix("data").lstrip(".")
        raise ValueError(f"{shown}, got {error.value!r:.80}") from None


@cache
def _validator(name: str) -> Callable[[Mapping[str, Any]], object]:
    from fastjsonschema import compile as compile_schema

    validator: Callable[[Mapping[str, Any]], object] = compile_schema(read_schema(name), use_default=False)
    return validator
