"""The tables of an evaluation, for the terminal and for the page: plain cells, formatted once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qpert.runtime.evaluation.metrics import BINS, CUTS, SMALL_BIN, DirectionMetrics, RetrievalMetrics
from qpert.runtime.evaluation.result import Evaluation

UNDEFINED = "–"
WAYS = {"t2i": "text → image", "i2t": "image → text"}


@dataclass(frozen=True)
class Table:
    """A table; all columns but the first `words` hold numbers. `legend`: lines that explain its rows."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: int = 1
    legend: tuple[str, ...] = ()


def percent(value: float | None) -> str:
    """Two digits, as the paper prints them."""
    return UNDEFINED if value is None else f"{value:.2f}"


def stage(evaluation: Evaluation) -> str:
    """What the headline numbers are of."""
    return f"ITC + ITM on the best {evaluation.rerank}" if evaluation.rerank else "ITC alone"


def recall_table(evaluation: Evaluation) -> Table:
    """R@K, mR@K and the small bin of both directions: ITC alone, and re-ranked."""
    measured = {"ITC": evaluation.itc} | ({"ITC + ITM": evaluation.metrics} if evaluation.rerank else {})
    columns = [
        (f"{way} {label}", recall_cells(way_of(metrics, way))) for way in WAYS for label, metrics in measured.items()
    ]
    names = [*(f"R@{cut}" for cut in CUTS), *(f"mR@{cut}" for cut in CUTS), *(f"small R@{cut}" for cut in CUTS)]
    rows = tuple((name, *(cells[place] for _, cells in columns)) for place, name in enumerate(names))
    small = evaluation.metrics.t2i.bins[SMALL_BIN]
    legend = (
        f"t2i: text → image, i2t: image → text; {stage(evaluation)} of each query",
        f"mR@K: harmonic mean over the ten size bins; small: the first bin, {small.images:,} images with "
        f"{small.queries:,} texts",
    )
    return Table("Recall, in percent", ("", *(head for head, _ in columns)), rows, legend=legend)


def recall_cells(way: DirectionMetrics) -> tuple[str, ...]:
    """In the order of the rows of `recall_table`."""
    small = way.bins[SMALL_BIN].recall
    return tuple(percent(found[cut]) for found in (way.recall, way.mean_recall, small) for cut in CUTS)


def way_of(metrics: RetrievalMetrics, way: str) -> DirectionMetrics:
    return metrics.t2i if way == "t2i" else metrics.i2t


def bin_table(evaluation: Evaluation) -> Table:
    """R@1 in the ten size bins, with their counts."""
    head = ("largest object", "images", "texts", "t2i R@1", "t2i R@10", "i2t R@1", "i2t R@10")
    rows = []
    for number in range(BINS):
        t2i, i2t = evaluation.metrics.t2i.bins[number], evaluation.metrics.i2t.bins[number]
        recalls = [percent(one.recall[cut]) for one in (t2i, i2t) for cut in (1, 10)]
        rows.append((bin_name(number), f"{t2i.images:,}", f"{t2i.queries:,}", *recalls))
    return Table(f"By size of the largest object ({evaluation.data.bins_from})", head, tuple(rows))


def bin_name(number: int) -> str:
    return f"{number * 100 // BINS}–{(number + 1) * 100 // BINS} %"


def published_table(evaluation: Evaluation) -> Table | None:
    """The published figures of this data set above this run's, or None where there are none."""
    published = evaluation.published
    if published is None:
        return None
    head = ("", "t2i R@1", "R@10", "mR@1", "small", "i2t R@1", "R@10", "mR@1")
    rows, legend = [], []
    for number, row in enumerate(published.rows, start=1):
        rows.append((f"[{number}] {row.source}", *published_cells(row.t2i, row.i2t, row.small)))
        legend.append(f"[{number}] {row.label}: {row.setting} ({row.where} of the {row.source})")
    ours: Mapping[str, Any] = evaluation.metrics.to_dict()
    rows.append(("this run", *published_cells(ours["t2i"], ours["i2t"], ours["small"])))
    legend.append(f"this run: {run_words(evaluation)}")
    legend.append(f"{published.about} There, {published.bins}.")
    return Table(f"{published.title}: published, and this run", head, tuple(rows), legend=tuple(legend))


def published_cells(
    t2i: Mapping[str, Any], i2t: Mapping[str, Any], small: Mapping[str, Mapping[str, Any]]
) -> tuple[str, ...]:
    """In the order of the columns of `published_table`."""
    values = [t2i.get("r1"), t2i.get("r10"), t2i.get("mr1"), small.get("t2i", {}).get("r1")]
    return tuple(percent(value) for value in [*values, i2t.get("r1"), i2t.get("r10"), i2t.get("mr1")])


def run_words(evaluation: Evaluation) -> str:
    """The setting of this run in a line."""
    one = evaluation.perturbation
    checkpoint = evaluation.environment.get("checkpoint", "this bundle")
    if one.stages == "none" or not any(map(len, evaluation.data.boxes)):
        return f"{checkpoint}, {stage(evaluation)}, no boxes"
    weight = f"α {one.alpha:g}, β {one.beta:g}, γ {one.gamma:g}, τ {one.threshold:g}"
    where = "ITC" if one.stages == "itc" else "ITC and ITM"
    return f"{checkpoint}, {stage(evaluation)}, {where} perturbed: {weight}, {one.reduction} over boxes, {one.coverage}"


def notes(evaluation: Evaluation) -> list[str]:
    """What a reader has to know beside the numbers: reasons for what is undefined, images without boxes, ties."""
    found = []
    for way, words in WAYS.items():
        reasons = way_of(evaluation.metrics, way).reasons
        for reason in dict.fromkeys(reasons.values()):
            cuts = ", ".join(f"mR@{cut}" for cut, why in reasons.items() if why == reason)
            found.append(f"{words}: {cuts} undefined, {reason}")
    if evaluation.metrics.unbinned:
        found.append(f"{evaluation.metrics.unbinned:,} images have no boxes: they count in R@K and in no size bin")
    return found
