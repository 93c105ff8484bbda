"""The smallest BLIP-2 retrieval model that has every part: what tests use where dimensions do not matter."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from qpert.graphs.families.blip2.config import Blip2Config, QFormerConfig, VisionConfig
from qpert.graphs.families.blip2.model import Blip2Retrieval
from qpert.graphs.perturbation.choices import GraphPerturbation

VOCABULARY = Path(__file__).parents[1] / "exporter" / "demo" / "vocab.txt"

TINY = Blip2Config(
    "tiny",
    VisionConfig("eva", 56, 14, 32, 1, 2, 64, 1e-6),
    QFormerConfig(32, 2, 2, 48, 1, 4, 1024, 32),  # cross-attention in both layers
    16,
)
THRESHOLD = 0.96
"""With it the recorded boxes have key subspaces of one to three dimensions, all of them clearly decided."""
OPTIONS = {"vision_heads": 2, "qformer_heads": 2}
"""Head counts are no multiple of the usual head sizes, so they have to be told."""


def tiny_state(config: Blip2Config = TINY, seed: int = 5) -> dict[str, Tensor]:
    """Every parameter at random (biases and LayerNorms too): an export that mixes up two zeros would look right."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Blip2Retrieval(config).state_dict().items()}

    def draw(name: str, shape: torch.Size) -> Tensor:
        noise = torch.randn(shape, generator=generator)
        if len(shape) < 2:
            return 0.2 * noise + float("norm" in name.lower() and name.endswith("weight"))
        if ("embed" in name and "proj" not in name) or "token" in name:
            return 1.5 * noise  # so that image tokens differ, and key subspaces have several dimensions
        return noise / math.sqrt(math.prod(shape[1:]))

    return {name: draw(name, shape) for name, shape in shapes.items()}


def tiny_network(perturbation: GraphPerturbation | None = None, config: Blip2Config = TINY) -> Blip2Retrieval:
    """The network in eager PyTorch, with the `eigh` oracle inside."""
    model = Blip2Retrieval(config, perturbation)
    model.load_state_dict(tiny_state(config), strict=True)
    return model.eval().requires_grad_(False)


def tiny_checkpoint(path: Path, seed: int = 5) -> Path:
    """A checkpoint file with LAVIS's names."""
    torch.save({"model": tiny_state(seed=seed)}, path)
    return path
