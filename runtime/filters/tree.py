"""Conditions on metadata, and what they mean. The meaning stands here; `holds` is it, in Python.

A condition is true or false of an image, never unknown:

- A key that an image lacks is null, and null is no value. `key = null` is true where it is missing.
- `=` is true of values of one type that are equal. Types: string, number (1 and 1.0 are one number), boolean. So
  `year = "2021"` is false of the number 2021, and `true` is not 1.
- `!=` is true exactly where `=` is false; so of images without the key too, and of other types.
- `<`, `<=`, `>` and `>=` compare numbers, and are false of everything else.
- `key in (a, b)` is `key = a or key = b`; `not` is true where what follows is false.

Strings are equal where their code points are: case counts, and composed and decomposed letters differ.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from qpert.runtime.filters.metadata import Metadata, Value

Order = Literal["<", "<=", ">", ">="]


@dataclass(frozen=True)
class OneOf:
    """The key's value equals one of these; of none of them, where `values` is empty. One value is `=`."""

    key: str
    values: tuple[Value, ...]


@dataclass(frozen=True)
class Ordered:
    """The key's value is a number, and so compared with `bound`."""

    key: str
    order: Order
    bound: int | float


@dataclass(frozen=True)
class Missing:
    """The image has no such key: `key = null`."""

    key: str


@dataclass(frozen=True)
class Not:
    part: Condition


@dataclass(frozen=True)
class And:
    parts: tuple[Condition, ...]


@dataclass(frozen=True)
class Or:
    parts: tuple[Condition, ...]


Condition = OneOf | Ordered | Missing | Not | And | Or

ORDERS: dict[Order, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


def type_of(value: Value) -> Literal["string", "number", "boolean"]:
    if isinstance(value, bool):
        return "boolean"
    return "string" if isinstance(value, str) else "number"


def holds(condition: Condition, metadata: Metadata) -> bool:
    """Whether a condition is true of an image with this metadata."""
    match condition:
        case OneOf(key, values):
            value = metadata.get(key)
            return value is not None and any(type_of(value) == type_of(one) and value == one for one in values)
        case Ordered(key, order, bound):
            value = metadata.get(key)
            return isinstance(value, int | float) and not isinstance(value, bool) and ORDERS[order](value, bound)
        case Missing(key):
            return metadata.get(key) is None
        case Not(part):
            return not holds(part, metadata)
        case And(parts):
            return all(holds(part, metadata) for part in parts)
        case Or(parts):
            return any(holds(part, metadata) for part in parts)
