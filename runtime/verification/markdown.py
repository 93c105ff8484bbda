"""`reports/verify.md`: the report for a pull request or a release's notes."""

from __future__ import annotations

from collections.abc import Sequence

from qpert.runtime.verification.result import Verification
from qpert.runtime.verification.tables import (
    WAYS,
    gate_cells,
    lead,
    rank_rows,
    recall_rows,
    reference_words,
    tie_words,
    worst_comparisons,
)


def render_markdown(verification: Verification) -> str:
    """Verdict, gates, figures, environment, command."""
    parts = [f"## Parity with {reference_words(verification)}: **{verification.verdict.upper()}**", *lead(verification)]
    ordered = sorted(verification.gates, key=lambda gate: gate.passed)
    rows = [(*gate_cells(gate), "pass" if gate.passed else "**FAIL**") for gate in ordered]
    parts.append(table(("gate", "value", "limit", ""), rows))
    details = verification.details
    if "recall" in details:
        recall = details["recall"]
        for way, words in WAYS.items():
            head = (words, "reference", "here", "difference", f"{recall['interval_percent']} % interval")
            parts.append(table(head, recall_rows(recall[way])))
    if "ranks" in details:
        parts += [table(("", *WAYS.values()), rank_rows(details["ranks"])), tie_words(details["ranks"])]
    if verification.comparisons:
        worst = table(("graph", "case", "max abs", "1 − cosine", "in shape"), worst_comparisons(verification))
        parts.append(folded("The worst of each case", worst))
    environment = table(("", ""), list(verification.environment.items()))
    parts.append(folded("Environment", environment))
    if verification.command:
        parts.append(f"```\n{verification.command}\n```")
    return "\n\n".join(parts) + "\n"


def folded(title: str, content: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{content}\n\n</details>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; a bar or a line break inside a cell cannot end it."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return "\n".join([line(head), line(["---"] * len(head)), *map(line, rows)])
