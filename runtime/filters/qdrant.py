"""Conditions as Qdrant's filters, in the JSON of its REST interface."""

from __future__ import annotations

from typing import Any

from qpert.runtime.filters.metadata import Value
from qpert.runtime.filters.tree import And, Condition, Missing, Not, OneOf, Or, Ordered, type_of

Filter = dict[str, Any]
FIELD = "metadata."
"""Where an image's metadata lie in its payload."""
BOUNDS = {"<": "lt", "<=": "lte", ">": "gt", ">=": "gte"}


def qdrant_filter(condition: Condition) -> Filter:
    """A filter, or one condition of a filter. Numbers are compared by ranges, which take whole numbers and others
    alike; `match` takes whole numbers alone. `is_empty` is true of what is missing."""
    match condition:
        case OneOf(key, values):
            return {"should": [equal(key, value) for value in values]} if values else {"has_id": []}
        case Ordered(key, order, bound):
            return {"key": FIELD + key, "range": {BOUNDS[order]: bound}}
        case Missing(key):
            return {"is_empty": {"key": FIELD + key}}
        case Not(part):
            return {"must_not": [qdrant_filter(part)]}
        case And(parts):
            return {"must": [qdrant_filter(part) for part in parts]}
        case Or(parts):
            return {"should": [qdrant_filter(part) for part in parts]}


def equal(key: str, value: Value) -> Filter:
    if type_of(value) == "number":
        return {"key": FIELD + key, "range": {"gte": value, "lte": value}}
    return {"key": FIELD + key, "match": {"value": value}}
