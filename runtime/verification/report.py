"""The parity report: the verdict, the gates behind it, and the worst cases; `reports/verify.{json,html,md}`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.evaluation.metrics import DIRECTIONS
from qpert.runtime.progress import Progress
from qpert.runtime.report import charts
from qpert.runtime.report import model as m
from qpert.runtime.report.files import json_text, keep_reports
from qpert.runtime.report.html import to_html
from qpert.runtime.report.markdown import to_markdown
from qpert.runtime.verification.result import Candidate, Comparison, Disagreement, Evidence, Gate, Verification
from qpert.runtime.verification.tolerances import TOLERANCES

REFERENCES = {
    "recorded": "PyTorch, as recorded at export",
    "torch": "PyTorch",
    "hf": "stock Hugging Face",
    "lavis": "stock LAVIS",
    "open_clip": "stock open_clip",
}


def keep_report(bundle: Bundle, verification: Verification, report: m.Report, progress: Progress) -> None:
    """Write `reports/verify.{json,html,md}` and the verdict into the manifest."""
    verdict: dict[str, object] = {
        "verdict": verification.verdict,
        "level": verification.level,
        "reference": verification.reference,
        "provider": verification.provider,
        "when": verification.environment["when"],
    }
    files = {
        "verify.html": to_html(report),
        "verify.md": to_markdown(report),
        "verify.json": json_text(verification.to_dict()),
    }
    keep_reports(bundle, files, progress, verification=verdict)


def parity_report(verification: Verification) -> m.Report:
    """Verdict and gates, then the comparisons of the level: tensors, recall, ranks."""
    reference = REFERENCES.get(verification.reference, verification.reference)
    blocks: list[m.Block] = [*m.paragraphs(*lead(verification)), m.Section("Gates", (gate_table(verification.gates),))]
    if verification.comparisons:
        blocks += tensor_sections(verification)
    if "recall" in verification.details:
        blocks.append(recall_section(verification.details["recall"]))
    if "ranks" in verification.details:
        blocks += rank_sections(verification)
    command = (m.Code(verification.command),) if verification.command else ()
    blocks.append(m.Section("Run", (*command, m.pairs(verification.environment)), details=True))
    heading = (f"Parity with {reference}: ", m.verdict_badge(verification.passed, loud=True))
    return m.Report(f"qpert parity: {verification.verdict}", heading, tuple(blocks))


def lead(verification: Verification) -> list[str]:
    """What was compared with what, in two lines."""
    count, passed = len(verification.gates), sum(gate.passed for gate in verification.gates)
    first = (
        f"Level {verification.level}, {verification.precision} on {verification.provider} against the "
        f"{verification.reference} reference: {passed} of {count} gates pass."
    )
    data = verification.details.get("data")
    if data is None:
        return [first, f"{len(verification.comparisons)} comparisons of tensors."]
    return [
        first,
        f"{data['title'] or data['root']}: {data['images']:,} images, {data['texts']:,} texts, the best "
        f"{data['rerank']} of each query re-ranked. Boxes: {data['boxes']}.",
    ]


def gate_table(gates: tuple[Gate, ...]) -> m.Table:
    """Failures first; a bar shows how much of its limit each gate uses."""
    rows = (
        (gate.name, f"{gate.value:.3g}", f"{gate.limit:.3g}", used(gate), m.verdict_badge(gate.passed))
        for gate in sorted(gates, key=lambda gate: gate.passed)
    )
    return m.Table(("gate", "value", "limit", "of the limit", ""), tuple(rows))


def used(gate: Gate) -> m.Bar:
    share = min(1.0, gate.value / gate.limit) if gate.limit and gate.value >= 0 else float(not gate.passed)
    return m.Bar(share, "good" if gate.passed else "bad")


# Tensors


def tensor_sections(verification: Verification) -> Iterator[m.Section]:
    """A chart of errors for each graph, then the worst comparison of each case."""
    limits = TOLERANCES.get(verification.precision)
    graphs: dict[str, dict[str, list[float]]] = {}
    for row in verification.comparisons:
        graphs.setdefault(row.graph, {}).setdefault(row.case, []).append(row.max_abs)
    plots = []
    for graph, cases in graphs.items():
        limit = limits.max_abs(graph) if limits else None
        rows = [charts.Row(case, tuple(values), limit) for case, values in cases.items()]
        plots.append(m.Section(graph, (charts.error_plot(rows, f"largest differences of {graph}"),)))
    yield m.Section("Largest differences, a dot for each batch shape", tuple(plots))
    head = ("graph", "case", "max abs", "1 − cosine", "in shape")
    worst = tuple(
        (graph, case, f"{row.max_abs:.3g}", f"{row.cosine_distance:.3g}", row.shape)
        for (graph, case), row in worst_comparisons(verification).items()
    )
    yield m.Section("The worst of each case", (m.Table(head, worst, words=2),), details=True)


def worst_comparisons(verification: Verification) -> dict[tuple[str, str], Comparison]:
    """For each graph and case the comparison with the largest difference (NaN counts as the largest)."""
    worst: dict[tuple[str, str], Comparison] = {}
    for comparison in verification.comparisons:
        key = (comparison.graph, comparison.case)
        if key not in worst or not comparison.max_abs <= worst[key].max_abs:
            worst[key] = comparison
    return worst


# Recall


def recall_section(recall: Mapping[str, Any]) -> m.Section:
    percent = recall["interval_percent"]
    note = (
        f"Intervals: {percent} % of {recall['resamples']:,} paired resamples of the {recall['images']:,} images, each "
        "with its captions. One that contains 0 may be chance."
    )
    ways = (way_section(name, recall[way], f"{percent} % interval") for way, name in DIRECTIONS.items())
    return m.Section("Recall, in percent, and how far it is from the reference", (m.Paragraph(note, "quiet"), *ways))


def way_section(name: str, changes: Mapping[str, Mapping[str, float | None]], interval: str) -> m.Section:
    """One direction: metric, reference, here, difference in points, interval; the intervals as a chart."""
    rows, drawn = [], []
    for key, one in changes.items():
        low, high, difference = one["low"], one["high"], one["difference"]
        values = (m.number(one["reference"], ".2f"), m.number(one["deployed"], ".2f"), m.number(difference, "+.2f"))
        known = low is not None and high is not None and difference is not None
        rows.append((metric_name(key), *values, f"{low:+.2f} … {high:+.2f}" if known else m.UNDEFINED))
        if low is not None and high is not None and difference is not None:
            drawn.append(charts.Interval(metric_name(key), difference, low, high))
    table = m.Table(("metric", "reference", "here", "difference", interval), tuple(rows))
    return m.Section(name, (m.Grid((table, charts.interval_plot(drawn, f"change of recall, {name}")), 24),))


def metric_name(name: str) -> str:
    """`small_r1` → `small R@1`, `mr5` → `mR@5`."""
    head, _, cut = name.rpartition("r")
    return f"{head.replace('_', ' ')}R@{cut}"


# Ranks


def rank_sections(verification: Verification) -> Iterator[m.Section]:
    ranks, evidence = verification.details["ranks"], verification.evidence
    figures = m.Table(("", *DIRECTIONS.values()), tuple(rank_rows(ranks)))
    note = m.Paragraph(tie_note(ranks), "quiet")
    if evidence is None:
        yield m.Section("Ranks", (figures, note))
        return
    plot = charts.scatter(evidence.reference, evidence.deployed, ranks["tie_widths"]["final"] / 2)
    yield m.Section("Ranks", (m.Grid((figures, plot), 24), note))
    yield disagreement_section(evidence)


def rank_rows(ranks: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Agreement of both directions, then of ITM decisions."""
    ways = [ranks[way] for way in DIRECTIONS]
    itm = ranks["itm"]
    return [
        ("queries", *(f"{way['queries']:,}" for way in ways)),
        ("same first result", *(f"{way['top1_agreement']:.2f} %" for way in ways)),
        ("… another, not a tie", *(f"{way['first_changed_outside_ties']:,}" for way in ways)),
        ("overlap of the 10 best", *(f"{way['overlap_10']:.2f} %" for way in ways)),
        ("overlap of the 64 best", *(f"{way['overlap_64']:.2f} %" for way in ways)),
        ("Kendall τ of the shortlist, mean", *(f"{way['kendall_tau']:.5f}" for way in ways)),
        ("… least", *(f"{way['kendall_tau_least']:.5f}" for way in ways)),
        ("pairs moved, not a tie", *(f"{way['pairs_moved_outside_ties']:,} of {way['pairs']:,}" for way in ways)),
        ("largest difference, ITC", f"{ranks['itc']['largest_difference']:.3g}", ""),
        ("largest difference, ITM", f"{itm['largest_difference']:.3g}", ""),
        ("ITM decisions that flip", f"{itm['flipped']:,} of {itm['pairs']:,}", ""),
        ("… not a tie", f"{itm['flipped_outside_ties']:,}", ""),
    ]


