"""What filters mean, written from docs/guides/filters.md and not from the code: the oracle of every engine.

Conditions are built here as text together with a plain Python function, so that the parser is under test too.
"""

from __future__ import annotations

from hypothesis import strategies as st

KEYS = ("album", "year", "ok", "_x1")
STRINGS = (
    "x",
    "X",
    "",
    "1",
    "true",
    "null",
    "it's",
    'say "a"',
    "back\\slash",
    "café",
    "cafe\u0301",
    "日本",
    "a\nb",
    "%",
    "_",
)
NUMBERS = (0, 1, -1, 1.0, 0.1, 0.30000000000000004, -0.0, 2021, 2**53, -(2**53), 1e300, 5e-324, 2.5)
VALUES = st.one_of(st.sampled_from(STRINGS), st.sampled_from(NUMBERS), st.booleans())
METADATA = st.dictionaries(st.sampled_from(KEYS), VALUES)


def kind(value):
    return "boolean" if isinstance(value, bool) else "string" if isinstance(value, str) else "number"


def same(one, other):
    return kind(one) == kind(other) and one == other


def literal(value):
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "FALSE"
    if isinstance(value, str):
        mark = "'" if '"' in value else '"'
        return mark + value.replace("\\", "\\\\").replace(mark, "\\" + mark) + mark
    return repr(value)


def equal(key, value):
    return lambda row: (key not in row) if value is None else (key in row and same(row[key], value))


def order(key, sign, bound):
    def true(row):
        value = row.get(key)
        if value is None or kind(value) != "number":
            return False
        return {"<": value < bound, "<=": value <= bound, ">": value > bound, ">=": value >= bound}[sign]

    return true


@st.composite
def comparisons(draw):
    key = draw(st.sampled_from(KEYS))
    which = draw(st.sampled_from(("=", "!=", "in", "not in", "<", "<=", ">", ">=")))
    if which in ("in", "not in"):
        values = draw(st.lists(st.one_of(VALUES, st.none()), min_size=1, max_size=4))
        tests = [equal(key, value) for value in values]
        text = f"{key} {which} ({', '.join(map(literal, values))})"
        return text, (lambda row: any(t(row) for t in tests) == (which == "in"))
    if which in ("=", "!="):
        value = draw(st.one_of(VALUES, st.none()))
        test = equal(key, value)
        return f"{key}{which}{literal(value)}", (lambda row: test(row) == (which == "="))
    bound = draw(st.sampled_from(NUMBERS))
    return f"{key} {which} {literal(bound)}", order(key, which, bound)


def combined(parts):
    def negated(one):
        text, test = one
        return f"not ({text})", lambda row: not test(row)

    def joined(pair):
        word, ones = pair
        test = all if word == "and" else any
        return f" {word} ".join(f"({text})" for text, _ in ones), lambda row: test(t(row) for _, t in ones)

    several = st.tuples(st.sampled_from(("and", "or")), st.lists(parts, min_size=2, max_size=3))
    return st.one_of(parts.map(negated), several.map(joined))


CONDITIONS = st.recursive(comparisons(), combined, max_leaves=6)
"""(text, function from metadata to bool)."""
