"""`reports/calibrate.html`: the verdict, a heat map of every setting, the ranking, and what it was measured on."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from qpert.calibration.perturbation.grid import Setting
from qpert.calibration.perturbation.result import Calibration
from qpert.calibration.perturbation.summary import (
    HEAD,
    headline,
    ranking_rows,
    reduction_lines,
    score_name,
    stage,
    verdict,
)
from qpert.runtime.html import document, table

BEST_ROWS = 10
STYLE = """
.verdict { border-left: .3rem solid var(--bad); padding: .1rem 0 .1rem .9rem; font-size: 1.1rem; margin: 1rem 0 }
.verdict.good { border-color: var(--good) } .verdict.chance { border-color: #c77700 }
.maps { display: grid; grid-template-columns: repeat(auto-fit, minmax(26rem, 1fr)); gap: .6rem 1.6rem }
.map { width: 100%; margin: 0 } .map caption { text-align: left; font-weight: 600; padding: .5rem 0 .2rem }
.map th { font-weight: 400; opacity: .75; border: 0; padding: .15rem .5rem .15rem 0 }
.map tr:first-child th { text-align: center; padding-right: 0 }
.map tr th:first-child { text-align: left; width: 4.5rem }
.map td { text-align: center; border: 2px solid Canvas; border-radius: .3rem; padding: .3rem .1rem; font-size: .92em }
.map td.noise { text-decoration: underline dotted; text-underline-offset: .25em }
.map td.best { outline: 2px solid CanvasText; outline-offset: -2px; font-weight: 700 }
.wide { overflow-x: auto } li { margin: .2rem 0 }
"""


def render(found: Calibration) -> str:
    """One self-contained page."""
    data = found.dataset()
    kind = "" if not found.beaten else "chance" if found.none_within_noise else "good"
    lines = "".join(f"<li>{html.escape(line)}</li>" for line in [*verdict(found), *reduction_lines(found)])
    counts = f"{data['images']:,} images, {data['texts']:,} texts, {len(found.result.trials)} settings"
    body = [
        "<h1>Perturbation search</h1>",
        f'<p class="quiet">{html.escape(data["root"])}, split {html.escape(data["split"])}: {counts}; '
        f"{html.escape(data['boxes'])}</p>",
        f'<p class="verdict {kind}">{html.escape(headline(found))}</p>',
        f"<ul>{lines}</ul>",
        f"<h2>{html.escape(score_name(found))}, {html.escape(stage(found))}</h2>",
        f'<p class="quiet">In percent. Green is above no perturbation ({found.value(found.result.none):.2f}), red '
        "below; the deepest colour is the largest difference. Dotted: within chance of the best, which is framed.</p>",
        *(reduction_maps(found, reduction) for reduction in found.grid.reductions),
        f"<h2>The best {BEST_ROWS}</h2>",
        f'<div class="wide">{table(HEAD, escaped(ranking_rows(found, BEST_ROWS)))}</div>',
        '<p class="quiet">mR@1: harmonic mean of R@1 over ten bins of the largest object\'s share of the image; small: '
        "R@1 of the first bin, below a tenth.</p>",
        "<h2>Run</h2>",
        table(("", ""), escaped(run_rows(found))),
    ]
    return document("qpert calibrate", "\n".join(body), STYLE)


def escaped(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    return [[html.escape(cell) for cell in row] for row in rows]


def reduction_maps(found: Calibration, reduction: str) -> str:
    maps = "".join(threshold_map(found, reduction, threshold) for threshold in found.grid.thresholds)
    words = {"sum": "Summed over boxes", "mean": "Averaged over boxes"}[reduction]
    return f'<h3>{words}</h3><div class="maps">{maps}</div>'


def threshold_map(found: Calibration, reduction: str, threshold: float) -> str:
    """α across, weight functions down."""
    largest = max(abs(gain(found, setting)) for setting in found.result.trials) or 1.0
    head = "".join(f"<th>{alpha:g}</th>" for alpha in found.grid.alphas)
    rows = []
    for weight in found.grid.weights:
        part = [
            s for s in found.result.trials if (s.threshold, s.reduction, s.weight) == (threshold, reduction, weight)
        ]
        cells = "".join(cell(found, setting, largest) for setting in part)
        rows.append(f"<tr><th>{html.escape(weight)}</th>{cells}</tr>")
    return f'<table class="map"><caption>τ {threshold:g}</caption><tr><th>α</th>{head}</tr>{"".join(rows)}</table>'


def cell(found: Calibration, setting: Setting, largest: float) -> str:
    points = gain(found, setting)
    colour = "20 128 74" if points > 0 else "192 38 38"
    kinds = [
        *(["best"] if setting == found.best else []),
        *(["noise"] if found.is_within_noise(setting) else []),
    ]
    style = f"background: rgb({colour} / {0.6 * math.sqrt(abs(points) / largest):.3f})"
    title = html.escape(f"{setting}: {points:+.2f} points")
    value = found.value(found.result.trials[setting])
    return f'<td class="{" ".join(kinds)}" style="{style}" title="{title}">{value:.2f}</td>'


def gain(found: Calibration, setting: Setting) -> float:
    return found.value(found.result.trials[setting]) - found.value(found.result.none)


def run_rows(found: Calibration) -> list[tuple[str, str]]:
    """Data, settings that stayed as they were, times and versions."""
    data = {f"data: {name}": str(value) for name, value in found.dataset().items()}
    kept = {f"bundle: {name}": str(value) for name, value in found.exported.to_dict().items()}
    seconds = {f"seconds: {stage}": f"{value:,.1f}" for stage, value in found.result.seconds.items()}
    pairs = {"ITM pairs": f"{found.result.itm_pairs:,}"} if found.rerank else {}
    return list((data | kept | pairs | seconds | found.environment).items())
