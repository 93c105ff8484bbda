"""Text files that users bring: a list of images, a file of texts, JSON a line."""

from __future__ import annotations

from pathlib import Path

from qpert.runtime.errors import InputError


def text_lines(path: Path, what: str) -> list[str]:
    """The lines of a UTF-8 file, with or without a byte-order mark; `what` is what the error calls it.

    Lines end at a line feed, or carriage return and line feed, and nowhere else: form feeds, U+0085 and U+2028, at
    which `str.splitlines` cuts, are characters of a file's name or of a caption.

    Raises `InputError` (`text-file`) for what cannot be read as UTF-8.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{what} cannot be read as UTF-8 text: {error}", code="text-file") from error
    return [line.removesuffix("\r") for line in text.split("\n")]
