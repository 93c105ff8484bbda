"""Types of numeric options that accept plain decimal numbers only, as `inputs.numbers` does in files.

click's own types take what Python's `int` and `float` take: `1_0` for 10, and digits of other scripts.
"""

from __future__ import annotations

from typing import Any

import click
from click.types import FloatParamType, IntParamType

from qpert.runtime.inputs.numbers import parse_float, parse_int


class _Plain(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.2 on only
    """Checks the text before click converts it."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, str):
            whole = isinstance(self, IntParamType)
            try:
                value = parse_int(value) if whole else parse_float(value)
            except ValueError:
                self.fail(f"{value!r} is not a valid {'integer' if whole else 'float'}.", param, ctx)
        return super().convert(value, param, ctx)


class Integer(_Plain, IntParamType):
    """A whole number."""


class IntegerRange(_Plain, click.IntRange):
    """A whole number from `min` to `max`."""


class Number(_Plain, FloatParamType):
    """A number."""


class NumberRange(_Plain, click.FloatRange):
    """A number from `min` to `max`."""


def strict(option_type: Any) -> Any:
    """The type of an option that a family declares: `int` and `float` become the types above."""
    return {int: Integer(), float: Number()}.get(option_type, option_type)
