"""`reports/eval.html`: one self-contained page."""

from __future__ import annotations

import html

from qpert.runtime.evaluation.metrics import CUTS
from qpert.runtime.evaluation.result import Evaluation
from qpert.runtime.evaluation.tables import (
    WAYS,
    Table,
    bin_name,
    bin_table,
    notes,
    percent,
    published_table,
    recall_table,
    run_words,
    stage,
    way_of,
)

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>qpert eval: {title}</title>
<style>
:root {{ color-scheme: light dark; --line: #8884; --soft: #8882; --t2i: #2f6fdb; --i2t: #d9822b; --before: #8886 }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem }}
h1 {{ font-size: 1.5rem; margin-bottom: .2rem }} h2 {{ font-size: 1.1rem; margin: 2.2rem 0 .6rem }}
.said {{ margin: .2rem 0; opacity: .8 }}
.cards {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 1rem; margin-top: 1.4rem }}
.card {{ border: 1px solid var(--line); border-radius: .6rem; padding: 1rem 1.2rem }}
.card h3 {{ margin: 0 0 .6rem; font-size: 1rem }}
.measure {{ display: grid; grid-template-columns: 3.4rem 1fr 4rem; align-items: center; gap: .6rem; margin: .35rem 0 }}
.measure b {{ text-align: right; font-variant-numeric: tabular-nums }}
.track {{ background: var(--soft); border-radius: .3rem; height: .9rem; position: relative; overflow: hidden }}
.track i {{ position: absolute; inset: 0 auto 0 0; border-radius: .3rem }}
.track u {{ position: absolute; top: 0; bottom: 0; width: 2px; background: CanvasText }}
.t2i i {{ background: var(--t2i) }} .i2t i {{ background: var(--i2t) }}
.wide {{ overflow-x: auto }}
table {{ border-collapse: collapse; width: 100%; font-size: .93em }}
td, th {{ text-align: left; padding: .3rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top }}
th {{ font-weight: 600 }}
td.number, th.number {{ text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }}
tr:last-child.own td {{ font-weight: 600 }}
svg {{ width: 100%; height: auto }} svg text {{ font: 11px system-ui, sans-serif; fill: CanvasText }}
li {{ margin: .2rem 0 }}
</style>
<h1>{title}</h1>
{lead}
{cards}
<p class="said">The mark in a bar is ITC alone; the bar is {stage}.</p>
{recall}
<h2>{bins_title}</h2>
{chart}
{bins}
{published}
<h2>To be read with it</h2>
<ul>{notes}</ul>
<h2>Run</h2>
{run}
</html>
"""


def render(evaluation: Evaluation) -> str:
    """The page of an evaluation: headline, recall, size bins, published figures, settings."""
    dataset, bins, published = evaluation.data.dataset, bin_table(evaluation), published_table(evaluation)
    title = evaluation.data.title or str(dataset.root)
    lead = [
        f"{len(dataset):,} images, {len(dataset.captions):,} texts, {evaluation.itm_pairs:,} pairs matched. "
        f"{run_words(evaluation)}.",
        f"Boxes that perturb: {evaluation.data.boxes_from}. Boxes that sort: {evaluation.data.bins_from}.",
    ]
    ties = "Ranks are by score; of equal scores the lower index comes first."
    return PAGE.format(
        title=html.escape(title),
        lead="\n".join(f'<p class="said">{html.escape(line)}</p>' for line in lead),
        cards=cards(evaluation),
        stage=html.escape(stage(evaluation)),
        recall=section(recall_table(evaluation)),
        bins_title=html.escape(bins.title),
        chart=bin_chart(evaluation),
        bins=markup(bins),
        published=section(published, own=True) if published else "",
        notes="".join(f"<li>{html.escape(note)}</li>" for note in [*notes(evaluation), ties]),
        run=markup(run_table(evaluation)),
    )


def cards(evaluation: Evaluation) -> str:
    """One card a direction: R@1, R@5, R@10 as bars."""
    made = []
    for way, words in WAYS.items():
        final, alone = way_of(evaluation.metrics, way).recall, way_of(evaluation.itc, way).recall
        rows = "".join(measure(f"R@{cut}", final[cut], alone[cut]) for cut in CUTS)
        queries = way_of(evaluation.metrics, way).queries
        made.append(f'<div class="card {way}"><h3>{words} · {queries:,} queries</h3>{rows}</div>')
    return f'<div class="cards">{"".join(made)}</div>'


def measure(name: str, value: float | None, before: float | None) -> str:
    bar = f'<i style="width: {value:.2f}%"></i>' if value is not None else ""
    mark = f'<u style="left: calc({before:.2f}% - 1px)"></u>' if before is not None else ""
    return (
        f'<div class="measure"><span>{name}</span><span class="track">{bar}{mark}</span><b>{percent(value)}</b></div>'
    )


def bin_chart(evaluation: Evaluation) -> str:
    """R@1 in the ten bins, both directions, as bars; empty bins say so."""
    step, height, base = 92, 150, 175
    parts = []
    for percents in (0, 50, 100):
        y = base - percents * height / 100
        parts.append(f'<path d="M30 {y:g}H960" stroke="var(--line)"/><text x="0" y="{y + 4:g}">{percents}</text>')
    for number in range(len(evaluation.metrics.t2i.bins)):
        left = 36 + number * step
        for offset, way in enumerate(WAYS):
            one = way_of(evaluation.metrics, way).bins[number]
            value = one.recall[1]
            if value is not None:
                tall = value * height / 100
                parts.append(
                    f'<rect x="{left + 36 * offset}" y="{base - tall:.1f}" width="32" height="{tall:.1f}" rx="3" '
                    f'fill="var(--{way})"><title>{way} {value:.2f} % of {one.queries:,} queries</title></rect>'
                )
        images = evaluation.metrics.t2i.bins[number].images
        parts.append(f'<text x="{left + 34}" y="192" text-anchor="middle">{bin_name(number)}</text>')
        parts.append(f'<text x="{left + 34}" y="207" text-anchor="middle" opacity=".7">{images:,} images</text>')
    return (
        '<svg viewBox="0 0 965 212" role="img" aria-label="R@1 by size of the largest object">'
        + "".join(parts)
        + '</svg><p class="said">R@1, in percent: <span style="color: var(--t2i)">■</span> text → image '
        '<span style="color: var(--i2t)">■</span> image → text</p>'
    )


def run_table(evaluation: Evaluation) -> Table:
    """Settings, times and versions."""
    seconds = {f"seconds: {name}": f"{value:,.1f}" for name, value in evaluation.seconds.items()}
    resumed = {f"computed before: {name}": f"{count:,}" for name, count in evaluation.resumed.items() if count}
    settings = {f"perturbation: {name}": str(value) for name, value in evaluation.perturbation.to_dict().items()}
    rows = tuple((settings | seconds | resumed | evaluation.environment).items())
    return Table("Run", ("", ""), rows, words=2)


def section(table: Table, *, own: bool = False) -> str:
    return f"<h2>{html.escape(table.title)}</h2>{markup(table, own=own)}"


def markup(table: Table, *, own: bool = False) -> str:
    """An HTML table; `own` marks the last row as this run's."""

    def cell(tag: str, place: int, text: str) -> str:
        kind = ' class="number"' if place >= table.words else ""
        return f"<{tag}{kind}>{html.escape(text)}</{tag}>"

    head = "".join(cell("th", place, text) for place, text in enumerate(table.head))
    kind = ' class="own"' if own else ""
    rows = "".join(
        f"<tr{kind}>{''.join(cell('td', place, text) for place, text in enumerate(row))}</tr>" for row in table.rows
    )
    legend = "".join(f'<p class="said">{html.escape(line)}</p>' for line in table.legend)
    return f'<div class="wide"><table><tr>{head}</tr>{rows}</table></div>{legend}'
