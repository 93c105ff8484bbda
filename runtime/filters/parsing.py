"""Filters from text.

    condition  = all {"or" all}
    all        = one {"and" one}
    one        = "not" one | "(" condition ")" | comparison
    comparison = key ("=" | "!=" | "<" | "<=" | ">" | ">=") value | key ["not"] "in" "(" value {"," value} ")"
    value      = "text" | 'text' | number | true | false | null

`not` binds closest, then `and`, then `or`. Words may be in any case; keys and strings may not. In a string, a backslash
stands before a quotation mark or another backslash, and before nothing else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from qpert.runtime.errors import InputError
from qpert.runtime.filters.metadata import KEY, WORDS, Value, trouble_of
from qpert.runtime.filters.tree import ORDERS, And, Condition, Missing, Not, OneOf, Or, Ordered

LONGEST = 20_000
DEEPEST = 50
"""Parentheses and `not` within each other: far below what SQLite takes."""
MOST_PARTS = 200
"""Comparisons of a filter."""
MOST_VALUES = 1_000
"""Values of all comparisons: SQLite takes 32,766 parameters, older ones 999 a statement."""

TOKEN = re.compile(
    r"""\s*(?:(?P<word>[^\W\d]\w*)|(?P<number>[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?(?![\w.]))"""
    r"""|(?P<string>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')|(?P<sign>!=|<=|>=|[=<>(),]))""",
    re.DOTALL,
)
VALUES = 'a "text", a number, true, false or null'
CONSTANTS: dict[str, bool | None] = {"true": True, "false": False, "null": None}


@dataclass(frozen=True)
class Token:
    """`column` counts characters from 1. `kind` is `end` after the last."""

    kind: str
    text: str
    column: int

    def is_word(self, word: str) -> bool:
        return self.kind == "word" and self.text.lower() == word

    def __str__(self) -> str:
        return "the end" if self.kind == "end" else repr(self.text)


def parse(text: str) -> Condition:
    """The condition that a filter's text means.

    Raises:
        InputError: of code `filter`; the message says at which column of the text, what was found there and what was
            expected.
    """
    if not isinstance(text, str):
        raise InputError(f"the filter is a {type(text).__name__}; expected a text, such as album = 'x'", code="filter")
    if len(text) > LONGEST:
        raise InputError(f"the filter has {len(text):,} characters; expected at most {LONGEST:,}", code="filter")
    return Parser(text).whole()


def as_condition(where: str | Condition | None) -> Condition | None:
    """What callers give as `where`: a text, a condition that was parsed before, or nothing. Raises InputError."""
    return where if where is None or isinstance(where, Condition) else parse(where)


class Parser:
    """One text; `place` is that of the next token."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens = self._tokens()
        self.place = self.depth = self.parts = self.values = 0

    def whole(self) -> Condition:
        condition = self.condition()
        if self.next.kind != "end":
            self.fail(self.next, "and, or, or the end")
        return condition

    def condition(self) -> Condition:
        return self._joined("or", self.all_of, Or)

    def all_of(self) -> Condition:
        return self._joined("and", self.one, And)

    def _joined(
        self, word: str, part: Callable[[], Condition], kind: Callable[[tuple[Condition, ...]], Condition]
    ) -> Condition:
        parts = [part()]
        while self.next.is_word(word):
            self.take()
            parts.append(part())
        return parts[0] if len(parts) == 1 else kind(tuple(parts))

    def one(self) -> Condition:
        token = self.next
        if not (token.is_word("not") or (token.text == "(" and token.kind == "sign")):
            return self.comparison()
        self.take()
        self.depth += 1
        if self.depth > DEEPEST:
            self.fail(token, f"at most {DEEPEST} parentheses and nots within each other")
        if token.is_word("not"):
            found: Condition = Not(self.one())
        else:
            found = self.condition()
            self.sign(")", "and, or, or )")
        self.depth -= 1
        return found

    def comparison(self) -> Condition:
        key = self.take()
        if key.kind != "word" or not KEY.fullmatch(key.text) or key.text.lower() in WORDS:
            self.fail(key, "a key (letters of A to Z, digits, underscores), not, or (")
        self.parts += 1
        if self.parts > MOST_PARTS:
            self.fail(key, f"at most {MOST_PARTS} comparisons")
        token = self.take()
        if token.is_word("not") and self.next.is_word("in"):
            self.take()
            return Not(self.members(key.text))
        if token.is_word("in"):
            return self.members(key.text)
        if token.text in ("=", "!="):
            equal = equals(key.text, self.value())
            return equal if token.text == "=" else Not(equal)
        order = next((one for one in ORDERS if token.kind == "sign" and token.text == one), None)
        if order is None:
            self.fail(token, "=, !=, <, <=, >, >=, in or not in")
        return Ordered(key.text, order, self.bound(order))

    def members(self, key: str) -> Condition:
        self.sign("(", "( and the values")
        values = [self.value()]
        while self.next.text == "," and self.next.kind == "sign":
            self.take()
            values.append(self.value())
        self.sign(")", ", or )")
        there = OneOf(key, tuple(value for value in values if value is not None))
        if None not in values:
            return there
        return Or((there, Missing(key))) if there.values else Missing(key)

    def value(self) -> Value | None:
        token = self.take()
        self.values += 1
        if self.values > MOST_VALUES:
            self.fail(token, f"at most {MOST_VALUES:,} values")
        if token.kind == "word" and token.text.lower() in CONSTANTS:
            return CONSTANTS[token.text.lower()]
        if token.kind not in ("number", "string"):
            hint = " (texts stand in quotation marks)" if token.kind == "word" else ""
            self.fail(token, VALUES + hint)
        value = number(token.text) if token.kind == "number" else unquoted(token.text)
        if value is None:
            self.fail(token, "a backslash only before a quotation mark or a backslash")
        if (trouble := trouble_of(value)) is not None:
            self.fail(token, trouble.removeprefix("expected "))
        return value

    def bound(self, order: str) -> int | float:
        token = self.next
        value = self.value()
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.fail(token, f"a number after {order}: only numbers have an order (keep dates as numbers, 20211231)")
        return value

    @property
    def next(self) -> Token:
        return self.tokens[self.place]

    def take(self) -> Token:
        token = self.next
        self.place = min(self.place + 1, len(self.tokens) - 1)
        return token

    def sign(self, text: str, expected: str) -> None:
        token = self.take()
        if token.kind != "sign" or token.text != text:
            self.fail(token, expected)

    def fail(self, token: Token, expected: str) -> NoReturn:
        shown = str(token) if len(str(token)) < 60 else f"{str(token)[:57]}…"
        raise InputError(f"the filter at column {token.column}: got {shown}, expected {expected}", code="filter")

    def _tokens(self) -> list[Token]:
        tokens, place, end = list[Token](), 0, len(self.text.rstrip())
        while place < end:
            found = TOKEN.match(self.text, place)
            if found is None:
                first = place + len(self.text[place:]) - len(self.text[place:].lstrip())
                rest = Token("sign", self.text[first : first + 12], first + 1)
                is_open = rest.text[:1] in "\"'"
                self.fail(rest, f"a closing {rest.text[0]}" if is_open else f"a key, a sign or {VALUES}")
            kind = found.lastgroup or ""
            tokens.append(Token(kind, found[kind], found.start(kind) + 1))
            place = found.end()
        return [*tokens, Token("end", "", end + 1)]


def equals(key: str, value: Value | None) -> Condition:
    return Missing(key) if value is None else OneOf(key, (value,))


def number(text: str) -> int | float:
    """Whole where it is written as one, or else float64."""
    return int(text) if re.fullmatch(r"[-+]?\d+", text) and len(text) < 40 else float(text)


def unquoted(text: str) -> str | None:
    """The string within quotation marks; None for a backslash before anything else."""
    inner = text[1:-1]
    if re.search(r"""\\[^"'\\]""", re.sub(r"\\\\", "", inner)):
        return None
    return re.sub(r"""\\(["'\\])""", r"\1", inner)


def to_text(condition: Condition) -> str:
    """A filter's text that parses to an equal condition; for messages and records."""
    match condition:
        case OneOf(key, values):
            shown = [quoted(value) for value in values]
            return f"{key} = {shown[0]}" if len(shown) == 1 else f"{key} in ({', '.join(shown)})"
        case Ordered(key, order, bound):
            return f"{key} {order} {quoted(bound)}"
        case Missing(key):
            return f"{key} = null"
        case Not(part):
            return f"not ({to_text(part)})"
        case And(parts) | Or(parts):
            word = " and " if isinstance(condition, And) else " or "
            return word.join(f"({to_text(part)})" for part in parts)


def quoted(value: Value) -> str:
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return json.dumps(value)
