"""Write the demonstration's model card from an evaluation report.

python examples/demonstration/card.py --report .cache/demonstration/evaluation.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from safetensors import safe_open

from qpert.graphs.families.blip2.config import CONFIGS
from qpert.runtime.files import sha256_of, write_atomically

DEMO = Path(__file__).parents[2] / "exporter" / "demo"
TEMPLATE = Path(__file__).with_name("card.md")
GOALS = {"ITC, T2I R@1": 40, "ITC, T2I R@10": 75, "ITC, I2T R@1": 60}


def merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Both reports; where both have a value the first one's stays."""
    result = {**second, **first}
    for key in first.keys() & second.keys():
        if isinstance(first[key], dict):
            result[key] = merged(first[key], second[key])
    return result


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def recall_row(name: str, found: dict[str, Any]) -> str:
    cells = [number(found[way][f"r{cut}"]) for way in ("t2i", "i2t") for cut in (1, 5, 10)]
    means = [number(found[way]["mr1"]) for way in ("t2i", "i2t")]
    small = [number(found["small"][way]["r1"]) for way in ("t2i", "i2t")]
    return f"| {name} | " + " | ".join([*cells, *means, *small]) + " |"


def recall_table(report: dict[str, Any]) -> str:
    columns = [
        "T2I R@1",
        "R@5",
        "R@10",
        "I2T R@1",
        "R@5",
        "R@10",
        "T2I mR@1",
        "I2T mR@1",
        "small T2I R@1",
        "small I2T R@1",
    ]
    lines = ["| test split | " + " | ".join(columns) + " |", "| --- |" + " --- |" * len(columns)]
    for name, words in (("stock", ""), ("perturbed", " with perturbed queries")):
        found = report["test"].get(name)
        if found is None:
            continue
        lines.append(recall_row(f"ITC{words}", found["itc"]))
        lines += [recall_row(f"ITC + ITM, top {key[4:]}{words}", found[key]) for key in found if key.startswith("itm_")]
    ceiling = report["ceiling"]
    cells = [number(ceiling[way][str(cut)]) for way in ("t2i", "i2t") for cut in (1, 5, 10)]
    lines.append("| ceiling | " + " | ".join(cells) + " | | | | |")
    return "\n".join(lines)


def counts(report: dict[str, Any]) -> str:
    found = report["test"]["stock"]["itc"]
    small = found["small"]
    return (
        f"{found['images']:,} pictures, {found['texts']:,} captions; small bin (largest box below a tenth of the "
        f"picture): {small['images']} pictures, {small['queries']} captions. "
        f"{report['ceiling']['ambiguous_captions']} captions are true of more than one picture, which sets the ceiling."
    )


def goals(report: dict[str, Any]) -> str:
    found = report["test"]["stock"]
    itc = found["itc"]
    values = dict(zip(GOALS, (itc["t2i"]["r1"], itc["t2i"]["r10"], itc["i2t"]["r1"]), strict=True))
    lines = [
        f"- {name}: {number(value)} (goal {GOALS[name]}): {_met(value >= GOALS[name])}"
        for name, value in values.items()
    ]
    for key in (key for key in found if key.startswith("itm_")):
        for way in ("t2i", "i2t"):
            gain = found[key][way]["r1"] - itc[way]["r1"]
            lines.append(
                f"- ITM's gain in {way.upper()} R@1, top {key[4:]}: {gain:+.1f} points (goal +2): {_met(gain >= 2)}"
            )
    return "\n".join(lines)


def _met(reached: bool) -> str:
    return "reached" if reached else "NOT reached"


def perturbation(report: dict[str, Any]) -> str:
    rows, plain = report["val"].get("grid", []), report["val"]["itc"]
    if not rows:
        return "Not measured."
    lines = ["| validation split, ITC | T2I R@1 | I2T R@1 | T2I mR@1 | small T2I R@1 |", "| --- |" + " --- |" * 4]
    lines.append(_setting_row("no perturbation", plain))
    shown = [*rows[:5], *[row for row in rows[5:] if _is_default(row["setting"])]]
    lines += [_setting_row(_setting_name(row), row) for row in shown]
    better = sum(row["t2i"]["r1"] > plain["t2i"]["r1"] for row in rows)
    small = sum(row["small"]["t2i"]["r1"] > plain["small"]["t2i"]["r1"] for row in rows)
    lines.append("")
    lines.append(
        f"Of {len(rows)} settings {better} are better than no perturbation in T2I R@1 on the validation split, and "
        f"{small} in the small bin ({plain['small']['images']} pictures, {plain['small']['queries']} captions: one "
        f"caption is {100 / plain['small']['queries']:.1f} points)."
    )
    return "\n".join(lines)


def _is_default(setting: dict[str, Any]) -> bool:
    return [setting[key] for key in ("alpha", "beta", "gamma", "threshold", "reduction")] == [8, 1, 0, 0.95, "sum"]


def _setting_name(row: dict[str, Any]) -> str:
    setting = row["setting"]
    default = " (the product's default)" if _is_default(setting) else ""
    return (
        f"α {setting['alpha']:g}, weight {row['weight']}, τ {setting['threshold']:g}, {setting['reduction']}{default}"
    )


def _setting_row(name: str, found: dict[str, Any]) -> str:
    values = (found["t2i"]["r1"], found["i2t"]["r1"], found["t2i"]["mr1"], found["small"]["t2i"]["r1"])
    return f"| {name} | " + " | ".join(map(number, values)) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = [Path(".cache/demonstration/evaluation.json")]
    parser.add_argument("--report", type=Path, nargs="+", default=default, help="one, or parts measured apart")
    parser.add_argument("--out", type=Path, default=DEMO / "MODEL_CARD.md")
    options = parser.parse_args()
    model = DEMO / "model.safetensors"
    report: dict[str, Any] = {}
    for file in options.report:
        part = json.loads(file.read_text())
        if part["sha256"] != sha256_of(model):
            raise SystemExit(f"{file} is of another checkpoint than {model}; run evaluate.py first")
        report = merged(report, part)
    with safe_open(model, "pt") as file:
        metadata, parameters = file.metadata(), sum(file.get_tensor(name).numel() for name in list(file.keys()))
    plan, config = json.loads(metadata["plan"]), CONFIGS["demo"]
    stages = "; ".join(f"{one['name']}: {one['steps']} × {one['pictures']} pictures" for one in plan["stages"])
    fields = {
        "parameters": f"{parameters / 1e6:.2f} M parameters, {model.stat().st_size / 1e6:.1f} MB in float16",
        "vision": f"{config.vision.layers} layers of width {config.vision.width}, {config.vision.heads} heads, "
        f"patch {config.vision.patch_size}, {config.vision.image_size}×{config.vision.image_size} pixels",
        "qformer": f"{config.qformer.layers} layers of width {config.qformer.width}, {config.qformer.heads} heads, "
        f"{config.qformer.queries} queries, {config.embed_dim}-d embeddings",
        "steps": f"{metadata['steps']} steps ({stages}), seed {plan['seed']}, {plan['scenes']:,} training pictures",
        "sha256": report["sha256"],
        "recall": recall_table(report),
        "counts": counts(report),
        "pairs": report["pairs_dtype"],
        "goals": goals(report),
        "perturbation": perturbation(report),
    }
    text = TEMPLATE.read_text(encoding="utf-8")
    for name, value in fields.items():
        text = text.replace(f"{{{{{name}}}}}", value)
    write_atomically(options.out, text)
    print(options.out)


if __name__ == "__main__":
    main()
