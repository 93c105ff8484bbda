"""Values in box files: text, JSON, numbers, identifiers, and notes on what a reader left out or changed."""

from __future__ import annotations

import json
import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qpert.runtime.errors import BoxError, QpertWarning
from qpert.runtime.inputs.box_table import BoxRow
from qpert.runtime.inputs.boxes import BAD_BOX
from qpert.runtime.inputs.numbers import parse_float

SHOWN = 3
"""Places that a warning names."""


@dataclass
class Notes:
    """What reading one file (or folder) left out or changed, by sentence, with the places where.

    With `skip_bad_boxes`, `row` notes a box that cannot be used instead of raising.
    """

    skip_bad_boxes: bool = False
    places: dict[str, list[str]] = field(default_factory=dict)
    boxes: int = 0

    def add(self, sentence: str, place: str) -> None:
        """`sentence` is the rest of "3 of 9 boxes …", the same for each of its places."""
        self.places.setdefault(sentence, []).append(place)

    def row(self, make: Callable[[], BoxRow | None]) -> list[BoxRow]:
        """The row that `make` gives; none where there is no box, or a bad one is to be left out."""
        self.boxes += 1
        try:
            row = make()
        except BoxError as error:
            if error.code not in BAD_BOX:
                raise
            if not self.skip_bad_boxes:
                hint = "correct the box, or leave out what cannot be used with --skip-bad-boxes"
                raise BoxError(f"{error}; {hint}", code=error.code) from error
            self.add("cannot be used and are left out (--skip-bad-boxes)", str(error))
            return []
        return [] if row is None else [row]

    def warn(self, source: str, stacklevel: int) -> None:
        """One `QpertWarning` for each sentence."""
        for sentence, places in self.places.items():
            more = f" and {len(places) - SHOWN} more" if len(places) > SHOWN else ""
            count = f"{len(places)} of {self.boxes} boxes"
            message = f"{source}: {count} {sentence}: {'; '.join(places[:SHOWN])}{more}"
            warnings.warn(message, QpertWarning, stacklevel=stacklevel + 1)


def text_of(path: Path) -> str:
    """The text of a UTF-8 file, with or without a byte-order mark."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BoxError(f"{path} is not UTF-8 text: {error}", code="box-file-text") from error
    except OSError as error:
        raise BoxError(f"cannot read {path}: {error.strerror}", code="box-file-missing") from error


def json_of(text: str, source: str) -> Any:
    """JSON in which no object has a key twice: of two values, the file does not say which is meant."""
    try:
        return json.loads(text, object_pairs_hook=unique_object)
    except (ValueError, RecursionError) as error:
        raise BoxError(f"{source} is not JSON: {error}", code="box-file-json") from error


def unique_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads`: raises `ValueError` where an object has one key twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"an object has the key {repeated(key for key, _ in pairs)[0]!r} twice")
    return found


def repeated(values: Any) -> list[Any]:
    """The values that occur more than once."""
    return [value for value, count in Counter(values).items() if count > 1]


def object_of(value: Any, source: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise BoxError(f"{source} is a {type(value).__name__}; expected a JSON object", code="box-file-entry")
    return value


def entry_of(values: Mapping[str, Any], key: str, source: str, *, code: str = "box-file-entry") -> Any:
    if key not in values:
        has = ", ".join(map(str, values)) or "nothing"
        raise BoxError(f"{source} lacks {key!r}; it has {has}", code=code)
    return values[key]


def identifier(value: Any, source: str) -> int | str:
    """A string or a whole number. Some tools write numbers through floats: 139.0 is 139."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise BoxError(f"{source} is {value!r}; expected a whole number or a string", code="box-identifier")
    return value


def image_name(value: Any, source: str) -> str:
    name = str(identifier(value, f"{source}: the image's name")).strip(" \t\r\n")
    if not name:
        raise BoxError(f"{source}: the image's name is empty", code="box-identifier")
    return name


def number(value: Any, source: str, *, parse: bool = False) -> float:
    """A finite number. `parse`: it is written as text."""
    try:
        if isinstance(value, bool) or not isinstance(value, str if parse else (int, float)):
            raise TypeError
        found = parse_float(value) if isinstance(value, str) else float(value)
    except (TypeError, ValueError, OverflowError):
        raise BoxError(f"{source} is {value!r}; expected a number", code="box-number") from None
    if not math.isfinite(found):
        raise BoxError(f"{source} is {found}; expected a finite number", code="box-number")
    return found


def score(value: Any, source: str, *, parse: bool = False) -> float | None:
    return None if value is None else number(value, f"{source}: score", parse=parse)


def stated_size(width: Any, height: Any) -> tuple[int, int] | None:
    """A size that a file states; 0 is how annotation tools write that they do not know."""
    return (width, height) if isinstance(width, int) and isinstance(height, int) and min(width, height) > 0 else None


Corners = tuple[float, float, float, float]

TURNED = "are rotated, and are taken as the smallest upright boxes around the rotated ones"


def upright_corners(centre: tuple[float, float], size: tuple[float, float], radians: float) -> Corners:
    """The smallest upright box (x1, y1, x2, y2) around a box of `size` (width, height) turned about its centre."""
    cosine, sine = abs(math.cos(radians)), abs(math.sin(radians))
    width, height = size[0] * cosine + size[1] * sine, size[0] * sine + size[1] * cosine
    x, y = centre
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def turned(corners: Corners, degrees: float) -> Corners:
    """As `upright_corners`, of an upright box that is turned about its centre: CVAT's `rotation`."""
    x1, y1, x2, y2 = corners
    return upright_corners(((x1 + x2) / 2, (y1 + y2) / 2), (x2 - x1, y2 - y1), math.radians(degrees))
