"""Small random checkpoints with LAVIS's names, for tests of files and names (the numbers mean nothing)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from qpert.exporter.families.blip2.architecture import ArchitectureOptions, parameter_shapes
from qpert.graphs.families.blip2.config import Blip2Config, QFormerConfig, VisionConfig

EVA = Blip2Config(
    "small",
    VisionConfig("eva", 56, 14, 48, 3, 4, 80, 1e-6),
    QFormerConfig(32, 4, 2, 40, 2, 6, 60, 24),
    embed_dim=20,
)
CLIP = replace(EVA, vision=VisionConfig("clip", 56, 14, 48, 3, 4, 80, 1e-5))
HEADS = ArchitectureOptions(vision_heads=4, qformer_heads=2)


def random_state(config: Blip2Config = EVA, seed: int = 0) -> dict[str, Tensor]:
    """Every parameter of the network, float32."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in parameter_shapes(config).items()}


def unused_state(config: Blip2Config = EVA) -> dict[str, Tensor]:
    """What a LAVIS checkpoint holds and retrieval does not use."""
    width, vocabulary = config.qformer.width, config.qformer.vocab_size
    return {
        "temp": torch.tensor(0.07),
        "Qformer.bert.embeddings.position_ids": torch.arange(config.qformer.max_positions)[None],
        "Qformer.cls.predictions.bias": torch.zeros(vocabulary),
        "Qformer.cls.predictions.decoder.weight": torch.zeros(vocabulary, width),
        "Qformer.cls.predictions.transform.dense.weight": torch.zeros(width, width),
    }


def save(path: Path, state: dict[str, Tensor]) -> Path:
    """As LAVIS's runner saves it, the training state beside the model."""
    torch.save({"model": state, "optimizer": {"state": {}}, "config": {"run": {}}, "scaler": None, "epoch": 4}, path)
    return path
