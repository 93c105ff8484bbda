"""RT-DETRv2 of transformers in a small shape, begun from random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from detector_data import LABELS
from torch import Tensor, nn
from transformers import RTDetrResNetConfig, RTDetrV2Config, RTDetrV2ForObjectDetection
from transformers.modeling_outputs import BaseModelOutput

WIDTH = 96
STAGES = (32, 64, 128, 160)


def new_detector(seed: int) -> RTDetrV2ForObjectDetection:
    """Random weights of a seed. Convolutions and batch norms get their usual start (He et al. 2015; weight 1): stock
    initialisation draws the norms' weights around 0, which is meant for weights that a checkpoint replaces."""
    torch.manual_seed(seed)
    detector = RTDetrV2ForObjectDetection(configuration())
    for module in detector.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
    return detector


def configuration() -> RTDetrV2Config:
    """Features at strides 8, 16 and 32; the smallest object is about 1.5 cells of the finest wide."""
    backbone = RTDetrResNetConfig(
        embedding_size=32,
        hidden_sizes=list(STAGES),
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    return RTDetrV2Config(
        backbone_config=backbone,
        freeze_backbone_batch_norms=False,  # the default is for backbones that come trained
        encoder_in_channels=list(STAGES[1:]),
        encoder_hidden_dim=WIDTH,
        encoder_ffn_dim=2 * WIDTH,
        encoder_attention_heads=3,
        hidden_expansion=0.5,
        d_model=WIDTH,
        decoder_in_channels=[WIDTH] * 3,
        decoder_ffn_dim=2 * WIDTH,
        decoder_layers=3,
        decoder_attention_heads=3,
        num_queries=32,
        num_denoising=20,
        id2label=dict(enumerate(LABELS)),
        label2id={name: number for number, name in enumerate(LABELS)},
    )


def in_bfloat16(detector: RTDetrV2ForObjectDetection) -> None:
    """Run backbone and encoder under bfloat16 autocast when training. Queries, boxes and losses stay float32: eight
    binary digits are too few for a box."""
    for part in (detector.model.backbone, detector.model.encoder):
        part.forward = _autocast(part.forward, part)


def _autocast(forward: Callable[..., Any], part: nn.Module) -> Callable[..., Any]:
    def run(*args: Any, **options: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=part.training):
            return _single(forward(*args, **options))

    return run


def _single(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.dtype == torch.bfloat16 else value
    if isinstance(value, BaseModelOutput):
        value.last_hidden_state = _single(value.last_hidden_state)
        return value
    return type(value)(map(_single, value)) if isinstance(value, list | tuple) else value
