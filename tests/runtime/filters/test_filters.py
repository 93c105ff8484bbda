"""The grammar of filters, its errors, and its documented meaning, in Python and in the gallery's SQLite."""

import sqlite3

import pytest
from filter_oracle import CONDITIONS, METADATA
from hypothesis import given, settings
from hypothesis import strategies as st

from qpert.runtime.errors import InputError
from qpert.runtime.filters.metadata import checked_metadata
from qpert.runtime.filters.parsing import parse, to_text
from qpert.runtime.filters.sql import where_sql
from qpert.runtime.filters.tree import And, Missing, Not, OneOf, Or, Ordered, holds
from qpert.runtime.gallery.catalogue import FIELD_SCHEMA
from qpert.runtime.gallery.fields import insert_fields


def test_not_binds_closest_then_and_then_or():
    assert parse("a = 1 or not b = 2 and c = 3") == Or(
        (OneOf("a", (1,)), And((Not(OneOf("b", (2,))), OneOf("c", (3,)))))
    )
    assert parse("(a = 1 OR NOT (b = 2)) And c > -2.5e1") == And(
        (Or((OneOf("a", (1,)), Not(OneOf("b", (2,))))), Ordered("c", ">", -25.0))
    )


def test_values_are_strings_numbers_booleans_and_null():
    assert parse("""a in ("x", 'y', 1, 1.5, true, False, NULL)""") == Or(
        (OneOf("a", ("x", "y", 1, 1.5, True, False)), Missing("a"))
    )
    assert parse(r"""a = "say \"x\" \\ it's" """) == OneOf("a", ('say "x" \\ it\'s',))
    assert parse("a != null") == Not(Missing("a"))
    assert parse("a not in (1)") == Not(OneOf("a", (1,)))


@pytest.mark.parametrize(
    ("text", "column", "words"),
    [
        ("", 1, "a key"),
        ("   ", 1, "a key"),
        ("album = x", 9, "quotation marks"),
        ("album == 'x'", 8, 'a "text"'),
        ("album = 'x", 9, "a closing '"),
        ("album = 1 year = 2", 11, "and, or, or the end"),
        ("(album = 1", 11, "and, or, or )"),
        ("album = 1)", 10, "and, or, or the end"),
        ("album in 'x'", 10, "( and the values"),
        ("album in ()", 11, 'a "text"'),
        ("album in (1 2)", 13, ", or )"),
        ("year < 'a'", 8, "only numbers have an order"),
        ("year < true", 8, "only numbers have an order"),
        ("year >= null", 9, "only numbers have an order"),
        ("year = 1e999", 8, "a finite number"),
        ("year = 9007199254740993", 8, "within"),
        ("year = 12abc", 8, "a key, a sign"),
        ("and = 1", 1, "a key"),
        ("naïve = 1", 1, "a key"),
        ("a.b = 1", 2, "a key, a sign"),
        ("a = 1 and", 10, "a key"),
        ("not", 4, "a key"),
        ("a like 'x'", 3, "=, !=, <"),
        ("a not like 'x'", 3, "=, !=, <"),
        (r"a = 'x\n'", 5, "a backslash only before"),
        ("a = 'x\0'", 5, "without NUL"),
        ("a = 1; drop table image", 6, "a key, a sign"),
        ("(" * 60 + "a = 1" + ")" * 60, 51, "at most 50 parentheses"),
        (" or ".join(["a = 1"] * 201), 1801, "at most 200 comparisons"),
        ("a in (" + ",".join("1" * 1001) + ")", 2007, "at most 1,000 values"),
    ],
)
def test_an_error_points_to_the_column_and_says_what_was_expected(text, column, words):
    with pytest.raises(InputError) as found:
        parse(text)
    assert found.value.code == "filter"
    assert f"the filter at column {column}: got " in str(found.value)
    assert words in str(found.value)
    assert "\n" not in str(found.value)


def test_a_filter_that_is_too_long_or_no_text_is_refused():
    for wrong in ("a = 1 and " * 3000 + "b = 1", 3):
        with pytest.raises(InputError) as found:
            parse(wrong)
        assert found.value.code == "filter"


@pytest.mark.parametrize(
    "values",
    [{"a b": 1}, {"": 1}, {"1a": 1}, {"And": 1}, {"é": 1}, {"a": [1]}, {"a": {"b": 1}}, {"a": 2**53 + 1}, {"a": 1e999},
     {"a": float("nan")}, {"a": "x\0"}, {"a": "\ud800"}, {"a": "x" * 10_001}, {f"k{i}": 1 for i in range(65)}],
)  # fmt: skip
def test_metadata_that_no_filter_could_be_about_are_refused(values):
    with pytest.raises(InputError) as found:
        checked_metadata(values, "line 3")
    assert found.value.code == "metadata"
    assert str(found.value).startswith("line 3 has ")


def test_null_is_no_value():
    assert checked_metadata({"a": None, "b": False, "c": 0}, "x") == {"b": False, "c": 0}


@given(CONDITIONS)
def test_a_condition_written_out_means_the_same(pair):
    text, _ = pair
    condition = parse(text)
    assert parse(to_text(condition)) == condition


@given(CONDITIONS, st.lists(METADATA, max_size=8))
@settings(max_examples=300)
def test_python_and_sqlite_agree_with_the_oracle(pair, rows):
    text, expected = pair
    condition = parse(text)
    connection = sqlite3.connect(":memory:")
    connection.execute("CREATE TABLE image (row INTEGER PRIMARY KEY)")
    connection.executescript(FIELD_SCHEMA)
    connection.executemany("INSERT INTO image VALUES (?)", [(row,) for row in range(len(rows))])
    insert_fields(connection, enumerate(rows))
    where, values = where_sql(condition)
    found = connection.execute(f"SELECT row FROM image WHERE {where} ORDER BY row", values).fetchall()
    connection.close()
    wanted = [row for row, metadata in enumerate(rows) if expected(metadata)]
    assert [row for (row,) in found] == wanted
    assert [row for row, metadata in enumerate(rows) if holds(condition, metadata)] == wanted


def test_values_reach_sqlite_as_parameters_only():
    where, values = where_sql(parse("""a = "'; DROP TABLE image; --" or b < 3"""))
    assert "DROP" not in where
    assert values == ["a", "string", "'; DROP TABLE image; --", "b", "number", 3]
