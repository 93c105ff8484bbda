"""The built-in demonstration checkpoint.

It is BLIP-2's architecture in small, with seeded random weights: enough to see the whole path run and verify to the
last digit on a laptop, and no retrieval model. Its rankings mean nothing.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import torch
from torch import Tensor

from qpert.exporter.checkpoint import Checkpoint, at_image_size
from qpert.exporter.renaming import Origin
from qpert.exporter.sources import TensorInfo, TensorStore
from qpert.exporter.tensors import LazyTensors
from qpert.graphs.blip2 import Blip2Retrieval
from qpert.graphs.config import CONFIGS, Blip2Config
from qpert.runtime.manifest import CheckpointRecord

SEED = 2024
VOCABULARY = Path(__file__).with_name("vocab.txt")


def open_demo(image_size: int | None = None) -> Checkpoint:
    """The demonstration checkpoint, at its own 112 px or another multiple of 14."""
    config = CONFIGS["demo"]
    state = random_state(config, SEED)
    size = image_size or config.vision.image_size
    store = TensorStore(
        {name: TensorInfo(tuple(tensor.shape)) for name, tensor in state.items()},
        state.__getitem__,
        lambda: None,
        (),
    )
    origins = {name: Origin(name) for name in state}
    record = CheckpointRecord("demo", "demo", "demo", state_digest(state), "Apache-2.0")
    note = "the demonstration model has random weights: parity is real, rankings mean nothing"
    return Checkpoint(
        at_image_size(config, size), record, LazyTensors(store, origins, config, size), VOCABULARY, (note,)
    )


def random_state(config: Blip2Config, seed: int) -> dict[str, Tensor]:
    """Float32 parameters drawn from a seed, scaled so that activations keep their size and nothing is degenerate.

    Matrices have standard deviation 1/√fan_in, so that attention is neither flat nor saturated; biases and LayerNorm
    parameters are random too, because an export that mixes two zeros up looks right.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Blip2Retrieval(config).state_dict().items()}
    return {name: random_tensor(name, shape, generator) for name, shape in shapes.items()}


def random_tensor(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    noise = torch.randn(shape, generator=generator)
    if "norm" in name.lower() or name.startswith("ln_"):
        return 1 + 0.1 * noise if name.endswith("weight") else 0.1 * noise
    if name.endswith("bias"):
        return 0.1 * noise
    if ("embed" in name and not name.endswith("proj.weight")) or "token" in name:
        return 0.5 * noise
    return noise / math.sqrt(math.prod(shape[1:]))


def state_digest(state: dict[str, Tensor]) -> str:
    """SHA-256 over names and numbers, in name order."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].contiguous().numpy().tobytes())
    return digest.hexdigest()
