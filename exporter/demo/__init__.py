"""The built-in demonstration checkpoint.

It is BLIP-2's architecture in small, trained on the generated scenes of `qpert.runtime.scenes` (see `MODEL_CARD.md`):
enough to see the whole path run, verify and retrieve on a laptop. It knows nothing but those scenes.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from qpert.exporter.checkpoint import Checkpoint, at_image_size
from qpert.exporter.renaming import Origin
from qpert.exporter.sources import open_tensors
from qpert.exporter.tensors import LazyTensors
from qpert.graphs.blip2 import Blip2Retrieval
from qpert.graphs.config import CONFIGS, Blip2Config
from qpert.runtime.files import sha256_of
from qpert.runtime.manifest import CheckpointRecord

VOCABULARY = Path(__file__).with_name("vocab.txt")
MODEL = Path(__file__).with_name("model.safetensors")


def open_demo(image_size: int | None = None) -> Checkpoint:
    """The demonstration checkpoint, at its own 112 px or another multiple of 14."""
    config = CONFIGS["demo"]
    size = config.vision.image_size if image_size is None else image_size
    store = open_tensors(MODEL)
    origins = {name: Origin(name) for name in store.entries}
    record = CheckpointRecord("demo", "demo", "demo", sha256_of(MODEL), "Apache-2.0")
    note = "the demonstration model was trained on generated scenes and knows nothing else (see its MODEL_CARD.md)"
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
