"""Write the card of the demonstration that overlooks small objects from the committed measurements.

python examples/demonstration/small_objects_card.py
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open

from qpert.exporter import demo
from qpert.runtime.files import sha256_of, write_atomically

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
BOXES, NAMED = RESULTS / "demonstration_boxes.json", RESULTS / "demonstration_named_by_size.json"
TEMPLATE = Path(__file__).with_name("small_objects_card.md")
CARD = demo.SMALL_OBJECTS_MODEL.with_name("MODEL_CARD_SMALL_OBJECTS.md")
NAME = "demo-small-objects"
KEYS = {"shipped": "centred", "zero": "zero"}
"""Names in the report and in the card."""
WAYS = {"sum": "sum (paper)", "mean": "mean (release)", "each": "each", "each or stock": "each or stock",
        "each and stock": "each and stock"}  # fmt: skip


def cell(found: dict[str, Any]) -> str:
    low, high = found["interval"]
    return f"{found['value']:.1f} [{low:+.1f}, {high:+.1f}]"


def result_rows(report: dict[str, Any], direction: str, scores: tuple[str, ...]) -> list[str]:
    """One row for no boxes, then one for each choice of keys, boxes and way."""
    first = report["keys"]["shipped"]["true"]["itc"]["stock"]
    sets = ("present", "smallest")
    stock = [f"{first[captions][direction][score]['value']:.1f}" for captions in sets for score in scores]
    rows = ["| – | no boxes | " + " | ".join(stock) + " |"]
    for keys, words in KEYS.items():
        for source in (one for one in ("true", "detected") if one in report["keys"][keys]):
            found = report["keys"][keys][source]["itc"]
            for name, said in choices(found):
                row = found[name]
                cells = [cell(row[captions][direction][score]) for captions in sets for score in scores]
                rows.append(f"| {words}, {source} | {said} | " + " | ".join(cells) + " |")
    return rows


def choices(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Names in a report's part, and in the card: each way's setting for both sets, then those that do no harm."""
    for objective, mark in (("for both", ""), ("present unharmed", ", *")):
        for way, said in WAYS.items():
            if f"{way}, {objective}" in found:
                yield f"{way}, {objective}", said + mark


def results(report: dict[str, Any]) -> str:
    names = ("R@1", "mR@1", "small bin")
    head = ["keys, boxes", "way", *[f"{captions} {name}" for captions in ("present:", "smallest:") for name in names]]
    return table(head, result_rows(report, "t2i", ("r1", "mr1", "small")))


def image_to_text(report: dict[str, Any]) -> str:
    return table(["keys, boxes", "way", "present", "smallest"], result_rows(report, "i2t", ("r1",)))


def reranked(report: dict[str, Any]) -> str:
    """Re-ranking by ITM, which sees no boxes."""
    found = report["keys"]["shipped"]["true"]
    key = next((key for key in found if key.startswith("itm_")), None)
    if key is None:
        return "ITM was not measured."
    rows = [
        f"| {name.removesuffix(', for both')} | "
        + " | ".join(cell(sides[captions][way]["r1"]) for captions in ("present", "smallest") for way in ("t2i", "i2t"))
        + " |"
        for name, sides in found[key].items()
    ]
    head = ["shortlist by", "present: T2I R@1", "I2T", "smallest: T2I R@1", "I2T"]
    words = (
        f"ITC + ITM, top {key[4:]} re-ranked, centred keys and true boxes; ITM itself sees no boxes, as in the paper:"
    )
    return f"{words}\n\n{table(head, rows)}"


def settings(report: dict[str, Any]) -> str:
    rows = []
    for keys, words in KEYS.items():
        found = report["keys"][keys]["settings"]
        for name, said in choices(found):
            one = found[name]
            rows.append(f"| {words} | {said} | α {one['alpha']:g}, weight {one['weight']}, τ {one['threshold']:g} |")
    return table(["keys", "way", "setting"], rows)


