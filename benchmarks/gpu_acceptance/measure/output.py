"""How a measuring program ends: one JSON document on stdout, or one line on stderr and the exit code of its error.

Whatever libraries print goes to stderr, so that stdout holds the document alone.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

from qpert.runtime.errors import QpertError


def run(measure: Callable[[], dict[str, Any]]) -> int:
    """Run a measurement and print its document. Returns the exit code; a bug keeps its traceback."""
    sys.stdout.flush()
    answer = os.dup(1)
    os.dup2(2, 1)
    try:
        document = measure()
    except QpertError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    sys.stdout.flush()
    with os.fdopen(answer, "w", encoding="utf-8") as stream:
        stream.write(json.dumps(document) + "\n")
    return 0


def counts(text: str) -> tuple[int, ...]:
    """`1,8,32`."""
    return tuple(int(part) for part in text.split(","))
