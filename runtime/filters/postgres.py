"""Conditions as PostgreSQL's WHERE, on a `jsonb` column named `metadata`."""

from __future__ import annotations

import json

from qpert.runtime.filters.sql import Sql, joined
from qpert.runtime.filters.tree import And, Condition, Missing, Not, OneOf, Or, Ordered


def where_postgres(condition: Condition) -> Sql:
    """A boolean expression with `%s` for each parameter, as psycopg takes it; true or false, never NULL.

    `jsonb` compares values of one type alone, and numbers as exact decimals: the shortest decimals of two float64 are
    in the order of the numbers.
    """
    match condition:
        case OneOf(key, values):
            return "coalesce(metadata -> %s = ANY(%s::jsonb[]), false)", [key, [json.dumps(value) for value in values]]
        case Ordered(key, order, bound):
            number = f"(metadata ->> %s)::numeric {order} %s::numeric"
            text = f"CASE jsonb_typeof(metadata -> %s) WHEN 'number' THEN {number} ELSE false END"
            return text, [key, key, json.dumps(bound)]
        case Missing(key):
            return "(metadata -> %s IS NULL)", [key]
        case Not(part):
            text, values_ = where_postgres(part)
            return f"NOT {text}", values_
        case And(parts):
            return joined("AND", [where_postgres(part) for part in parts])
        case Or(parts):
            return joined("OR", [where_postgres(part) for part in parts])
