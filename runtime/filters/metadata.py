"""What is known of an image besides its pixels: a name for each value, and values that every engine compares alike."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from qpert.runtime.errors import InputError

Value = str | int | float | bool
"""Of metadata, and of a filter. Null is no value: what is null is not there."""
Metadata = Mapping[str, Value]

WORDS = frozenset({"and", "or", "not", "in", "null", "true", "false"})
"""What the grammar of filters means, in whatever case; no key."""
KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
LARGEST_WHOLE = 2**53
"""Whole numbers up to here are float64 exactly, which Qdrant compares in."""
LONGEST_STRING = 10_000
MOST_KEYS = 64


def checked_metadata(values: Mapping[str, Any], what: str) -> dict[str, Value]:
    """The metadata of one image, without keys that are null. `what` is what an error calls the image.

    Raises:
        InputError: of code `metadata`: a key that a filter could not name, or a value that is no string, number or
            boolean.
    """
    if len(values) > MOST_KEYS:
        raise InputError(f"{what} has {len(values)} metadata keys, expected at most {MOST_KEYS}", code="metadata")
    found = {}
    for key, value in values.items():
        if not isinstance(key, str) or not is_key(key):
            raise InputError(
                f"{what} has the metadata key {key!r:.80}; expected up to 64 letters of A to Z, digits and "
                f"underscores, not a digit first, and none of {', '.join(sorted(WORDS))}",
                code="metadata",
            )
        if value is not None:
            if (trouble := trouble_of(value)) is not None:
                raise InputError(f"{what} has metadata {key} = {value!r:.80}; {trouble}", code="metadata")
            found[key] = value
    return found


def is_key(key: str) -> bool:
    """Whether a filter can name this key."""
    return KEY.fullmatch(key) is not None and key.lower() not in WORDS


def trouble_of(value: object) -> str | None:
    """Why a value cannot be stored or compared, or None."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return None if abs(value) <= LARGEST_WHOLE else f"expected whole numbers within ±{LARGEST_WHOLE}"
    if isinstance(value, float):
        return None if math.isfinite(value) else "expected a finite number"
    if not isinstance(value, str):
        return "expected a string, a number, true, false or null"
    if len(value) > LONGEST_STRING:
        return f"expected a string of at most {LONGEST_STRING:,} characters"
    if any(letter == "\0" or 0xD800 <= ord(letter) < 0xE000 for letter in value):
        return "expected a string without NUL characters and lone surrogates"
    return None


def metadata_json(metadata: Metadata) -> str:
    """One text for equal metadata: keys in order. `1` and `1.0` stay apart: who reads them gets what was stored."""
    return json.dumps(dict(metadata), sort_keys=True)
