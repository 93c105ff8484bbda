"""`reports/quantize.html`: what quantising cost, block by block."""

from __future__ import annotations

import html
from typing import Any

from qpert.runtime.html import document
from qpert.runtime.verification.page import VERDICT_STYLE


def render(report: dict[str, Any]) -> str:
    """The page of one `quantize.json`."""
    precision = report["precision"]
    title = f"{precision} for {report['target']}: {report['verdict']}"
    body = [
        f"<h1>Quantisation <span class='verdict {report['verdict']}'>{report['verdict'].upper()}</span></h1>",
        f"<p>{precision} for {report['target']}; graphs and weights take {report['graph_bytes']['ratio']:.1%} of fp32. "
        f"Ranges from {report['data']['range_images']} images, judged on {report['data']['gate_images']} images and "
        f"{report['data']['gate_captions']} captions ({html.escape(str(report['data']['dataset']))}, "
        f"{html.escape(report['data']['split'])}).</p>",
        "<h2>Gates</h2>",
        table(
            ("gate", "value", "limit", ""),
            [
                (g["name"], number(g["value"]), number(g["limit"]), "pass" if g["pass"] else "FAIL")
                for g in report["gates"]
            ],
        ),
        "<h2>R@1 of ITC, percent</h2>",
        table(
            ("", "text to image", "image to text"),
            [(name, f"{r['t2i']:.2f}", f"{r['i2t']:.2f}") for name, r in report["recall_at_1"].items()],
        ),
        "<h2>Graphs</h2>",
        table(
            ("graph", "form", "products", "weights only", "times fp32's speed here"),
            [
                (
                    name,
                    graph["form"],
                    str(graph.get("products", "")),
                    ", ".join(graph.get("blocks_weights_only", [])),
                    number(graph.get("speed_on_this_cpu")),
                )
                for name, graph in report["graphs"].items()
            ],
        ),
        "<h2>Sensitivity: each block quantised alone, the most sensitive first</h2>",
        table(
            ("graph", "block", "1 − cosine, mean", "worst", "score, worst", "first results kept, %"),
            [
                (
                    cost["graph"],
                    cost["block"],
                    number(cost["cosine_mean"]),
                    number(cost["cosine_worst"]),
                    number(cost["score_worst"]),
                    number(cost["agreement"]),
                )
                for cost in report["sensitivity"]
            ],
        ),
    ]
    return document(title, "\n".join(body), VERDICT_STYLE)


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    if not rows:
        return "<p>Not measured.</p>"
    cells = ["<tr>" + "".join(f"<th>{html.escape(name)}</th>" for name in head) + "</tr>"]
    cells += ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    return "<table>" + "".join(cells) + "</table>"
