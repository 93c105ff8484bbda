"""Stock Hugging Face `CLIPModel` as a reference."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from qpert.exporter.hub.stock import TwoTowerReference, load_stock


class HuggingFaceReference(TwoTowerReference):
    """The parts of the stock model, put together as its own `forward` does (transformers `modeling_clip.py`)."""

    class_name = "CLIPModel"

    @classmethod
    def open(cls, folder_or_id: str | Path, *, prefix: str = "") -> HuggingFaceReference:
        """Load a folder or a hub id. Errors as in `load_stock`."""
        return cls(load_stock(cls.class_name, folder_or_id, prefix))

    def image_vector(
        self, image_tokens: Tensor, object_masks: Tensor | None = None, box_weights: Tensor | None = None
    ) -> Tensor:
        """CLS, normalised and projected. Boxes are never passed."""
        vector: Tensor = self.model.visual_projection(self.model.vision_model.post_layernorm(image_tokens[:, 0]))
        return vector

    def __enter__(self) -> HuggingFaceReference:
        return self
