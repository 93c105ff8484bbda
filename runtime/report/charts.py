"""Charts as inline SVG without scripts or files, readable in light and dark mode. `html.STYLE` colours them."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qpert.runtime.report.model import Chart, Tone

SMALLEST = 1e-9
"""Smaller differences are drawn at this edge: a logarithmic axis has no zero."""
LEAST_WIDTH = 0.75
"""Share of a chart's own width, in pixels: on a phone it scrolls sideways instead of shrinking further."""


@dataclass(frozen=True)
class Row:
    """One line of an error plot: its name, its values, and the limit (None: not judged)."""

    name: str
    values: tuple[float, ...]
    limit: float | None


def error_plot(rows: Sequence[Row], what: str) -> Chart:
    """Values as dots on a logarithmic axis, one line per row, with the limit as a dashed line."""
    left, right, step = 230, 880, 22
    largest = max([1e-6, *(value for row in rows for value in row.values if math.isfinite(value))])
    largest = max(largest, *(row.limit or 0 for row in rows))
    top = math.ceil(math.log10(largest))

    def place(value: float) -> float:
        if not math.isfinite(value):
            return right
        share = (math.log10(max(value, SMALLEST)) - math.log10(SMALLEST)) / (top - math.log10(SMALLEST))
        return left + share * (right - left)

    bottom = 20 + step * len(rows)
    parts = []
    for exponent in range(int(math.log10(SMALLEST)), top + 1, 1 if top < -3 else 2):
        x = place(10.0**exponent)
        parts.append(f'<path class="axis" d="M{x:.0f} 14V{bottom}"/>')
        parts.append(f'<text x="{x:.0f}" y="{bottom + 14}" text-anchor="middle">1e{exponent}</text>')
    for number, row in enumerate(rows):
        y = 24 + step * number
        parts.append(f'<text x="{left - 10}" y="{y + 4}" text-anchor="end">{html.escape(row.name)}</text>')
        if row.limit:
            x = place(row.limit)
            parts.append(f'<path class="limit" d="M{x:.1f} {y - 9}v18"><title>limit {row.limit:.3g}</title></path>')
        for value in row.values:
            over = row.limit is not None and not value <= row.limit
            parts.append(
                f'<circle class="point{" over" if over else ""}" cx="{place(value):.1f}" cy="{y}" r="4">'
                f"<title>{value:.3g}</title></circle>"
            )
    return drawing(960, bottom + 20, what, parts)


def scatter(reference: npt.NDArray[np.float32], deployed: npt.NDArray[np.float32], width: float) -> Chart:
    """The same pairs' scores on both axes; a point is red where they differ by more than `width`."""
    size, left, base = 420, 60, 440
    both = np.concatenate([reference, deployed])
    low, high = (float(np.nanmin(both)), float(np.nanmax(both))) if len(both) else (0.0, 1.0)
    margin = 0.04 * (high - low) or 1.0
    low, high = low - margin, high + margin

    def scaled(value: float) -> float:
        return size * (value - low) / (high - low)

    parts = [
        f'<path class="axis" d="M{left} {base - size}V{base}H{left + size}M{left} {base}L{left + size} {base - size}"/>'
    ]
    for value in np.linspace(low + margin, high - margin, 5):
        at = scaled(float(value))
        parts.append(f'<text x="{left + at:.0f}" y="{base + 15}" text-anchor="middle">{value:.2g}</text>')
        parts.append(f'<text x="{left - 6}" y="{base - at + 4:.0f}" text-anchor="end">{value:.2g}</text>')
    for expected, got in zip(reference.tolist(), deployed.tolist(), strict=True):
        over = " over" if not abs(expected - got) <= width else ""
        parts.append(
            f'<circle class="point{over}" cx="{left + scaled(expected):.1f}" cy="{base - scaled(got):.1f}" r="2"/>'
        )
    parts.append(f'<text x="{left + size / 2}" y="{base + 34}" text-anchor="middle">score by the reference</text>')
    parts.append(f'<text x="{left + 8}" y="{base - size + 10}">score here</text>')
    return drawing(left + size + 20, base + 40, "scores of the same pairs, by the reference and here", parts)


