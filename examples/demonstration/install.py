"""Put a trained checkpoint where the package ships it: float16, LAVIS's names, without the auxiliary heads.

python examples/demonstration/install.py --work .cache/demonstration
python examples/demonstration/install.py --work .cache/small-objects --checkpoint demo-small-objects --centre-keys
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from key_centring import background_mean, set_key_centre
from safetensors.torch import save
from torch import Tensor

from qpert.exporter import demo
from qpert.graphs.families.blip2.config import CONFIGS
from qpert.graphs.families.blip2.model import Blip2Retrieval
from qpert.runtime.files import write_atomically
from qpert.runtime.inputs.boxes import Boxes
from qpert.runtime.inputs.images import preprocess_images
from qpert.runtime.inputs.preprocessing import ImagePreprocessing
from qpert.runtime.scenes import draw_scene, generate

LIMIT = 10_000_000
"""Bytes that the shipped file may have."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(".cache/demonstration"))
    parser.add_argument("--checkpoint", choices=demo.NAMES, default="demo")
    parser.add_argument("--target", type=Path, help="another file than that of --checkpoint")
    parser.add_argument("--centre-keys", action="store_true", help="move background keys to zero (key_centring.py)")
    parser.add_argument("--scenes", type=int, default=500, help="validation scenes whose background is the centre")
    options = parser.parse_args()
    state = torch.load(options.work / "checkpoint.pt", weights_only=True)
    prefix = "model."
    tensors = {
        name.removeprefix(prefix): tensor.half().contiguous()
        for name, tensor in state["student"].items()
        if name.startswith(prefix)
    }
    metadata = {"format": "pt", "steps": str(state["step"]), "plan": json.dumps(state["plan"])}
    if options.centre_keys:
        tensors |= centred_biases(tensors, options.scenes)
        metadata["key_centre"] = f"mean patch outside all boxes of {options.scenes} validation scenes"
    if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
        raise SystemExit("a weight does not fit into float16; nothing was installed")
    data = save(tensors, metadata)
    if len(data) > LIMIT:
        raise SystemExit(f"the checkpoint has {len(data):,} bytes; at most {LIMIT:,} ship")
    target = options.target or demo.model_file(options.checkpoint)
    write_atomically(target, data)
    print(f"{target}: {len(data):,} bytes, step {state['step']}")


def centred_biases(tensors: Mapping[str, Tensor], scenes: int) -> dict[str, Tensor]:
    """float16 key biases by name, −W_k μ, with μ from the first validation scenes."""
    model = Blip2Retrieval(CONFIGS["demo"])
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    found = list(generate("val", scenes, 0))
    preprocessing = ImagePreprocessing(CONFIGS["demo"].vision.image_size)
    pixels = torch.from_numpy(preprocess_images([draw_scene(scene) for scene, _ in found], preprocessing))
    boxes = [Boxes(np.array([item.box for item in scene.objects], np.float64), scene.size) for scene, _ in found]
    with torch.no_grad():
        tokens = torch.cat([model.encode_image(part) for part in pixels.split(100)])
    set_key_centre(model, background_mean(tokens, boxes))
    state = model.state_dict()
    return {name: state[name].half().contiguous() for name in tensors if name.endswith("crossattention.self.key.bias")}


if __name__ == "__main__":
    main()
