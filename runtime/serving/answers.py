"""Answers as JSON."""

from __future__ import annotations

from fastapi import Response
from pydantic_core import to_json


def json_answer(content: object) -> Response:
    """An answer of many numbers, or of one that is asked for often: written ten times as fast as by `json`, with every
    float64 read back as it was. NaN and infinity are written as JavaScript spells them."""
    return Response(to_json(content), media_type="application/json")