@dataclass(frozen=True)
class Interval:
    """A difference in points with its interval."""

    name: str
    value: float
    low: float
    high: float


def interval_plot(rows: Sequence[Interval], what: str, *, reach: float = 0.1) -> Chart:
    """Differences around zero with their intervals. The axis reaches at least to ±`reach`."""
    left, right, step = 100, 410, 30
    reach = max([reach, *(abs(number) for row in rows for number in (row.value, row.low, row.high))]) * 1.1
    middle, bottom = (left + right) / 2, 20 + step * len(rows)

    def place(value: float) -> float:
        return middle + value / reach * (right - left) / 2

    parts = [f'<path class="axis" d="M{middle:.0f} 10V{bottom}"/>']
    for value in (-reach / 1.1, 0.0, reach / 1.1):
        parts.append(f'<text x="{place(value):.0f}" y="{bottom + 14}" text-anchor="middle">{signed(value)}</text>')
    for number, row in enumerate(rows):
        y = 24 + step * number
        parts.append(f'<text x="{left - 10}" y="{y + 4}" text-anchor="end">{html.escape(row.name)}</text>')
        parts.append(f'<path class="interval" d="M{place(row.low):.1f} {y}H{place(row.high):.1f}"/>')
        parts.append(
            f'<circle class="point" cx="{place(row.value):.1f}" cy="{y}" r="5"><title>{row.value:+.3f}</title></circle>'
        )
    return drawing(440, bottom + 20, what, parts)  # so that a phone shows it whole


def signed(value: float) -> str:
    return (f"{value:+.0f}" if abs(value) >= 100 else f"{value:+.2g}") if value else "0"


def bar_chart(
    groups: Sequence[tuple[str, str, tuple[float | None, ...]]], series: Sequence[tuple[str, Tone]], what: str
) -> Chart:
    """Percentages in groups of bars. groups: name, a note below it, a value for each of `series`; None is undefined."""
    step, height, base = 92, 150, 175
    wide = (step - 20) // len(series)
    parts = []
    for percents in (0, 50, 100):
        y = base - percents * height / 100
        parts.append(f'<path class="axis" d="M30 {y:g}H{40 + step * len(groups)}"/>')
        parts.append(f'<text x="0" y="{y + 4:g}">{percents}</text>')
    for number, (name, note, values) in enumerate(groups):
        left = 36 + number * step
        for offset, ((label, tone), value) in enumerate(zip(series, values, strict=True)):
            if value is not None:
                tall = value * height / 100
                parts.append(
                    f'<rect class="{tone}" x="{left + wide * offset}" y="{base - tall:.1f}" width="{wide - 4}" '
                    f'height="{tall:.1f}" rx="3"><title>{html.escape(label)}: {value:.2f} %</title></rect>'
                )
        for y, text in ((192, name), (207, note)):
            parts.append(f'<text x="{left + 34}" y="{y}" text-anchor="middle">{html.escape(text)}</text>')
    for number, (label, tone) in enumerate(series):
        parts.append(f'<rect class="{tone}" x="{36 + 150 * number}" y="222" width="11" height="11" rx="3"/>')
        parts.append(f'<text x="{52 + 150 * number}" y="232">{html.escape(label)}</text>')
    return drawing(45 + step * len(groups), 238, what, parts)


def drawing(width: float, height: float, what: str, parts: Sequence[str]) -> Chart:
    """The SVG element; `what` is its description for screen readers."""
    label, least = html.escape(what), LEAST_WIDTH * width
    return Chart(
        f'<svg class="chart" style="min-width: {least:.0f}px" viewBox="0 0 {width:g} {height:g}" role="img" '
        f'aria-label="{label}">{"".join(parts)}</svg>'
    )