def attention(report: dict[str, Any]) -> str:
    rows = []
    for keys, words in KEYS.items():
        found = report["keys"][keys]["true"]["attention"]
        if not rows:
            rows.append("| – | no boxes | " + " | ".join(f"{100 * one:.1f} %" for one in found["stock"]) + " | | |")
        one = found["both"]
        cells = [f"{100 * share:.1f} %" for share in one["on the box"]]
        cells += [
            ", ".join(f"{100 * share:.0f} %" for share in one["raised"]),
            ", ".join(f"{r:g}" for r in one["rank"]),
        ]
        rows.append(f"| {words} | each, α {one['setting']['alpha']:g} | " + " | ".join(cells) + " |")
    return table(["keys", "queries", "first", "second", "raised", "mean rank"], rows)


def named(shares: dict[str, Any]) -> str:
    rows = [
        f"| {100 * one['from']:g}–{100 * one['to']:g} % | {one['objects']:,} | {100 * one['named']:.1f} % |"
        for one in shares["bins"]
    ]
    return table(["box area", "groups", "captions that name them"], rows)


def table(head: list[str], rows: list[str]) -> str:
    return "\n".join(["| " + " | ".join(head) + " |", "| --- |" + " --- |" * (len(head) - 1), *rows])


def card(boxes: dict[str, Any], shares: dict[str, Any], model: Path) -> str:
    """The card's text. Exits if the report is of another file than `model`."""
    report = boxes[NAME]
    if report["sha256"] != sha256_of(model):
        raise SystemExit(f"{BOXES} is of another checkpoint than {model}; run perturbation_study.py first")
    with safe_open(model, "pt") as file:
        metadata, parameters = file.metadata(), sum(file.get_tensor(name).numel() for name in list(file.keys()))
    plan, captions = json.loads(metadata["plan"]), report["captions"]["test"]
    stages = "; ".join(f"{one['name']}: {one['steps']} × {one['pictures']} pictures" for one in plan["stages"])
    counts = report["boxes"]["test"]
    looked = report["keys"]["shipped"]["true"]["attention"]
    detected = (
        f"Detected boxes: {counts['detected']:g} a picture, true ones {counts['true']:g}."
        if "detected" in counts
        else ""
    )
    own = boxes["demo"]["keys"]["shipped"]["true"]["itc"]["stock"]["present"]["t2i"]["r1"]["value"]
    fields = {
        "parameters": f"{parameters / 1e6:.2f} M parameters, {model.stat().st_size / 1e6:.1f} MB in float16",
        "steps": f"{metadata['steps']} steps ({stages}), seed {plan['seed']}, {plan['scenes']:,} training pictures",
        "sha256": report["sha256"],
        "steepness": f"{shares['salience']['steepness']:g}",
        "half": f"{shares['salience']['half']:g}",
        "counted": f"{shares['scenes']:,}",
        "named": named(shares),
        "centred": "".join(filter(str.isdigit, metadata["key_centre"])),
        "counts": f"{report['images']['test']:,} pictures; {captions['present']:,} and {captions['smallest']:,} texts.",
        "alphas": ", ".join(f"{alpha:g}" for alpha in report["grid"]["alphas"]),
        "ceilings": " and ".join(f"{value:.1f} ({name})" for name, value in report["ceiling"].items()),
        "results": results(report),
        "detected": detected,
        "i2t": image_to_text(report),
        "rerank": reranked(report),
        "settings": settings(report),
        "tokens": f"{looked['tokens covered']:.1f}",
        "picture": f"{100 * looked['picture']:.1f}",
        "attention": attention(report),
        "demo": f"{own:.1f}",
    }
    text = TEMPLATE.read_text(encoding="utf-8")
    for name, value in fields.items():
        text = text.replace(f"{{{{{name}}}}}", value)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=CARD)
    options = parser.parse_args()
    boxes, shares = (json.loads(file.read_text()) for file in (BOXES, NAMED))
    write_atomically(options.out, card(boxes, shares, demo.SMALL_OBJECTS_MODEL))
    print(options.out)


if __name__ == "__main__":
    main()
