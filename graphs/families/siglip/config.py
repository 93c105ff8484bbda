"""Architecture of a SigLIP model as data. Source: transformers `configuration_siglip.py`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from qpert.graphs.transformer import TextConfig, VisionConfig


@dataclass(frozen=True)
class SiglipConfig:
    """Everything that decides the shapes and numbers of a SigLIP model, or of a SigLIP 2 of fixed resolution.

    The image vector has the width of the vision tower; the text tower's `head` projects to the same width.
    """

    name: str
    vision: VisionConfig
    text: TextConfig

    @property
    def embed_dim(self) -> int:
        """E, of both vectors."""
        return self.vision.width

    @property
    def tokens(self) -> int:
        """Image tokens N: one for each patch, no CLS."""
        return self.vision.patches

    def with_image_size(self, image_size: int) -> SiglipConfig:
        return replace(self, vision=replace(self.vision, image_size=image_size))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SiglipConfig:
        nested = {"vision": VisionConfig(**values["vision"]), "text": TextConfig(**values["text"])}
        return cls(**{**values, **nested})
