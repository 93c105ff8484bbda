"""Numbers that are written as text, wherever users write them."""

import pytest

from qpert.runtime.cli import run
from qpert.runtime.cli.options import parse_counts, parse_numbers
from qpert.runtime.cli.verify import allowed
from qpert.runtime.errors import InputError
from qpert.runtime.inputs.numbers import parse_float, parse_int


def test_plain_decimal_numbers_are_read():
    assert [parse_float(text) for text in ("1", " -2.5 ", "1e3", ".5")] == [1, -2.5, 1000, 0.5]
    assert [parse_int(text) for text in ("10", "-3")] == [10, -3]


@pytest.mark.parametrize("text", ["1_0", "\uff11", "", "x", "\u0661"])
def test_digit_groups_and_digits_of_other_scripts_are_no_numbers_here(text):
    for read in (parse_float, parse_int):
        with pytest.raises(ValueError, match=r"number|float|int"):
            read(text)
    with pytest.raises(InputError):
        parse_numbers(f"2,{text}", "--numbers", "1,2")
    with pytest.raises(InputError):
        parse_counts(f"2,{text}", "--numbers")
    with pytest.raises(InputError):
        allowed((f"r1={text}",))


@pytest.mark.parametrize(
    "arguments",
    [
        ["search", "g", "a dog", "-k", "1_0"],
        ["search", "g", "a dog", "--rerank", "\u0661"],
        ["eval", "b", "--alpha", "\u00b2"],
        ["eval", "b", "--limit", "1_0"],
        ["bench", "b", "--seconds", "1_0"],
        ["quantize", "b", "--samples", "1_0"],
        ["calibrate", "b", "--limit", "\uff11"],
        ["export", "blip2", "--vision-heads", "1_0"],
        ["export", "blip2", "--alpha", "1_0"],
    ],
)
def test_options_take_plain_numbers_only(arguments, capsys):
    assert run(arguments) == 2
    assert "is not a valid" in capsys.readouterr().err
