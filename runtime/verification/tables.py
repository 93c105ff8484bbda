"""The figures of a verification as plain cells, formatted once for terminal, page and Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qpert.runtime.verification.result import Comparison, Gate, Verification

WAYS = {"t2i": "text → image", "i2t": "image → text"}
UNDEFINED = "–"
REFERENCES = {
    "recorded": "PyTorch, as recorded at export",
    "torch": "PyTorch",
    "hf": "stock Hugging Face",
    "lavis": "stock LAVIS",
}


def reference_words(verification: Verification) -> str:
    return REFERENCES.get(verification.reference, verification.reference)


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


def gate_cells(gate: Gate) -> tuple[str, str, str]:
    return gate.name, f"{gate.value:.3g}", f"{gate.limit:.3g}"


def worst_comparisons(verification: Verification) -> list[tuple[str, ...]]:
    """For each graph and case the comparison with the largest difference (NaN is the largest there is)."""
    worst: dict[tuple[str, str], Comparison] = {}
    for comparison in verification.comparisons:
        key = (comparison.graph, comparison.case)
        if key not in worst or not comparison.max_abs <= worst[key].max_abs:
            worst[key] = comparison
    return [
        (graph, case, f"{row.max_abs:.3g}", f"{row.cosine_distance:.3g}", row.shape)
        for (graph, case), row in worst.items()
    ]


def rank_rows(ranks: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Agreement of both directions, then of ITM decisions."""
    ways = [ranks[way] for way in WAYS]
    itm = ranks["itm"]
    rows = [
        ("queries", *(f"{way['queries']:,}" for way in ways)),
        ("same first result", *(f"{way['top1_agreement']:.2f} %" for way in ways)),
        ("… other, and no tie", *(f"{way['first_changed_outside_ties']:,}" for way in ways)),
        ("overlap of the 10 best", *(f"{way['overlap_10']:.2f} %" for way in ways)),
        ("overlap of the 64 best", *(f"{way['overlap_64']:.2f} %" for way in ways)),
        ("Kendall τ of the shortlist, mean", *(f"{way['kendall_tau']:.5f}" for way in ways)),
        ("… least", *(f"{way['kendall_tau_least']:.5f}" for way in ways)),
        ("pairs moved that are no tie", *(f"{way['pairs_moved_outside_ties']:,} of {way['pairs']:,}" for way in ways)),
        ("largest difference, ITC", f"{ranks['itc']['largest_difference']:.3g}", ""),
        ("largest difference, ITM", f"{itm['largest_difference']:.3g}", ""),
        ("ITM decisions that flip", f"{itm['flipped']:,} of {itm['pairs']:,}", ""),
    ]
    return [*rows, ("… and are no tie", f"{itm['flipped_outside_ties']:,}", "")]


def tie_words(ranks: Mapping[str, Any]) -> str:
    """What a tie is, with its width."""
    widths = ranks["tie_widths"]
    return (
        f"A tie: the reference's scores of two candidates differ by less than {widths['final']:.3g}, twice what one "
        f"score may move in this precision ({widths['itc']:.3g} for a place on the ITC shortlist, "
        f"{widths['decision']:.3g} "
        "of a match logit around 0)."
    )


def recall_rows(changes: Mapping[str, Mapping[str, float | None]]) -> list[tuple[str, ...]]:
    """metric, reference, here, difference in points, interval."""
    return [
        (
            metric_name(name),
            *(number(one[key], ".2f") for key in ("reference", "deployed")),
            number(one["difference"], "+.2f"),
            UNDEFINED if one["low"] is None else f"{one['low']:+.2f} … {one['high']:+.2f}",
        )
        for name, one in changes.items()
    ]


def metric_name(name: str) -> str:
    """`small_r1` → `small R@1`, `mr5` → `mR@5`."""
    head, _, cut = name.rpartition("r")
    return f"{head.replace('_', ' ')}R@{cut}"


def number(value: float | None, form: str) -> str:
    return UNDEFINED if value is None else format(value, form)
