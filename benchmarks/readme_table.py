"""The README's table of speed beside accuracy, from the committed results.

    python benchmarks/readme_table.py            prints it
    python benchmarks/readme_table.py --write    puts it into README.md, between its two marks

A test holds the README against it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
FULL_SIZE = HERE / "results" / "full_size_speed.json"
PRECISIONS = HERE / "results" / "speed_and_accuracy.json"
BEGIN, END = "<!-- made by benchmarks/readme_table.py -->\n", "<!-- until here -->\n"

STAGES = {
    "vision": "`vision`, {blocks} of 39 blocks",
    "image_query": "`image_query`",
    "text": "`text`",
    "itm": "`itm`",
    "encode": "picture file to embedding",
    "search": "text to the best 10 of 256, 64 re-ranked",
}
NAMES = {"fp32": "fp32", "fp16": "fp16", "int8": "INT8"}


def table() -> str:
    full_size, precisions = (json.loads(path.read_text(encoding="utf-8")) for path in (FULL_SIZE, PRECISIONS))
    lines = [
        f"{machine(full_size)} ×: how many times as long PyTorch takes, in float32, in turns with qpert.",
        "",
        "| | ms | × eager | × SDPA | beside PyTorch's results |",
        "| --- | ---: | ---: | ---: | --- |",
        "| **BLIP-2 at 364 px, fp32, random weights** | | | | |",
        *full_size_rows(full_size),
    ]
    for precision, found in precisions.items():
        size = found["graph_bytes"] / 1e6
        name = f"**demonstration model, {NAMES[precision]}**, {size:.1f} MB"
        lines.append(f"| {name} | | | | {accuracy(found['verify'])} |")
        lines += rows(found["bench"], ("encode", "search"), {})
    return "\n".join(lines) + "\n"


def machine(report: dict[str, Any]) -> str:
    found = report["machine"]
    versions, peak = found["versions"], found["peak"]["product_gflops"]
    return (
        f"{found['cores']} cores of an {found['cpu']} ({peak:.0f} GFLOP/s), ONNX Runtime {versions['onnxruntime']}, "
        f"PyTorch {versions['torch']}, batch 1, medians."
    )


def full_size_rows(report: dict[str, Any]) -> Iterator[str]:
    agreement = {
        (row["stage"], row["boxes"]): f"max abs {row['baseline_max_abs']:.0e}"
        for row in report["rows"]
        if row["batch"] == 1 and row["baseline"] == "torch"
    }
    yield from rows(report, ("vision", "image_query", "text", "itm"), agreement)
    shares = report["summary"]["perturbation over image encoding"]
    for boxes, share in shares.items():
        counted = boxes.replace("1 boxes", "1 box")
        yield f"| the perturbation with {counted}, of image encoding | {100 * share['median_ms']:.1f} % | | | |"


def rows(report: dict[str, Any], stages: tuple[str, ...], agreement: dict[tuple[str, int], str]) -> Iterator[str]:
    """One line for each stage with none and 8 boxes, at batch 1."""
    calls: dict[tuple[str, int], dict[str | None, dict[str, Any]]] = {}
    for row in report["rows"]:
        if row["batch"] == 1 and row["boxes"] in (0, 8) and row["stage"] in stages:
            calls.setdefault((row["stage"], row["boxes"]), {})[row["baseline"]] = row
    for (stage, boxes), found in calls.items():
        own = next(iter(found.values()))
        ratios = [f"{found[name]['ratio']:.2f}" if name in found else "" for name in ("torch", "torch-sdpa")]
        name = STAGES[stage].format(blocks=report.get("vision_blocks")) + (f", {boxes} boxes" if boxes else "")
        milliseconds = f"{own['median_ms']:.0f}" if own["median_ms"] >= 100 else f"{own['median_ms']:.1f}"
        yield f"| {name} | {milliseconds} | {ratios[0]} | {ratios[1]} | {agreement.get((stage, boxes), '')} |"


def accuracy(report: dict[str, Any]) -> str:
    """R@1 of both directions, PyTorch's and the bundle's, and how often the first result is the same one."""
    recall, ranks, data = report["recall"], report["ranks"], report["data"]
    ways = ", ".join(
        f"{way} {recall[way]['r1']['reference']:.1f} → {recall[way]['r1']['deployed']:.1f}" for way in ("t2i", "i2t")
    )
    same = ", ".join(f"{ranks[way]['top1_agreement']:.1f} %" for way in ("t2i", "i2t"))
    return f"R@1 of {data['images']} scenes: {ways}; same first result: {same}; gates: {report['verdict']}"


def written(text: str, made: str) -> str:
    """The README with the table between its marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    if not rest or not after:
        raise SystemExit(f"README.md lacks the lines {BEGIN.strip()!r} and {END.strip()!r}")
    return before + BEGIN + made + END + after


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put it into README.md")
    options = parser.parse_args()
    if options.write:
        README.write_text(written(README.read_text(encoding="utf-8"), table()), encoding="utf-8")
    else:
        print(table(), end="")


if __name__ == "__main__":
    main()
