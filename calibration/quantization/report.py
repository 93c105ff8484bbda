"""`reports/quantize.html`: the cost of quantising, block by block."""

from __future__ import annotations

from typing import Any

from qpert.runtime.report.model import Paragraph, Report, Section, Table, number, verdict_badge


def quantization_report(report: dict[str, Any]) -> Report:
    """The report of one `quantize.json`."""
    data, what = report["data"], f"{report['precision']} for {report['target']}"
    lead = (
        f"{what}; graphs and weights take {report['graph_bytes']['ratio']:.1%} of fp32. Ranges from "
        f"{data['range_images']} images, judged on {data['gate_images']} images and {data['gate_captions']} captions "
        f"({data['dataset']}, {data['split']})."
    )
    costs = Section(
        "Sensitivity: each block quantised alone, the most sensitive first",
        (cost_table(report) if report["sensitivity"] else Paragraph("Not measured."),),
        details=True,
    )
    blocks = (
        Paragraph(lead),
        Section("Gates", (gate_table(report),)),
        Section("R@1 of ITC, percent", (recall_table(report),)),
        Section("Graphs", (graph_table(report),)),
        costs,
    )
    heading = ("Quantisation: ", verdict_badge(report["verdict"] == "pass", loud=True))
    return Report(f"{what}: {report['verdict']}", heading, blocks)


def gate_table(report: dict[str, Any]) -> Table:
    rows = (
        (gate["name"], digits(gate["value"]), digits(gate["limit"]), verdict_badge(gate["pass"]))
        for gate in report["gates"]
    )
    return Table(("gate", "value", "limit", ""), tuple(rows))


def recall_table(report: dict[str, Any]) -> Table:
    rows = ((name, f"{one['t2i']:.2f}", f"{one['i2t']:.2f}") for name, one in report["recall_at_1"].items())
    return Table(("", "text → image", "image → text"), tuple(rows))


def graph_table(report: dict[str, Any]) -> Table:
    rows = (
        (
            name,
            graph["form"],
            ", ".join(graph.get("blocks_weights_only", [])),
            str(graph.get("products", 0)),
            digits(graph.get("speed_on_this_cpu")),
        )
        for name, graph in report["graphs"].items()
    )
    head = ("graph", "form", "blocks in float", "8-bit products", "times fp32's speed here")
    return Table(head, tuple(rows), words=3)


def cost_table(report: dict[str, Any]) -> Table:
    measured = ("cosine_mean", "cosine_worst", "score_worst", "agreement")
    rows = ((cost["graph"], cost["block"], *(digits(cost[key]) for key in measured)) for cost in report["sensitivity"])
    head = ("graph", "block", "1 − cosine, mean", "worst", "score, worst", "first results kept, %")
    return Table(head, tuple(rows), words=2)


def digits(value: float | None) -> str:
    return number(value, ".3g", "")
