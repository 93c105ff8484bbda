"""The tables of docs/guides/methods.md from `benchmarks/methods.py`'s report.

python benchmarks/methods_table.py benchmarks/results/demonstration_methods.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qpert.runtime.evaluation.methods.choices import LABELS, Method

COLUMNS = (("t2i", "r1"), ("t2i", "r5"), ("t2i", "mr1"), ("i2t", "r1"), ("i2t", "r5"), ("i2t", "mr1"))
BINS = tuple(f"{10 * number}–{10 * number + 10} %" for number in range(10))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "| --- |" + " ---: |" * (len(head) - 1)
    yield from ("| " + " | ".join(row) + " |" for row in rows)


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def points(one: Mapping[str, Any]) -> str:
    if one["gain"] is None:
        return "–"
    interval = "" if one["interval"] is None else f" ({one['interval'][0]:.2f} … {one['interval'][1]:.2f})"
    return f"{one['gain']:+.2f}{interval}"


def recalls(found: Mapping[str, Any]) -> list[str]:
    """In the order of `COLUMNS`, then R@1 of the small bin."""
    return [*(number(found[way][name]) for way, name in COLUMNS), number(found["small"]["t2i"]["r1"])]


HEAD = ("", *(f"{way} {name.replace('mr', 'mR@').replace('r', 'R@', 1)}" for way, name in COLUMNS), "small t2i R@1")


def side_by_side(found: Mapping[str, Any]) -> Iterator[str]:
    """Recall of each method, then differences to no boxes and to the perturbation, whole and by size."""
    yield from table(HEAD, [(LABELS[name], *recalls(row)) for name, row in found["recall"].items()])
    yield ""
    contrasts = [one for one in found["differences"] if one["stage"] == ("final" if found["rerank"] else "itc")]
    rows = [
        (f"{LABELS[one['method']]} − {LABELS[one['against']]}", *(points(one[way]["r1"]) for way in ("t2i", "i2t")))
        for one in contrasts
        if one["against"] in ("none", "q-pert")
    ]
    yield from table(("R@1, in points", "text → image", "image → text"), rows)
    yield ""
    mine = [one for one in contrasts if one["against"] == "none"]
    images = [one["images"] for one in found["bins"]["none"]]
    by_size = [
        (name, str(images[place]), *(points(one["bins_r1"]["t2i"][place]) for one in mine))
        for place, name in enumerate(BINS)
    ]
    head = ("largest object", "pictures", *(f"{LABELS[one['method']]} − no boxes" for one in mine))
    yield from table(head, by_size)


def readings(report: Mapping[str, Any]) -> Iterator[str]:
    """Every reading on validation and test scenes, ITC alone."""
    rows = []
    for val, test in zip(report["val"], report.get("test", report["val"]), strict=True):
        method: Method = val["method"]
        chosen = ", ".join(val["choices"][name] for name in val["choices"] if name != "oes-joins")
        values = [number(split[way]["r1"]) for split in (val, test) for way in ("t2i", "i2t")]
        rows.append((f"{LABELS[method]} {chosen}".strip(), *values))
    yield from table(("R@1", "val t2i", "val i2t", "test t2i", "test i2t"), rows)


def main() -> None:
    for dataset, report in json.loads(Path(sys.argv[1]).read_text()).items():
        print(f"\n### {dataset}\n")
        if "val" in report:
            print("\n".join(readings(report)))
        for stage in ("itc", "reranked"):
            for name, found in report.get(stage, {}).items():
                print(f"\n#### {stage}, {name}, {json.dumps(found['choices'])}\n")
                print("\n".join(side_by_side(found)))


if __name__ == "__main__":
    main()
