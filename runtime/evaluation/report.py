"""The report of an evaluation: headline, recall, size bins, published figures, settings; `reports/eval.{json,html}`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qpert.runtime.evaluation.metrics import (
    BINS,
    CUTS,
    DIRECTIONS,
    SMALL_BIN,
    BinRecall,
    DirectionMetrics,
    RetrievalMetrics,
)
from qpert.runtime.evaluation.result import Evaluation
from qpert.runtime.report import charts
from qpert.runtime.report import model as m

TONES: dict[str, m.Tone] = {"t2i": "first", "i2t": "second"}


def evaluation_report(evaluation: Evaluation) -> m.Report:
    """The whole report."""
    data = evaluation.data
    title = data.title or str(data.dataset.root)
    lead = (
        f"{len(data.dataset):,} images, {len(data.dataset.captions):,} texts, {evaluation.itm_pairs:,} pairs matched. "
        f"{setting(evaluation)}.",
        f"Boxes that perturb: {data.boxes_from}. Boxes that sort: {data.bins_from}.",
    )
    published = published_table(evaluation)
    blocks: list[m.Block] = [
        *([] if evaluation.notice is None else [m.Paragraph(evaluation.notice, "unsure")]),
        *m.paragraphs(*lead, tone="quiet"),
        m.Grid(tuple(card(evaluation, way) for way in DIRECTIONS), 24),
        m.Section("Recall, in percent", (recall_table(evaluation),)),
        m.Section(f"By size of the largest object ({data.bins_from})", (bin_chart(evaluation), bin_table(evaluation))),
    ]
    if published is not None and evaluation.published is not None:
        blocks.append(m.Section(f"{evaluation.published.title}: published, and this run", (published,)))
    blocks.append(m.Section("Notes", (m.Bullets(tuple(notes(evaluation))),)))
    blocks.append(m.Section("Run", (m.pairs(run_facts(evaluation)),), details=True))
    return m.Report(f"qpert eval: {title}", title, tuple(blocks))


def stage(rerank: int) -> str:
    """The stage that gives the headline numbers."""
    return f"ITC + ITM on the best {rerank}" if rerank else "ITC alone"


def percent(value: float | None) -> str:
    """Two digits, as the paper prints them."""
    return m.number(value, ".2f")


def way_of(metrics: RetrievalMetrics, way: str) -> DirectionMetrics:
    return metrics.t2i if way == "t2i" else metrics.i2t


def card(evaluation: Evaluation, way: str) -> m.Card:
    """One direction: R@1, R@5, R@10 as bars, with a mark at ITC alone."""
    final, alone = way_of(evaluation.metrics, way), way_of(evaluation.itc, way)
    rows = []
    for cut in CUTS:
        value, before = final.recall[cut], alone.recall[cut]
        bar = m.Bar((value or 0.0) / 100, TONES[way], None if before is None else before / 100)
        rows.append((f"R@{cut}", bar, percent(value)))
    note = m.Paragraph(f"bar: {stage(evaluation.rerank)}; mark: ITC alone", "quiet")
    table = m.Table(("", "", ""), tuple(rows), words=2)
    return m.Card((m.Section(f"{DIRECTIONS[way]} · {final.queries:,} queries", (table, note)),))


def recall_table(evaluation: Evaluation) -> m.Table:
    """R@K, mR@K and the small bin of both directions: ITC alone, and re-ranked."""
    measured = {"ITC": evaluation.itc} | ({"ITC + ITM": evaluation.metrics} if evaluation.rerank else {})
    columns = {
        f"{way} {label}": recall_cells(way_of(metrics, way))
        for way in DIRECTIONS
        for label, metrics in measured.items()
    }
    names = [f"{kind}R@{cut}" for kind in ("", "m", "small ") for cut in CUTS]
    small = evaluation.metrics.t2i.bins[SMALL_BIN]
    legend = (
        f"t2i: text → image, i2t: image → text; {stage(evaluation.rerank)} of each query",
        f"mR@K: harmonic mean over the ten size bins; small: the first bin, {small.images:,} images with "
        f"{small.queries:,} texts",
    )
    return m.Table(("", *columns), tuple(zip(names, *columns.values(), strict=True)), legend=legend)


def recall_cells(way: DirectionMetrics) -> tuple[str, ...]:
    """In the order of the rows of `recall_table`."""
    small = way.bins[SMALL_BIN].recall
    return tuple(percent(found[cut]) for found in (way.recall, way.mean_recall, small) for cut in CUTS)


# Size bins


def bins_of(evaluation: Evaluation) -> list[tuple[str, BinRecall, BinRecall]]:
    """Name of each size bin, with its recalls in both directions."""
    both = zip(evaluation.metrics.t2i.bins, evaluation.metrics.i2t.bins, strict=True)
    return [(f"{n * 100 // BINS}–{(n + 1) * 100 // BINS}\N{NO-BREAK SPACE}%", *pair) for n, pair in enumerate(both)]


def bin_table(evaluation: Evaluation) -> m.Table:
    """R@1 and R@10 in the ten size bins, with their counts."""
    rows = (
        (name, f"{t2i.images:,}", f"{t2i.queries:,}", *(percent(one.recall[k]) for one in (t2i, i2t) for k in (1, 10)))
        for name, t2i, i2t in bins_of(evaluation)
    )
    return m.Table(("largest object", "images", "texts", "t2i R@1", "t2i R@10", "i2t R@1", "i2t R@10"), tuple(rows))


def bin_chart(evaluation: Evaluation) -> m.Block:
    """R@1 in the ten bins, both directions."""
    groups = [
        (name, f"{t2i.images:,} images", (t2i.recall[1], i2t.recall[1])) for name, t2i, i2t in bins_of(evaluation)
    ]
    series = [(f"R@1, {name}", TONES[way]) for way, name in DIRECTIONS.items()]
    return charts.bar_chart(groups, series, "R@1 by size of the largest object")


# Published figures


def published_table(evaluation: Evaluation) -> m.Table | None:
    """The published figures of this data set above this run's; None if there are none."""
    published = evaluation.published
    if published is None:
        return None
    head = ("", "t2i R@1", "R@10", "mR@1", "small", "i2t R@1", "R@10", "mR@1")
    rows, legend = [], []
    for place, row in enumerate(published.rows, start=1):
        rows.append((f"[{place}] {row.source}", *published_cells(row.t2i, row.i2t, row.small)))
        legend.append(f"[{place}] {row.label}: {row.setting} ({row.where} of the {row.source})")
    ours: Mapping[str, Any] = evaluation.metrics.to_dict()
    rows.append(("this run", *published_cells(ours["t2i"], ours["i2t"], ours["small"])))
    legend += [f"this run: {setting(evaluation)}", f"{published.about} There, {published.bins}."]
    return m.Table(head, tuple(rows), legend=tuple(legend), strong_last=True)


