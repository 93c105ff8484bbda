"""Lists in options, read in one place for every command."""

import pytest

from qpert.runtime.cli.options import parse_counts, parse_names, parse_numbers
from qpert.runtime.errors import InputError


def test_lists_are_read_with_commas_between_them():
    assert parse_numbers("2,4.5, 1e1", "--alphas", "2,4") == (2.0, 4.5, 10.0)
    assert parse_counts("8, 1,8", "--batch") == (8, 1)
    assert parse_names(" torch,hf , ") == ("torch", "hf")
    assert parse_names("") == ()


@pytest.mark.parametrize("text", ["", "2;4", "two", "1,"])
def test_what_is_no_number_is_refused_with_an_example(text):
    with pytest.raises(InputError) as caught:
        parse_numbers(text, "--alphas", "2,4,6")
    assert caught.value.code == "not-numbers"
    assert "--alphas" in str(caught.value)
    assert "2,4,6" in str(caught.value)


@pytest.mark.parametrize("text", ["1.5", "inf", "nan"])
def test_what_is_no_whole_number_is_no_count(text):
    with pytest.raises(InputError) as caught:
        parse_counts(text, "--batch")
    assert caught.value.code == "not-numbers"
