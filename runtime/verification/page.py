"""`reports/verify.html`: the verdict, what it rests on, and the worst of it, on one self-contained page."""

from __future__ import annotations

import html
from collections.abc import Iterator
from typing import Any

from qpert.runtime.errors import ImageError
from qpert.runtime.html import document, figure, table
from qpert.runtime.inputs.images import load_image
from qpert.runtime.verification import charts
from qpert.runtime.verification.result import Candidate, Comparison, Disagreement, Evidence, Gate, Verification
from qpert.runtime.verification.tables import (
    WAYS,
    gate_cells,
    lead,
    metric_name,
    rank_rows,
    recall_rows,
    reference_words,
    tie_words,
    worst_comparisons,
)
from qpert.runtime.verification.tolerances import TOLERANCES

VERDICT_STYLE = """
.verdict { display: inline-block; padding: .05rem .7rem; border-radius: .4rem; color: #fff; background: var(--bad) }
.verdict.pass { background: var(--good) }
"""
STYLE = (
    VERDICT_STYLE
    + """
.small { font-size: .8rem; padding: 0 .5rem }
td.number { text-align: right } .wide { overflow-x: auto } .wide table { width: 100% }
.used { display: inline-block; width: 9rem; height: .6rem; background: var(--soft); border-radius: .3rem }
.used i { border-radius: .3rem; display: block; height: 100%; background: var(--good) }
.used.over i { background: var(--bad) }
.side { display: grid; grid-template-columns: minmax(20rem, 30rem) 1fr; gap: 2rem; align-items: start }
.side td { white-space: nowrap }
.pair { border: 1px solid var(--line); border-radius: .5rem; padding: .6rem 1rem; margin: .8rem 0 }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(12rem, 15rem)); gap: 1rem }
pre { background: var(--soft); padding: .7rem 1rem; border-radius: .4rem; overflow-x: auto }
@media (max-width: 50rem) { .side { grid-template-columns: 1fr } }
"""
    + charts.STYLE
)


def render(verification: Verification) -> str:
    """The whole page."""
    body = [
        f"<h1>Parity with {html.escape(reference_words(verification))} {badge(verification.verdict)}</h1>",
        *(f"<p>{html.escape(line)}</p>" for line in lead(verification)),
        "<h2>Gates</h2>",
        gates(verification.gates),
    ]
    if verification.comparisons:
        body += tensor_sections(verification)
    if "recall" in verification.details:
        body += recall_sections(verification.details["recall"])
    if "ranks" in verification.details:
        body += rank_sections(verification)
    body += ["<h2>Run</h2>", f"<pre>{html.escape(verification.command)}</pre>" if verification.command else ""]
    rows = [(html.escape(key), html.escape(value)) for key, value in verification.environment.items()]
    body.append(table(("", ""), rows))
    return document(f"qpert parity: {verification.verdict}", "\n".join(body), STYLE)


def badge(verdict: str, kind: str = "") -> str:
    return f'<span class="verdict {verdict} {kind}">{verdict}</span>'


def gates(found: tuple[Gate, ...]) -> str:
    """What failed first; a bar shows how much of its limit each uses."""
    ordered = sorted(found, key=lambda gate: gate.passed)
    rows = []
    for gate in ordered:
        name, value, limit = gate_cells(gate)
        mark = badge("pass" if gate.passed else "fail", "small")
        rows.append((html.escape(name), value, limit, used(gate), mark))
    return f'<div class="wide">{table(("gate", "value", "limit", "of the limit", ""), rows)}</div>'


def used(gate: Gate) -> str:
    share = 100 * min(1.0, gate.value / gate.limit) if gate.limit and gate.value >= 0 else 100.0 * (not gate.passed)
    return f'<span class="used{"" if gate.passed else " over"}"><i style="width: {share:.0f}%"></i></span>'


# Tensors


