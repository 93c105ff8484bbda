"""Architecture of a BLIP-2 retrieval model as data: its dimensions, and the named instances.

Sources: LAVIS `lavis/models/eva_vit.py`, `clip_vit.py`, `blip2_models/Qformer.py`, `blip2_models/blip2_qformer.py`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

VisionFamily = Literal["eva", "clip"]


@dataclass(frozen=True)
class VisionConfig:
    """A vision transformer. `family` decides block structure and LAVIS key names; the rest is dimensions."""

    family: VisionFamily
    image_size: int
    patch_size: int
    width: int
    layers: int
    heads: int
    mlp_width: int
    layer_norm_eps: float
    qkv_bias: bool = True

    def __post_init__(self) -> None:
        if self.image_size < self.patch_size:
            raise ValueError(f"image size {self.image_size} is smaller than one patch of {self.patch_size}")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image size {self.image_size} is not a multiple of the patch size {self.patch_size}; "
                f"nearest multiples: {self.grid * self.patch_size} and {(self.grid + 1) * self.patch_size}"
            )
        if self.width % self.heads:
            raise ValueError(f"vision width {self.width} is not a multiple of its {self.heads} heads")

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def tokens(self) -> int:
        """Image tokens N: CLS and one for each patch."""
        return self.grid**2 + 1


@dataclass(frozen=True)
class QFormerConfig:
    """A Q-Former: BERT with learned queries and cross-attention in every `cross_attention_frequency`-th layer."""

    width: int
    layers: int
    heads: int
    mlp_width: int
    cross_attention_frequency: int
    queries: int
    vocab_size: int
    max_positions: int
    layer_norm_eps: float = 1e-12

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"Q-Former width {self.width} is not a multiple of its {self.heads} heads")

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def cross_layers(self) -> tuple[int, ...]:
        """Indices of the layers that attend to the image, ascending."""
        return tuple(i for i in range(self.layers) if i % self.cross_attention_frequency == 0)


@dataclass(frozen=True)
class Blip2Config:
    """Everything that decides the shapes of a BLIP-2 retrieval model."""

    name: str
    vision: VisionConfig
    qformer: QFormerConfig
    embed_dim: int
    ln_vision_eps: float = 1e-5

    def with_image_size(self, image_size: int) -> Blip2Config:
        return replace(self, vision=replace(self.vision, image_size=image_size))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Blip2Config:
        nested = {"vision": VisionConfig(**values["vision"]), "qformer": QFormerConfig(**values["qformer"])}
        return cls(**{**values, **nested})


EVA_VIT_G = VisionConfig("eva", 224, 14, 1408, 39, 16, 6144, 1e-6)
CLIP_VIT_L = VisionConfig("clip", 224, 14, 1024, 23, 16, 4096, 1e-5)
BERT_QFORMER = QFormerConfig(768, 12, 12, 3072, 2, 32, 30523, 512)

CONFIGS: dict[str, Blip2Config] = {
    config.name: config
    for config in (
        Blip2Config("pretrain", EVA_VIT_G, BERT_QFORMER, 256),
        Blip2Config("coco", replace(EVA_VIT_G, image_size=364), BERT_QFORMER, 256),
        Blip2Config("pretrain_vitL", CLIP_VIT_L, BERT_QFORMER, 256),
        Blip2Config(
            "demo",
            VisionConfig("eva", 112, 14, 192, 4, 3, 768, 1e-6),
            QFormerConfig(192, 4, 3, 384, 2, 16, 1024, 64),
            128,
        ),
    )
}
