"""Architecture of a CoCa model as data. Source: open_clip 3.3.0 `model_configs/coca_*.json`, `model.py`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from qpert.graphs.transformer import TextConfig, VisionConfig

HEAD_WIDTH = 64
"""open_clip's `head_width`: a vision tower has width / 64 heads unless its configuration says otherwise."""
LAYER_NORM_EPS = 1e-5
"""PyTorch's default, which open_clip never changes in CoCa."""


@dataclass(frozen=True)
class CocaConfig:
    """Everything that decides the shapes and numbers of a CoCa model without its caption decoder.

    `embed_dim` is the width D of the pooler and of both vectors. `text.max_positions` is the longest text, 76 tokens in
    the published models; the class token behind it has a position of its own. `resize`: how pictures become squares, if
    that was asked for at export, so that the checkpoint can be opened again in the same way.
    """

    name: str
    vision: VisionConfig
    text: TextConfig
    embed_dim: int
    pooler_heads: int
    resize: str | None = None

    def __post_init__(self) -> None:
        if self.embed_dim % self.pooler_heads:
            raise ValueError(f"embed_dim {self.embed_dim} is not a multiple of the pooler's {self.pooler_heads} heads")

    @property
    def tokens(self) -> int:
        """Image tokens N: CLS and one for each patch."""
        return self.vision.patches + 1

    def with_image_size(self, image_size: int) -> CocaConfig:
        return replace(self, vision=replace(self.vision, image_size=image_size))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CocaConfig:
        nested = {"vision": VisionConfig(**values["vision"]), "text": TextConfig(**values["text"])}
        return cls(**{**values, **nested})


def published(name: str, vision: tuple[int, int, int], text: tuple[int, int]) -> CocaConfig:
    """A published model: `vision` is width, layers and patch size, `text` is width and heads; the rest is common."""
    width, layers, patch_size = vision
    text_width, text_heads = text
    eps = LAYER_NORM_EPS
    return CocaConfig(
        name,
        VisionConfig(width, layers, width // HEAD_WIDTH, 4 * width, "gelu", eps, 224, patch_size),
        TextConfig(text_width, 12, text_heads, 4 * text_width, "gelu", eps, 49408, 76),
        embed_dim=text_width,
        pooler_heads=8,
    )


CONFIGS: dict[str, CocaConfig] = {
    config.name: config
    for config in (
        published("coca_ViT-L-14", (1024, 24, 14), (768, 12)),
        published("coca_ViT-B-32", (768, 12, 32), (512, 8)),
    )
}
"""The published models, by open_clip's names."""
