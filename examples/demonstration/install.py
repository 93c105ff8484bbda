"""Put a trained checkpoint where the package ships it: float16, LAVIS's names, without the auxiliary heads.

python examples/demonstration/install.py --work .cache/demonstration
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save

from qpert.runtime.files import write_atomically

TARGET = Path(__file__).parents[2] / "exporter" / "demo" / "model.safetensors"
LIMIT = 10_000_000
"""Bytes that the shipped file may have."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(".cache/demonstration"))
    parser.add_argument("--target", type=Path, default=TARGET)
    options = parser.parse_args()
    state = torch.load(options.work / "checkpoint.pt", weights_only=True)
    prefix = "model."
    tensors = {
        name.removeprefix(prefix): tensor.half().contiguous()
        for name, tensor in state["student"].items()
        if name.startswith(prefix)
    }
    if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
        raise SystemExit("a weight does not fit into float16; nothing was installed")
    metadata = {"format": "pt", "steps": str(state["step"]), "plan": json.dumps(state["plan"])}
    data = save(tensors, metadata)
    if len(data) > LIMIT:
        raise SystemExit(f"the checkpoint has {len(data):,} bytes; at most {LIMIT:,} ship")
    write_atomically(options.target, data)
    print(f"{options.target}: {len(data):,} bytes, step {state['step']}")


if __name__ == "__main__":
    main()
