"""Put a trained detector where the package ships it: a folder that stock transformers opens, float32.

    python examples/demonstration_detector/install.py --work .cache/detector

Also writes `run.json` beside this file: how the run went, for the card.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from average_precision import FOLDER
from detector_model import new_detector
from safetensors.torch import load_file, save

from qpert.runtime.files import write_atomically

LIMIT = 8_000_000
"""Bytes that the shipped weights may have."""
RUN = Path(__file__).with_name("run.json")


def install(work: Path, folder: Path) -> dict[str, Any]:
    """Write `config.json` and `model.safetensors` with the running mean of the weights; the run's state is returned."""
    state = torch.load(work / "checkpoint.pt", weights_only=True)
    detector = new_detector(state["plan"]["seed"])
    detector.load_state_dict(state["mean"])
    with tempfile.TemporaryDirectory() as place:
        detector.save_pretrained(place)  # leaves out tensors that share their memory with another
        tensors = load_file(Path(place) / "model.safetensors")
        config = (Path(place) / "config.json").read_text(encoding="utf-8")
    if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
        raise SystemExit("a weight is not finite; nothing was installed")
    data = save(tensors, {"format": "pt", "steps": str(state["step"]), "plan": json.dumps(state["plan"])})
    if len(data) > LIMIT:
        raise SystemExit(f"the weights have {len(data):,} bytes; at most {LIMIT:,} ship")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "config.json", config)
    write_atomically(folder / "model.safetensors", data)
    return state


def history(work: Path, state: dict[str, Any]) -> dict[str, Any]:
    """Steps, seconds of training (as logged every 20 steps) and the validation split along the way."""
    lines = [json.loads(line) for line in (work / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if line["step"] <= state["step"]]
    sides: dict[str, dict[str, float]] = {}
    for line in (line for line in lines if "side" in line):
        side = sides.setdefault(str(line["side"]), {"logged": 0, "seconds": 0.0})
        side["logged"] += 1
        side["seconds"] = round(side["seconds"] + line["seconds"], 3)
    return {
        "steps": state["step"],
        "plan": state["plan"],
        "plans": state["plans"],
        "began": lines[0]["time"],
        "ended": lines[-1]["time"],
        "sides": sides,
        "validation": [line for line in lines if "val_ap" in line],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(".cache/detector"))
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--run", type=Path, default=RUN)
    options = parser.parse_args()
    state = install(options.work, options.folder)
    write_atomically(options.run, json.dumps(history(options.work, state), indent=1) + "\n")
    size = (options.folder / "model.safetensors").stat().st_size
    print(f"{options.folder}: {size:,} bytes, step {state['step']}")


if __name__ == "__main__":
    main()
