"""Architecture of a CLIP model as data. Source: transformers `configuration_clip.py`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from qpert.graphs.transformer import TextConfig, VisionConfig

LEGACY_EOS = 2
"""`eos_token_id` of configs written before transformers 4.31 (including OpenAI's), where it is not the end of text: the
text is then pooled at its largest id, which is."""


@dataclass(frozen=True)
class ClipConfig:
    """Everything that decides the shapes and numbers of a CLIP model.

    `eos_token_id` decides where a text is pooled: at its first token of that id, or at its largest id if it is
    `LEGACY_EOS`. `embed_dim` is the width E of both projections.
    """

    name: str
    vision: VisionConfig
    text: TextConfig
    embed_dim: int
    eos_token_id: int

    @property
    def tokens(self) -> int:
        """Image tokens N: CLS and one for each patch."""
        return self.vision.patches + 1

    def with_image_size(self, image_size: int) -> ClipConfig:
        return replace(self, vision=replace(self.vision, image_size=image_size))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ClipConfig:
        nested = {"vision": VisionConfig(**values["vision"]), "text": TextConfig(**values["text"])}
        return cls(**{**values, **nested})
