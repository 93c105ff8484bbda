"""Numbers that users write as text."""

from __future__ import annotations


def parse_float(text: str) -> float:
    """The number that `text` writes in ASCII, without digit groups. Raises ValueError.

    Python's own `float` takes more than people mean: `1_0` for 10, and the digits of other scripts.
    """
    return float(_plain(text))


def parse_int(text: str) -> int:
    """As `parse_float`, for whole numbers."""
    return int(_plain(text))


def _plain(text: str) -> str:
    if "_" in text or not text.isascii():
        raise ValueError(f"{text!r} is not a plain decimal number")
    return text
