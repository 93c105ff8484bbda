"""The table of `reproduce_paper.py`: measured figures and the paper's beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from qpert.runtime.inputs.perturbation import WEIGHT_FUNCTIONS
from qpert.runtime.report.model import UNDEFINED, Report, Section, Table, paragraphs

METRICS = ("r1", "r5", "r10", "mr1", "mr5", "mr10")
ROWS = {
    "stock": ("BLIP-2", "BLIP-2"),
    "entities": ("with perturbation, Entities boxes", "with perturbation, Entities boxes"),
    "detector": ("with perturbation, detector boxes", "with perturbation, detector boxes"),
    "release": (
        "the release's setting (constant, α 8, τ 0.99, mean, both stages)",
        "with perturbation, Entities boxes",
    ),
}
"""Step → its name, and the label of the published row that it stands beside."""
TITLES = {"flickr30k": "Flickr30K", "coco": "COCO"}

Documents = Mapping[str, dict[str, Any]]


def report(
    documents: Documents, datasets: Sequence[str], ablations: dict[str, Any], limit: int | None
) -> tuple[Report, list[dict[str, Any]]]:
    """The page, and its rows as data."""
    rows = [row for name in datasets for row in main_rows(name, documents)]
    blocks: list[Any] = []
    if limit:
        blocks += paragraphs(f"A rehearsal on {limit} pictures of each split: not comparable with the paper.")
    blocks += paragraphs("Each cell: measured / paper, in percent.")
    for name in datasets:
        chosen = [row for row in rows if row["dataset"] == name]
        sections = [table_of(chosen, way) for way in ("t2i", "i2t")]
        blocks.append(Section(TITLES[name], (*sections, *paragraphs(*settings(name, documents)))))
    for axis, step in (("alpha", "ablation-strength"), ("threshold", "ablation-threshold")):
        if step in documents:
            found = ablation(documents[step], ablations, axis)
            rows.append({"dataset": "flickr30k", "row": step, "cells": found})
            blocks.append(ablation_section(found, ablations, axis))
    if any(row["row"].startswith("ablation") for row in rows):
        blocks += paragraphs(ablations["about"], ablations["inferred"])
    return Report("the paper's table, measured", "The paper's table, measured", tuple(blocks)), rows


def main_rows(name: str, documents: Documents) -> list[dict[str, Any]]:
    published = json.loads(files("qpert.runtime.evaluation").joinpath("published.json").read_text(encoding="utf-8"))[
        "rows"
    ]
    rows = []
    for kind, (title, label) in ROWS.items():
        document = documents.get(f"{name}-{kind}")
        if document is None:
            continue
        source = "release" if kind == "release" else "paper"
        beside = [row for row in published if (row["dataset"], row["source"], row["label"]) == (name, source, label)]
        rows.append(
            {
                "dataset": name,
                "row": kind,
                "title": title,
                "images": document["images"],
                "measured": {key: document[key] for key in ("t2i", "i2t", "small")},
                "paper": {key: beside[0].get(key, {}) for key in ("t2i", "i2t", "small")} if beside else {},
            }
        )
    return rows


def table_of(rows: Sequence[dict[str, Any]], way: str) -> Table:
    """One direction: R@K, mR@K and, last, R@1 of pictures with small objects."""
    head = (
        "text to image" if way == "t2i" else "image to text",
        *(metric.upper().replace("R", "R@") for metric in METRICS),
    )
    lines = []
    for row in rows:
        measured, paper = row["measured"], row["paper"]
        cells = [cell(measured[way].get(metric), paper.get(way, {}).get(metric)) for metric in METRICS]
        small = cell(measured["small"].get(way, {}).get("r1"), paper.get("small", {}).get(way, {}).get("r1"))
        lines.append((row["title"], *cells, small))
    return Table((*head, "small R@1"), tuple(lines))


def cell(measured: float | None, paper: float | None) -> str:
    return " / ".join(UNDEFINED if value is None else f"{value:.2f}" for value in (measured, paper))


def settings(name: str, documents: Documents) -> list[str]:
    """Which setting the search on the validation split chose."""
    best = documents[f"{name}-calibrate"]["best"]
    chosen = f"α {best['alpha']:g}, weight {best['weight']}, τ {best['threshold']:g}, {best['reduction']}"
    beaten = documents[f"{name}-calibrate"]["beaten"]
    return [f"Chosen on the validation split: {chosen}; {'better' if beaten else 'not better'} than no boxes there."]


def ablation(document: dict[str, Any], published: dict[str, Any], axis: str) -> list[dict[str, Any]]:
    """One entry for each weight function and value: measured and published small R@1 and mR@1, text to image."""
    found = {(row["weight"], float(row[axis])): row for row in document["settings"]}
    cells = []
    for place, weight in enumerate(published["weights"]):
        assert weight in WEIGHT_FUNCTIONS
        for column, value in enumerate(published[axis]["values"]):
            row = found[weight, float(value)]
            cells.append(
                {
                    "weight": weight,
                    axis: value,
                    "small": row["small"]["t2i"]["r1"] if row.get("small") else None,
                    "mr1": row["t2i"]["mr1"],
                    "paper_small": published[axis]["small"][place][column],
                    "paper_mr1": published[axis]["mr1"][place][column],
                }
            )
    return cells


def ablation_section(cells: Sequence[dict[str, Any]], published: dict[str, Any], axis: str) -> Section:
    values = published[axis]["values"]
    tables = []
    for metric, title in (("small", "small R@1"), ("mr1", "mR@1")):
        head = (f"{title}, {'α' if axis == 'alpha' else 'τ'} =", *(f"{value:g}" for value in values))
        lines = []
        for weight in published["weights"]:
            own = {one[axis]: one for one in cells if one["weight"] == weight}
            lines.append((weight, *(cell(own[value][metric], own[value][f"paper_{metric}"]) for value in values)))
        tables.append(Table(head, tuple(lines)))
    fixed = f"τ {published['alpha']['threshold']:g}" if axis == "alpha" else f"α {published['threshold']['alpha']:g}"
    name = "strength" if axis == "alpha" else "threshold"
    return Section(f"Ablation: weight function and {name} ({fixed}), Flickr30K", tuple(tables))
