"""The model families that can be exported, one folder each, and their table."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from importlib.metadata import entry_points

from qpert.exporter.families.base import Family
from qpert.runtime.errors import InputError

FAMILIES: Mapping[str, str] = {
    "blip2": "qpert.exporter.families.blip2.family:FAMILY",
    "clip": "qpert.exporter.families.clip.family:FAMILY",
    "coca": "qpert.exporter.families.coca.family:FAMILY",
    "siglip": "qpert.exporter.families.siglip.family:FAMILY",
}
"""Name → location of its `Family` object. A new family is one row here and two folders."""

ENTRY_POINTS = "qpert.families"
"""The entry-point group in which other packages register families: `name = "package.module:OBJECT"`."""


def family_names() -> tuple[str, ...]:
    """Names of this package's families, then of other packages'."""
    others = {entry.name for entry in entry_points(group=ENTRY_POINTS)} - FAMILIES.keys()
    return (*FAMILIES, *sorted(others))


def find_family(name: str) -> Family:
    """The family of that name.

    Raises:
        InputError: no family has that name.
    """
    if name in FAMILIES:
        module, _, attribute = FAMILIES[name].partition(":")
        family: Family = getattr(importlib.import_module(module), attribute)
        return family
    for entry in entry_points(group=ENTRY_POINTS, name=name):
        other: Family = entry.load()
        return other
    raise InputError(
        f"unknown model family {name!r}, expected one of {', '.join(family_names())}; other packages can add "
        f"families through the entry point group {ENTRY_POINTS}",
        code="family-unknown",
    )