def tensor_sections(verification: Verification) -> Iterator[str]:
    """A plot of errors for each graph, then the worst comparison of each case."""
    limits = TOLERANCES.get(verification.precision)
    yield "<h2>Largest differences, a dot for each batch shape</h2>"
    for graph in dict.fromkeys(row.graph for row in verification.comparisons):
        cases: dict[str, list[Comparison]] = {}
        for comparison in verification.comparisons:
            if comparison.graph == graph:
                cases.setdefault(comparison.case, []).append(comparison)
        limit = limits.max_abs(graph) if limits else None
        rows = [charts.Row(case, tuple(one.max_abs for one in found), limit) for case, found in cases.items()]
        yield f"<h3>{html.escape(graph)}</h3>"
        yield charts.error_plot(rows, f"largest differences of {graph}")
    yield "<h2>The worst of each case</h2>"
    cells = [tuple(map(html.escape, row)) for row in worst_comparisons(verification)]
    yield f'<div class="wide">{table(("graph", "case", "max abs", "1 − cosine", "in shape"), cells)}</div>'


# Recall


def recall_sections(recall: dict[str, Any]) -> Iterator[str]:
    yield "<h2>Recall, in percent, and how far it is from the reference</h2>"
    yield (
        f"<p class='quiet'>Intervals: {recall['interval_percent']} % of {recall['resamples']:,} paired resamples of "
        f"the {recall['images']:,} images, each with its captions. One that holds 0 may be chance.</p>"
    )
    for way, words in WAYS.items():
        rows = recall_rows(recall[way])
        drawn = [
            charts.Interval(metric_name(name), one["difference"], one["low"], one["high"])
            for name, one in recall[way].items()
            if one["low"] is not None
        ]
        yield f"<h3>{words}</h3>"
        head = ("metric", "reference", "here", "difference", "interval")
        yield f'<div class="side">{table(head, rows)}{charts.interval_plot(drawn, f"change of recall, {words}")}</div>'


# Ranks


def rank_sections(verification: Verification) -> Iterator[str]:
    ranks, evidence = verification.details["ranks"], verification.evidence
    yield "<h2>Ranks</h2>"
    yield f"<p class='quiet'>{html.escape(tie_words(ranks))}</p>"
    figures = table(("", *WAYS.values()), rank_rows(ranks))
    plot = charts.scatter(evidence.reference, evidence.deployed, ranks["tie_widths"]["final"] / 2) if evidence else ""
    yield f'<div class="side">{plot}<div>{figures}</div></div>'
    if evidence is not None:
        yield from disagreement_sections(evidence)


def disagreement_sections(evidence: Evidence) -> Iterator[str]:
    yield "<h2>Queries that find something else first</h2>"
    if not evidence.disagreements:
        yield "<p>None: every query has the same first result on both sides.</p>"
    for one in evidence.disagreements:
        kind = '<span class="quiet">a tie</span>' if one.tie else badge("fail", "small").replace(">fail<", ">no tie<")
        head = f"{html.escape(WAYS[one.direction])} {kind}"
        query = f"<p>“{html.escape(one.query)}”</p>" if one.file is None else ""
        yield f'<div class="pair"><h3>{head}</h3>{query}<div class="cards">{cards(one)}</div></div>'


def cards(one: Disagreement) -> str:
    """The query's picture if it is one, then both first results."""
    shown = "" if one.file is None else f"<div>{picture_of(one.query, one)}<p>the query</p></div>"
    return shown + candidate("first by the reference", one.expected) + candidate("first here", one.got)


def candidate(title: str, found: Candidate) -> str:
    scores = f"reference {found.reference:.5f}<br>here {found.deployed:.5f}"
    return f"<div>{picture_of(found.name, found)}<p><b>{title}</b><br>{scores}</p></div>"


def picture_of(name: str, owner: Candidate | Disagreement) -> str:
    """A picture, or the caption; a file that is gone since is said to be."""
    if owner.file is None:
        return f"<p>“{html.escape(name)}”</p>"
    try:
        return figure(load_image(owner.file)) + f'<p class="quiet">{html.escape(name)}</p>'
    except ImageError as error:
        return f'<p class="quiet">{html.escape(str(error))}</p>'
