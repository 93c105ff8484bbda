"""Conditions as SQLite's WHERE, on the table `field` of a gallery's catalogue."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from qpert.runtime.filters.metadata import Value
from qpert.runtime.filters.tree import And, Condition, Missing, Not, OneOf, Or, Ordered, type_of

Sql = tuple[str, list[Any]]
"""A boolean expression with placeholders, and their values in order."""


def where_sql(condition: Condition) -> Sql:
    """True of the rows of `image` of which the condition is; a question mark for each value.

    Every part asks for rows of `field` (image, key, type, value), so nothing is ever NULL; values are bound, and
    compared only with values of their own type.
    """
    match condition:
        case OneOf(key, values):
            groups: dict[str, list[Value]] = defaultdict(list)
            for value in values:
                groups[type_of(value)].append(value)
            parts = [fields(key, kind, f"value IN ({marks(len(ones))})", ones) for kind, ones in groups.items()]
            return joined("OR", parts) if parts else ("0", [])
        case Ordered(key, order, bound):
            return fields(key, "number", f"value {order} ?", [bound])
        case Missing(key):
            return "image.row NOT IN (SELECT image FROM field WHERE key = ?)", [key]
        case Not(part):
            text, values_ = where_sql(part)
            return f"NOT {text}", values_
        case And(parts_):
            return joined("AND", [where_sql(part) for part in parts_])
        case Or(parts_):
            return joined("OR", [where_sql(part) for part in parts_])


def fields(key: str, kind: str, comparison: str, values: list[Value]) -> Sql:
    return f"image.row IN (SELECT image FROM field WHERE key = ? AND type = ? AND {comparison})", [key, kind, *values]


def joined(word: str, parts: list[Sql]) -> Sql:
    return "(" + f" {word} ".join(text for text, _ in parts) + ")", [value for _, values in parts for value in values]


def marks(count: int) -> str:
    return ", ".join("?" * count)