def tie_note(ranks: Mapping[str, Any]) -> str:
    """What a tie is, with its width."""
    widths = ranks["tie_widths"]
    return (
        f"A tie: the reference's scores of two candidates differ by less than {widths['final']:.3g}, twice what one "
        f"score may differ in this precision ({widths['itc']:.3g} for a place on the ITC shortlist, "
        f"{widths['decision']:.3g} of a match logit around 0)."
    )


def disagreement_section(evidence: Evidence) -> m.Section:
    title = "Queries that find something else first"
    if not evidence.disagreements:
        return m.Section(
            title, (m.Paragraph("None: every query has the same first result on both sides."),), details=True
        )
    return m.Section(title, tuple(map(disagreement, evidence.disagreements)))


def disagreement(one: Disagreement) -> m.Card:
    """The query, then both first results."""
    kind = m.Badge("a tie", "quiet") if one.tie else m.Badge("not a tie", "bad")
    query = m.Card((shown(one.query, one), m.Paragraph("the query"))) if one.file else m.Paragraph(f"“{one.query}”")
    found = (candidate("first by the reference", one.expected), candidate("first here", one.got))
    head = m.Paragraph((m.Bold(DIRECTIONS[one.direction]), " ", kind))
    if one.file is None:
        return m.Card((head, query, m.Grid(found, 12)))
    return m.Card((head, m.Grid((query, *found), 12)))


def candidate(title: str, found: Candidate) -> m.Card:
    scores = f"\nreference {found.reference:.5f}\nhere {found.deployed:.5f}"
    name = (m.Paragraph(found.name, "quiet"),) if found.file else ()
    return m.Card((shown(found.name, found), *name, m.Paragraph((m.Bold(title), scores))))


def shown(name: str, owner: Candidate | Disagreement) -> m.Block:
    """A picture, or the caption."""
    return m.Paragraph(f"“{name}”") if owner.file is None else m.Picture(owner.file)
