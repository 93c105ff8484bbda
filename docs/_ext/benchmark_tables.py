"""The committed results of benchmarks as a page: the table of speed beside accuracy, then every file's figures."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
RESULTS = BENCHMARKS / "results"
MOST_ROWS = 60
"""Of a longer table the rest is in the file: a grid of 200 settings tells a reader nothing."""


SUMMARY = (
    (
        "full-size checkpoint of random numbers (1.17 billion parameters, LAVIS names, 364 px) to bundle",
        "{full_size_fp32;export;seconds:.0f} s, {full_size_fp32;export;peak_gb:.1f} GB at the peak, "
        "{full_size_fp32;disk;ratio:.3f} × the weights on disk",
        "full_size.py",
    ),
    (
        "full-size features; query embeddings stock / with many boxes: ONNX Runtime against PyTorch, max abs",
        "{full_size_fp32;against_pytorch;vision/pictures;max_abs:.1e}; "
        "{full_size_fp32;against_pytorch;image_query/no_boxes;max_abs:.1e} / "
        "{full_size_fp32;against_pytorch;image_query/many_boxes;max_abs:.1e}",
        "full_size.py",
    ),
    (
        "full-size fp16 vision graph to one TensorRT-RTX engine for sm80, sm86, sm89 and sm120, on a busy machine",
        "{full_size_engines;targets;sm80+sm86+sm89+sm120;vision;seconds:.0f} s, "
        "{full_size_engines;targets;sm80+sm86+sm89+sm120;vision;peak_gb:.1f} GB at the peak",
        "full_size_engines.py",
    ),
    (
        "pair stage, full-size Q-Former, against stock PyTorch in the same run",
        "{pair_stage;ratio;to_lavis_order:.1f} × LAVIS's order, {pair_stage;ratio;to_release_order:.1f} × the "
        "release's",
        "pair_stage.py",
    ),
    (
        "the perturbation's projectors, against float64 `eigh`, on spectra that float32 can decide",
        "{perturbation_accuracy;battery;lowering;admitted:,} spectra: "
        "{perturbation_accuracy;battery;lowering;wrong_rank} wrong ranks, "
        "{perturbation_accuracy;battery;lowering;error_above_1e-3} errors above 1e-3",
        "perturbation_accuracy.py",
    ),
    (
        "`qpert eval` on 1,000 scenes, perturbed by their boxes, against PyTorch pair by pair",
        "text to image R@1 {evaluation_parity;qpert;t2i;r1:.2f} and {evaluation_parity;pytorch;t2i;r1:.2f}; the "
        "largest difference of any R@K is {evaluation_parity;largest_recall_difference:g} points",
        "evaluation_parity.py",
    ),
    (
        "scan of 100,000 images, 1, 2, 16 and 256 queries at once, against NumPy in float32 (the same best 64)",
        "{gallery_scan;rows;6;ratio:.1f} ×, {gallery_scan;rows;7;ratio:.1f} ×, {gallery_scan;rows;10;ratio:.1f} × and "
        "{gallery_scan;rows;11;ratio:.1f} × as fast; one query takes {gallery_scan;rows;6;fast_over_reading:.1f} × the "
        "time of reading the codes",
        "gallery_scan.py",
    ),
    (
        "`qpert index`, demonstration on two cores, against its parts (read, preprocess, graphs) with both cores busy",
        "{indexing;images_per_second;2 workers:.0f} images a second, "
        "{indexing;of_the_bound;2 workers;all cores busy:.2f} of the bound; one worker "
        "{indexing;images_per_second;one worker:.0f}",
        "indexing.py",
    ),
    (
        "`qpert calibrate`, 100 settings on 500 scenes, against one `qpert eval` of them",
        "{calibration_time;ratio;cpu:.2f} × the CPU time",
        "",
    ),
    (
        "INT8 demonstration on all 1,000 scenes, ITC R@1, fp32 → INT8",
        "{demonstration_int8;fp32;t2i;r1:.2f} → {demonstration_int8;int8;t2i;r1:.2f} text to image, "
        "{demonstration_int8;fp32;i2t;r1:.1f} → {demonstration_int8;int8;i2t;r1:.1f} image to text, "
        "{demonstration_int8;bundle_bytes;ratio:.2f} × the size",
        "",
    ),
    (
        "INT8 ViT-g, all 39 blocks (random weights), against fp32 in the same run",
        "{full_size_int8;forms;int8;median_ratio_to_fp32:.1f} × as fast, "
        "{full_size_int8;forms;int8;ratio_of_bytes:.2f} × the size, {full_size_int8;forms;int8;peak_gb_of_one_run:.1f} "
        "instead of {full_size_int8;forms;fp32;peak_gb_of_one_run:.1f} GB",
        "full_size_int8.py",
    ),
)
"""What, its figures as places in the result files (`{file;key;key:format}`), and the script that measures it."""


def summary() -> list[str]:
    lines = ["| | | measured by |", "| --- | --- | --- |"]
    for what, figures, script in SUMMARY:
        lines.append(
            f"| {what} | {re.sub(r'{([^{}:]+):?([^{}]*)}', figure, figures)} | {f'`{script}`' if script else ''} |"
        )
    return [*lines, ""]


def figure(match: re.Match[str]) -> str:
    """The number at a place, formatted. Raises LookupError where a file no longer has it."""
    name, *keys = match[1].split(";")
    value = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    for key in keys:
        value = value[int(key)] if isinstance(value, list) else value[key]
    return format(value, match[2])


def page() -> str:
    spec = importlib.util.spec_from_file_location("readme_table", BENCHMARKS / "readme_table.py")
    assert spec is not None
    assert spec.loader is not None
    readme_table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(readme_table)
    lines = ["## Speed beside accuracy", "", readme_table.table(), "## In short", "", *summary()]
    lines += ["## All results", ""]
    for path in sorted(RESULTS.glob("*.json")):
        lines += section(path)
    return "\n".join(lines)


def section(path: Path) -> list[str]:
    """One file: what it says about itself, its machine, and its figures."""
    document = json.loads(path.read_text(encoding="utf-8"))
    figures = list(leaves(document))
    about = document.get("what") if isinstance(document, dict) else None
    rows = [(place, shown) for place, shown in figures if not place.startswith("what")]
    lines = [f"### {path.stem.replace('_', ' ')}", ""]
    lines += [escaped(about), ""] if isinstance(about, str) else []
    lines += [f"[{path.name}](../benchmarks/results/{path.name}), {len(figures)} figures.", ""]
    lines += ["| figure | |", "| --- | ---: |"]
    lines += [f"| {escaped(place)} | {escaped(shown)} |" for place, shown in rows[:MOST_ROWS]]
    lines += [f"| … | {len(rows) - MOST_ROWS} more in the file |"] if len(rows) > MOST_ROWS else []
    return [*lines, ""]


def leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every number and word with its place; lists of objects by their number."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, f"{prefix} · {key}" if prefix else str(key))
    elif isinstance(value, list):
        if all(not isinstance(item, dict | list) for item in value):
            yield prefix, ", ".join(map(number, value[:12])) + (" …" if len(value) > 12 else "")
        else:
            for place, inner in enumerate(value):
                yield from leaves(inner, f"{prefix} · {place + 1}")
    else:
        yield prefix, number(value)


def number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e6 else f"{value:,.0f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "–" if value is None else str(value)[:300]


def escaped(text: str) -> str:
    """As plain text in a Markdown table."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>|#$" else c for c in text.replace("\n", " "))
