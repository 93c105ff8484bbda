"""Small stock detectors of transformers, with parameters at random that keep their signals alive."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

LABELS = {0: "cup", 1: "red star", 2: "traffic light"}
SIZE = {"height": 64, "width": 64}

DECODER = {
    "d_model": 32,
    "encoder_hidden_dim": 32,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_in_channels": [24, 32, 40],
    "decoder_in_channels": [32, 32, 32],
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "decoder_layers": 2,
    "num_queries": 20,
    "num_denoising": 0,
    "hidden_expansion": 0.5,
    "id2label": LABELS,
}
"""The smallest shapes that have every part: three levels, two decoder layers, fewer queries than the 84 anchors."""


def rt_detr_v2(seed: int = 0, **changes: Any) -> Any:
    """Stock `RTDetrV2ForObjectDetection` with a ResNet of four stages."""
    from transformers import RTDetrResNetConfig, RTDetrV2Config, RTDetrV2ForObjectDetection

    return alive(RTDetrV2ForObjectDetection(RTDetrV2Config(**resnet_settings(RTDetrResNetConfig) | changes)), seed)


def rt_detr(seed: int = 0) -> Any:
    """Stock `RTDetrForObjectDetection`."""
    from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrResNetConfig

    return alive(RTDetrForObjectDetection(RTDetrConfig(**resnet_settings(RTDetrResNetConfig))), seed)


def resnet_settings(config: Any) -> dict[str, Any]:
    backbone = config(
        embedding_size=16,
        hidden_sizes=[16, 24, 32, 40],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    return DECODER | {"backbone_config": backbone}


def hgnet_backbone() -> Any:
    from transformers import HGNetV2Config

    return HGNetV2Config(
        stem_channels=[3, 8, 8],
        stage_in_channels=[8, 16, 24, 32],
        stage_mid_channels=[8, 8, 8, 8],
        stage_out_channels=[16, 24, 32, 40],
        hidden_sizes=[16, 24, 32, 40],
        stage_num_blocks=[1, 1, 1, 1],
        stage_downsample=[False, True, True, True],
        stage_light_block=[False, False, True, True],
        stage_kernel_size=[3, 3, 5, 5],
        stage_numb_of_layers=[2, 2, 2, 2],
        out_features=["stage2", "stage3", "stage4"],
        use_learnable_affine_block=True,
    )


def d_fine(seed: int = 0) -> Any:
    """Stock `DFineForObjectDetection` with an HGNetV2."""
    from transformers import DFineConfig, DFineForObjectDetection

    return alive(DFineForObjectDetection(DFineConfig(**DECODER, backbone_config=hgnet_backbone())), seed)


def deimv2(seed: int = 0) -> Any:
    """Stock `Deimv2ForObjectDetection` with an HGNetV2."""
    from transformers import Deimv2Config, Deimv2ForObjectDetection

    return alive(Deimv2ForObjectDetection(Deimv2Config(**DECODER, backbone_config=hgnet_backbone())), seed)


MODELS = {"rt_detr_v2": rt_detr_v2, "d_fine": d_fine, "rt_detr": rt_detr, "deimv2": deimv2}


def alive(model: Any, seed: int) -> Any:
    """Kaiming convolutions, Xavier linears, normal class heads, and statistics of normalisation that differ.

    transformers' own initial values leave nothing of the picture behind D-FINE's backbone, and all scores tie.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, generator=generator)
        elif isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight, generator=generator)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.1, generator=generator)
        elif isinstance(module, nn.BatchNorm2d) or type(module).__name__.endswith("FrozenBatchNorm2d"):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
            module.weight.data.uniform_(0.8, 1.2, generator=generator)
    for name, parameter in model.named_parameters():
        if ("class_embed" in name or "enc_score_head" in name) and name.endswith("weight") and parameter.ndim == 2:
            nn.init.normal_(parameter, std=1.5 / math.sqrt(parameter.shape[1]), generator=generator)
    return model.eval()


def save(model: Any, folder: Path, processor: dict[str, Any] | None = None, licence: str | None = "apache-2.0") -> Path:
    """The model and its image processor as stock transformers saves them; returns the folder."""
    from transformers.models.rt_detr.image_processing_pil_rt_detr import RTDetrImageProcessorPil

    model.save_pretrained(folder)
    RTDetrImageProcessorPil(**({"size": SIZE} | (processor or {}))).save_pretrained(folder)
    if licence:
        (folder / "README.md").write_text(f"---\nlicense: {licence}\n---\n", encoding="utf-8")
    return folder
