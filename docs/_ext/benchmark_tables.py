"""The committed results of benchmarks as a page: the table of speed beside accuracy, then every file's figures."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
RESULTS = BENCHMARKS / "results"
MOST_ROWS = 60
"""Of a longer table the rest is in the file: a grid of 200 settings tells a reader nothing."""


def page() -> str:
    spec = importlib.util.spec_from_file_location("readme_table", BENCHMARKS / "readme_table.py")
    assert spec is not None
    assert spec.loader is not None
    readme_table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(readme_table)
    lines = ["## Speed beside accuracy", "", readme_table.table(), "## All results", ""]
    for path in sorted(RESULTS.glob("*.json")):
        lines += section(path)
    return "\n".join(lines)


def section(path: Path) -> list[str]:
    """One file: what it says about itself, its machine, and its figures."""
    document = json.loads(path.read_text(encoding="utf-8"))
    figures = list(leaves(document))
    about = document.get("what") if isinstance(document, dict) else None
    rows = [(place, shown) for place, shown in figures if not place.startswith("what")]
    lines = [f"### {path.stem.replace('_', ' ')}", ""]
    lines += [escaped(about), ""] if isinstance(about, str) else []
    lines += [f"[{path.name}](../benchmarks/results/{path.name}), {len(figures)} figures.", ""]
    lines += ["| figure | |", "| --- | ---: |"]
    lines += [f"| {escaped(place)} | {escaped(shown)} |" for place, shown in rows[:MOST_ROWS]]
    lines += [f"| … | {len(rows) - MOST_ROWS} more in the file |"] if len(rows) > MOST_ROWS else []
    return [*lines, ""]


def leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every number and word with its place; lists of objects by their number."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, f"{prefix} · {key}" if prefix else str(key))
    elif isinstance(value, list):
        if all(not isinstance(item, dict | list) for item in value):
            yield prefix, ", ".join(map(number, value[:12])) + (" …" if len(value) > 12 else "")
        else:
            for place, inner in enumerate(value):
                yield from leaves(inner, f"{prefix} · {place + 1}")
    else:
        yield prefix, number(value)


def number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e6 else f"{value:,.0f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "–" if value is None else str(value)[:300]


def escaped(text: str) -> str:
    """As plain text in a Markdown table."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>|#$" else c for c in text.replace("\n", " "))
