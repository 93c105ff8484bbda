"""Write the detector's card from what `install.py` and `evaluate.py` left.

python examples/demonstration_detector/card.py
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

from average_precision import FOLDER, QUICK
from detector_data import LABELS
from evaluate import REPORT
from install import RUN

from qpert.runtime.files import sha256_of, write_atomically

TEMPLATE = Path(__file__).with_name("card.md")
COLUMNS = {
    "AP": "ap",
    "AP50": "ap50",
    "AP75": "ap75",
    "AP-small": "ap_small",
    "AP-medium": "ap_medium",
    "AP-large": "ap_large",
    "AP below 2 %": "ap_below_share",
}


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def precision(report: dict[str, Any]) -> str:
    rows = [("12 classes", report["by_class"]), ("one class", report["one_class"])]
    return table(
        ["test split", *COLUMNS], [[name, *(number(found[key]) for key in COLUMNS.values())] for name, found in rows]
    )


def as_used(report: dict[str, Any]) -> str:
    found = report["as_used"]
    rows = {
        "objects found": number(found["recall50"]),
        "of up to 32² pixels": number(found["recall50_small"]),
        "of up to 2 % of the picture": number(found["recall50_below_share"]),
        "found with the right class (mean over classes)": number(found["recall50_with_class"]),
        "boxes that are on an object": number(found["precision50"]),
        "boxes a picture": f"{found['boxes_per_picture']:.2f} (objects: {report['objects'] / report['pictures']:.2f})",
        "pictures without a box": str(found["pictures_without_boxes"]),
    }
    return table(["", "test split"], [list(row) for row in rows.items()])


def validation(run: dict[str, Any]) -> str:
    keys = {"AP": "val_ap", "AP50": "val_ap50", "AP-small": "val_ap_small"}
    return table(
        ["step", "time", *keys],
        [[f"{row['step']:,}", row["time"], *(number(row[key]) for key in keys.values())] for row in run["validation"]],
    )


def training(run: dict[str, Any]) -> str:
    plan = run["plan"]
    later = plan["steps"] - plan["first_steps"]
    seconds = {side: found["seconds"] / found["logged"] for side, found in run["sides"].items()}
    pace = " and ".join(f"{value:.2f} s at {side}×{side}" for side, value in seconds.items())
    changes = [
        f" The first {after['from_step']:,} steps followed a plan of {before['steps']:,}, {before['first_steps']:,} of "
        "them at 128×128; it was cut short because the machine was slower than thought."
        for before, after in itertools.pairwise(run["plans"])
    ]
    return (
        f"{run['steps']:,} steps of {plan['batch']} pictures out of {plan['scenes']:,}, half of them mirrored at "
        f"random, seed {plan['seed']}: the first {plan['first_steps']:,} at 128×128 pixels, the other {later:,} at "
        f"160×160. AdamW (weight decay 0.02, gradients of norm 1 at most), learning rate {plan['rate']:g} after a "
        f"warm-up of {plan['warm']} steps, falling as a cosine to a fiftieth; transformers' own loss, 20 denoising "
        f"queries; bfloat16 autocast in backbone and encoder. What ships is the running mean of the weights (decay "
        f"{plan['decay']:g} a step). The log runs from {run['began']} to {run['ended']}, on one thread of a "
        f"machine whose two cores others used as well; a step took {pace} on average (of every twentieth)."
        + "".join(changes)
    )


def counts(report: dict[str, Any]) -> str:
    return (
        f"{report['pictures']:,} test scenes with {report['objects']:,} objects, {report['objects_small']:,} of them "
        f"of up to 32² pixels and {report['objects_below_share']:,} of up to 2 % of the picture."
    )


def fields(folder: Path, report: dict[str, Any], run: dict[str, Any]) -> dict[str, str]:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    processor = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    backbone, used = config["backbone_config"], report["as_used"]
    return {
        "parameters": f"{report['parameters'] / 1e6:.2f} M parameters, {report['bytes'] / 1e6:.1f} MB in float32",
        "backbone": f"one basic block a stage, {', '.join(map(str, backbone['hidden_sizes']))} channels; strides 8, 16 "
        "and 32 are used",
        "transformer": f"{config['encoder_layers']} encoder layer, {config['decoder_layers']} decoder layers, width "
        f"{config['d_model']}, {config['decoder_attention_heads']} heads, {config['num_queries']} queries",
        "side": str(processor["size"]["height"]),
        "labels": ", ".join(LABELS),
        "sha256": report["sha256"],
        "seed": str(run["plan"]["seed"]),
        "last_scene": str(run["plan"]["scenes"] - 1),
        "training": training(run),
        "validation_pictures": str(QUICK),
        "validation": validation(run),
        "counts": counts(report),
        "precision": precision(report),
        "threshold": f"{used['threshold']:g}",
        "overlap": f"{used['overlap']:g}",
        "most": str(used["most"]),
        "as_used": as_used(report),
        "versions": ", ".join(f"{name} {version}" for name, version in report["versions"].items()),
    }


def card(folder: Path, report: dict[str, Any], run: dict[str, Any]) -> str:
    text = TEMPLATE.read_text(encoding="utf-8")
    for name, value in fields(folder, report, run).items():
        text = text.replace(f"{{{{{name}}}}}", value)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--report", type=Path, default=REPORT)
    parser.add_argument("--run", type=Path, default=RUN)
    parser.add_argument("--out", type=Path, help="README.md of the folder unless given")
    options = parser.parse_args()
    report = json.loads(options.report.read_text(encoding="utf-8"))
    if report["sha256"] != sha256_of(options.folder / "model.safetensors"):
        raise SystemExit(f"{options.report} is of another checkpoint than {options.folder}; run evaluate.py first")
    run = json.loads(options.run.read_text(encoding="utf-8"))
    out = options.out or options.folder / "README.md"
    write_atomically(out, card(options.folder, report, run))
    print(out)


if __name__ == "__main__":
    main()
