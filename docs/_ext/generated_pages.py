"""Writes the pages that are made from the code and from committed results, before Sphinx reads its sources.

They go to docs/generated/, which git ignores; pages include them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import benchmark_tables
import error_codes
import manifest_tables

DOCS = Path(__file__).resolve().parents[1]
OUT = DOCS / "generated"
PAGES = {
    "error_codes.md": error_codes.page,
    "benchmarks.md": benchmark_tables.page,
    "manifest.md": manifest_tables.page,
}


def write(*_: Any) -> None:
    OUT.mkdir(exist_ok=True)
    for name, made in PAGES.items():
        path, text = OUT / name, made()
        if not path.is_file() or path.read_text(encoding="utf-8") != text:  # an unchanged page is not read again
            path.write_text(text, encoding="utf-8")


def setup(app: Any) -> dict[str, Any]:
    app.connect("config-inited", write)
    app.config.exclude_patterns.append("generated")
    return {"version": "1", "parallel_read_safe": True}
