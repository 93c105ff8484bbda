"""The comparison page: methods side by side, what chance can explain of their differences, and the paper's Table A."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from qpert.runtime.evaluation import bootstrap
from qpert.runtime.evaluation.methods.choices import FIXED, LABELS, MEANINGS, Method
from qpert.runtime.evaluation.methods.comparison import REFERENCES, Comparison, table_a
from qpert.runtime.evaluation.methods.differences import Contrast, Difference
from qpert.runtime.evaluation.metrics import BINS, CUTS, DIRECTIONS, SMALL_BIN, RetrievalMetrics
from qpert.runtime.evaluation.report import bins_of, evaluation_report, notes, percent, recall_cells, run_facts, way_of
from qpert.runtime.evaluation.report import stage as stage_name
from qpert.runtime.evaluation.result import Evaluation
from qpert.runtime.report import charts
from qpert.runtime.report import model as m

TONES: dict[Method, m.Tone] = {"none": "third", "q-pert": "first", "or-q-pert": "fourth", "oes": "second"}
METRICS = tuple(f"{kind}R@{cut}" for kind in ("", "m", "small ") for cut in CUTS)
"""In the order of `recall_cells`."""
TABLE_A = {"small_r1": "small R@1", "r1": "R@1", "r5": "R@5", "mr1": "mR@1", "mr5": "mR@5"}
WORDS = {1: "better", 0: "not told apart", -1: "worse"}


def comparison_report(comparison: Comparison) -> m.Report:
    """The whole page; of one method its own report, with the choices and Table A below."""
    first = comparison.evaluations[0]
    added = (m.Section("What the paper leaves open", (choices_list(comparison),)), table_a_section(comparison))
    if len(comparison.evaluations) == 1:
        own = evaluation_report(first)
        return m.Report(own.title, (f"{LABELS[first.method]}: ", *m.spans(own.heading)), (*own.blocks, *added))
    title = first.data.title or str(first.data.dataset.root)
    blocks = [*opening(comparison)]
    for stage in dict.fromkeys((comparison.stage, "itc")):
        blocks += [
            m.Section(
                f"Recall, in percent: {scored_by(first, stage)}",
                (*(recall_table(comparison, way, stage) for way in DIRECTIONS), recall_legend(first)),
            ),
            m.Section(f"Differences, in points: {scored_by(first, stage)}", tuple(differences(comparison, stage))),
        ]
    blocks += [by_size(comparison, way) for way in DIRECTIONS]
    facts = m.Section("Run", (m.pairs(run_facts(comparison.evaluation(main_method(comparison)))),), details=True)
    return m.Report(f"qpert eval: {title}, methods compared", title, (*blocks, *added, notes_section(first), facts))


def main_method(comparison: Comparison) -> Method:
    """The method whose settings the page lists: q-pert where it is compared."""
    return "q-pert" if "q-pert" in comparison.methods else comparison.methods[0]


def scored_by(one: Evaluation, stage: str) -> str:
    return stage_name(one.rerank if stage == "final" else 0)


def opening(comparison: Comparison) -> Iterator[m.Block]:
    """What was run, and what can be said of the perturbation."""
    first, main = comparison.evaluations[0], comparison.evaluation(main_method(comparison))
    if main.notice is not None:
        yield m.Paragraph(main.notice, "unsure")
    checkpoint = first.environment.get("checkpoint", "this bundle")
    names = ", ".join(LABELS[method] for method in comparison.methods)
    boxes = next((one.data.boxes_from for one in comparison.evaluations if one.method != "none"), "no boxes")
    yield from m.paragraphs(
        f"{checkpoint}, {len(first.data.dataset):,} images, {len(first.data.dataset.captions):,} texts. "
        f"Compared: {names}.",
        f"Boxes: {boxes}. Boxes that sort: {first.data.bins_from}.",
        tone="quiet",
    )
    for stage in dict.fromkeys((comparison.stage, "itc")):
        yield verdicts(comparison, stage)


def verdicts(comparison: Comparison, stage: str) -> m.Section:
    """R@1 of every other method against q-pert (or against the reference), in words and numbers."""
    against = main_method(comparison)
    found = {
        (method, name): comparison.contrast(method, against, stage).metrics[way]["r1"]
        for method in comparison.methods
        if method != against
        for way, name in DIRECTIONS.items()
    }
    rows = tuple(verdict_row(*named, one) for named, one in found.items())
    legend = (
        f"difference of R@1 to {LABELS[against]} in points, and its {bootstrap.LEVEL} % interval from "
        f"{bootstrap.RESAMPLES:,} draws of pictures (paired: all methods on the same draws; not corrected for several "
        "comparisons)",
    )
    title = f"Against {LABELS[against]}: {scored_by(comparison.evaluations[0], stage)}"
    table = m.Table(("method", "direction", "", "R@1"), rows, words=3, legend=legend)
    return m.Section(title, (plain_words(found, against), table))


def plain_words(found: Mapping[tuple[Method, str], Difference], against: Method) -> m.Paragraph:
    """One sentence: what is better than `against`, by R@1 with an interval above 0; or that nothing is shown to be."""
    better = [
        f"{LABELS[method]} ({way}, by {one.gain:.2f} points)"
        for (method, way), one in found.items()
        if one.verdict > 0 and one.gain is not None
    ]
    name = LABELS[against]
    if better:
        return m.Paragraph(f"Better than {name} in R@1: {', '.join(better)}.", "bad")
    if all(one.verdict < 0 for one in found.values()):
        return m.Paragraph(f"{name} is better than every other method in R@1, in both directions.", "good")
    return m.Paragraph(f"No other method is shown to be better than {name} in R@1.", "unsure")


def verdict_row(method: Method, way: str, one: Difference) -> tuple[m.Text, ...]:
    """A baseline that is better is bad news for the perturbation."""
    tones: dict[int, m.Tone] = {1: "bad", 0: "quiet", -1: "good"}
    return LABELS[method], way, m.Badge(WORDS[one.verdict], tones[one.verdict]), points(one)


def points(one: Difference) -> str:
    """The gain, and on a line of its own the interval, short enough for three columns on a phone."""
    if one.gain is None:
        return m.UNDEFINED
    if one.low is None or one.high is None:
        return f"{one.gain:+.2f}"
    return f"{one.gain:+.2f}\n{one.low:.2f}…{one.high:.2f}"


# Recall


def metrics_of(one: Evaluation, stage: str) -> RetrievalMetrics:
    return one.metrics if stage == "final" else one.itc


def recall_table(comparison: Comparison, way: str, stage: str) -> m.Section:
    """One direction: R@K, mR@K and small R@K of each method."""
    columns = [recall_cells(way_of(metrics_of(one, stage), way)) for one in comparison.evaluations]
    head = ("", *(LABELS[method] for method in comparison.methods))
    return m.Section(DIRECTIONS[way], (m.Table(head, tuple(zip(METRICS, *columns, strict=True))),))


def recall_legend(one: Evaluation) -> m.Paragraph:
    small = one.metrics.t2i.bins[SMALL_BIN]
    return m.Paragraph(
        f"mR@K: harmonic mean over the ten size bins; small: the first bin, {small.images:,} images with "
        f"{small.queries:,} texts",
        "quiet",
    )


# Differences


def reference(comparison: Comparison) -> Method:
    """What the others are compared against: no boxes, else q-pert, else the first."""
    return next((method for method in REFERENCES if method in comparison.methods), comparison.methods[0])


def differences(comparison: Comparison, stage: str) -> Iterator[m.Block]:
    """Charts and numbers of every other method, in both directions."""
    against = reference(comparison)
    others = [method for method in comparison.methods if method != against]
    found = [comparison.contrast(method, against, stage) for method in others]
    yield m.Paragraph(f"less {LABELS[against]}; below each its {bootstrap.LEVEL} % interval", "quiet")
    reach = max([0.1, *(largest(value) for one in found for way in DIRECTIONS for value in headline(one, way))])
    plots = [interval_chart(one, way, reach) for one in found for way in DIRECTIONS]
    yield m.Grid(tuple(plots), 24)
    yield from (difference_table(found, way) for way in DIRECTIONS)


def largest(one: Difference) -> float:
    """How far from 0 a difference or its interval reaches."""
    return max(abs(value) for value in (one.gain or 0.0, one.low or 0.0, one.high or 0.0))


def interval_chart(one: Contrast, way: str, reach: float) -> m.Card:
    """Of one method and direction, on the scale of all."""
    rows = [
        charts.Interval(name, value.gain, value.low, value.high)
        for name, value in zip(METRICS, headline(one, way), strict=True)
        if value.gain is not None and value.low is not None and value.high is not None
    ]
    title = f"{LABELS[one.method]} − {LABELS[one.against]}, {DIRECTIONS[way]}"
    return m.Card((m.Section(title, (charts.interval_plot(rows, title, reach=reach),)),))


def headline(one: Contrast, way: str) -> list[Difference]:
    """In the order of `METRICS`; where mR@K is undefined, so is its difference."""
    return [one.metrics[way][f"{prefix}{cut}"] for prefix in ("r", "mr", "small_r") for cut in CUTS]


def difference_table(found: Sequence[Contrast], way: str) -> m.Section:
    columns = [tuple(map(points, headline(one, way))) for one in found]
    head = ("", *(LABELS[one.method] for one in found))
    return m.Section(DIRECTIONS[way], (m.Table(head, tuple(zip(METRICS, *columns, strict=True))),))


# Size bins


def by_size(comparison: Comparison, way: str) -> m.Section:
    """R@1 in the ten size bins: bars, values, differences."""
    first, against = comparison.evaluations[0], reference(comparison)
    bins = [[way_of(one.metrics, way).bins[number] for one in comparison.evaluations] for number in range(BINS)]
    names = [name for name, _, _ in bins_of(first)]
    groups = [
        (name, f"{row[0].images:,} images", tuple(one.recall[1] for one in row))
        for name, row in zip(names, bins, strict=True)
    ]
    series = [(LABELS[method], TONES[method]) for method in comparison.methods]
    title = f"{DIRECTIONS[way]} R@1 by size of the largest object"
    values = tuple(
        (name, f"{row[0].images:,}", *(percent(one.recall[1]) for one in row))
        for name, row in zip(names, bins, strict=True)
    )
    others = [method for method in comparison.methods if method != against]
    found = [comparison.contrast(method, against, comparison.stage).bins[way] for method in others]
    rows = tuple(
        (name, *(points(one) for one in row)) for name, row in zip(names, zip(*found, strict=True), strict=True)
    )
    head = ("largest object", "images", *(LABELS[method] for method in comparison.methods))
    gains = ("largest object", *(f"{LABELS[method]} − {LABELS[against]}" for method in others))
    return m.Section(
        f"{title}: {scored_by(first, comparison.stage)}",
        (charts.bar_chart(groups, series, title), m.Grid((m.Table(head, values), m.Table(gains, rows)), 24)),
    )


# The paper, choices, notes


def table_a_section(comparison: Comparison) -> m.Section:
    """The paper's figures, and this run's below each."""
    document = table_a()
    rows: list[tuple[m.Text, ...]] = []
    for one in comparison.evaluations:
        paper, ours = document["rows"][one.method], own_table_a(one)
        rows.append((f"{LABELS[one.method]}, paper", *(percent(paper[name]) for name in TABLE_A)))
        rows.append((f"{LABELS[one.method]}, this run", *(percent(ours[name]) for name in TABLE_A)))
    legend = (
        f"paper: {document['about']} ({document['source']}); numbers of another model and other pictures, unless "
        "the run says the same: only their order can be compared",
    )
    title = "The paper's Table A, text → image, and this run"
    return m.Section(title, (m.Table(("", *TABLE_A.values()), tuple(rows), legend=legend),))


def own_table_a(one: Evaluation) -> dict[str, float | None]:
    t2i = one.metrics.t2i
    small = t2i.bins[SMALL_BIN].recall[1]
    return {
        "small_r1": small,
        "r1": t2i.recall[1],
        "r5": t2i.recall[5],
        "mr1": t2i.mean_recall[1],
        "mr5": t2i.mean_recall[5],
    }


def choices_list(comparison: Comparison) -> m.Bullets:
    """Each method with what it does, the options that were in effect, and what else we decided."""
    lines = []
    for one in comparison.evaluations:
        chosen = "; ".join(f"--{name} {value}" for name, value in one.choices.of(one.method).items())
        parts = filter(None, (MEANINGS[one.method], chosen, FIXED.get(one.method)))
        lines.append((m.Bold(f"{LABELS[one.method]}: "), ". ".join(parts)))
    return m.Bullets(tuple(lines))


def notes_section(one: Evaluation) -> m.Section:
    return m.Section("Notes", (m.Bullets(tuple(notes(one))),))