def published_cells(
    t2i: Mapping[str, Any], i2t: Mapping[str, Any], small: Mapping[str, Mapping[str, Any]]
) -> tuple[str, ...]:
    """In the order of the columns of `published_table`."""
    values = [t2i.get("r1"), t2i.get("r10"), t2i.get("mr1"), small.get("t2i", {}).get("r1")]
    return tuple(percent(value) for value in [*values, i2t.get("r1"), i2t.get("r10"), i2t.get("mr1")])


# Settings


def setting(evaluation: Evaluation) -> str:
    """The setting of this run, in one line."""
    one = evaluation.perturbation
    checkpoint, scored = evaluation.environment.get("checkpoint", "this bundle"), stage(evaluation.rerank)
    if evaluation.method == "oes":
        chosen = ", ".join(f"{name} {value}" for name, value in evaluation.choices.of("oes").items())
        return f"{checkpoint}, {scored}, object embeddings: {chosen}"
    if one.stages == "none" or not any(map(len, evaluation.data.boxes)):
        return f"{checkpoint}, {scored}, no boxes"
    weight = f"α {one.alpha:g}, β {one.beta:g}, γ {one.gamma:g}, τ {one.threshold:g}"
    where = "ITC" if one.stages == "itc" else "ITC and ITM"
    return f"{checkpoint}, {scored}, {where} perturbed: {weight}, {one.reduction} over boxes, {one.coverage}"


def notes(evaluation: Evaluation) -> list[str]:
    """What a reader must know besides the numbers: why metrics are undefined, images without boxes, ties."""
    found = []
    for way, name in DIRECTIONS.items():
        reasons = way_of(evaluation.metrics, way).reasons
        for reason in dict.fromkeys(reasons.values()):
            cuts = ", ".join(f"mR@{cut}" for cut, why in reasons.items() if why == reason)
            found.append(f"{name}: {cuts} undefined, {reason}")
    if evaluation.metrics.unbinned:
        found.append(f"{evaluation.metrics.unbinned:,} images have no boxes: they count in R@K and in no size bin")
    return [*found, "Ranks are by score; among equal scores the lower index comes first."]


def run_facts(evaluation: Evaluation) -> dict[str, str]:
    """Settings, times and versions."""
    settings = {f"perturbation: {name}": str(value) for name, value in evaluation.perturbation.to_dict().items()}
    seconds = {f"seconds: {name}": f"{value:,.1f}" for name, value in evaluation.seconds.items()}
    resumed = {f"resumed: {name}": f"{count:,}" for name, count in evaluation.resumed.items() if count}
    return settings | seconds | resumed | evaluation.environment
