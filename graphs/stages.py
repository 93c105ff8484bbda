"""The graphs of a two-tower family as modules to export; each calls one method of the family's model.

A stage has only the family's own inputs, so that the traced graph has no unused ones.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn


class ImageTower(Protocol):
    def encode_image(self, pixel_values: Tensor) -> Tensor: ...


class PlainQueryHead(Protocol):
    def encode_queries(self, image_embeds: Tensor) -> Tensor: ...


class PerturbableQueryHead(Protocol):
    def encode_queries(
        self, image_embeds: Tensor, object_masks: Tensor | None = None, box_weights: Tensor | None = None
    ) -> Tensor: ...


class TextTower(Protocol):
    def encode_text(self, input_ids: Tensor) -> Tensor: ...


class VisionStage(nn.Module):
    """pixel_values [B,3,S,S] → image_embeds [B,N,C]. bfloat16 features become float32, which NumPy supports."""

    def __init__(self, model: ImageTower) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        image_embeds = self.model.encode_image(pixel_values)
        return image_embeds.float() if image_embeds.dtype == torch.bfloat16 else image_embeds


class PlainQueryStage(nn.Module):
    """image_embeds [B,N,C] → query_embeds [B,1,E], for a family without cross-attention, hence without boxes."""

    def __init__(self, model: PlainQueryHead) -> None:
        super().__init__()
        self.model = model

    def forward(self, image_embeds: Tensor) -> Tensor:
        return self.model.encode_queries(image_embeds)


class PerturbedQueryStage(nn.Module):
    """image_embeds [B,N,C], object_masks [B,O,N], box_weights [B,O] → query_embeds [B,Q,E]."""

    def __init__(self, model: PerturbableQueryHead) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, image_embeds: Tensor, object_masks: Tensor | None = None, box_weights: Tensor | None = None
    ) -> Tensor:
        return self.model.encode_queries(image_embeds, object_masks, box_weights)


class TextStage(nn.Module):
    """input_ids [T,L] → text_embeds [T,E], for a family whose text tower takes no attention mask."""

    def __init__(self, model: TextTower) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model.encode_text(input_ids)
