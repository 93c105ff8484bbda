"""BLIP-2 image-text retrieval, and its four stages as modules to export.

Source: LAVIS `lavis/models/blip2_models/blip2_qformer.py`, `blip2_image_text_matching.py`. Parameters carry LAVIS's
names, so that a LAVIS state dict loads without renaming.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qpert.graphs.families.blip2.config import Blip2Config
from qpert.graphs.families.blip2.qformer import ImageContext, QFormer
from qpert.graphs.families.blip2.vision import VISION_TOWERS
from qpert.graphs.layers import LayerNorm
from qpert.graphs.perturbation.choices import GraphPerturbation, QueryMap
from qpert.graphs.perturbation.oracle import query_map

MATCH_CLASS = 1
"""`itm_head`'s class for "image and text belong together"; class 0 is "they do not"."""


class Blip2Retrieval(nn.Module):
    """The whole retrieval model in eager PyTorch; `perturbation` None is stock BLIP-2.

    `query_map` computes the queries' map: by default the float64 `eigh` oracle, which makes this module the reference;
    the exporter passes the placeholder for tracing.
    """

    def __init__(
        self, config: Blip2Config, perturbation: GraphPerturbation | None = None, *, query_map: QueryMap = query_map
    ) -> None:
        super().__init__()
        self.config = config
        self.perturbation = perturbation
        self.query_map = query_map
        width = config.qformer.width
        self.visual_encoder = VISION_TOWERS[config.vision.family](config.vision)
        self.ln_vision = LayerNorm(config.vision.width, eps=config.ln_vision_eps)
        self.query_tokens = nn.Parameter(torch.zeros(1, config.qformer.queries, width))
        self.Qformer = QFormer(config.qformer, config.vision.width)
        self.vision_proj = nn.Linear(width, config.embed_dim)
        self.text_proj = nn.Linear(width, config.embed_dim)
        self.itm_head = nn.Linear(width, 2)

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """pixel_values float32 [B, 3, S, S] → image_embeds [B, N, C]."""
        return self.ln_vision(self.visual_encoder(pixel_values))

    def image_context(
        self, image_embeds: Tensor, object_masks: Tensor | None, box_weights: Tensor | None
    ) -> ImageContext:
        """Keys, values and, where masks are given, the queries' map (paper, equation 3) of a batch of images."""
        keys, values = self.Qformer.keys_and_values(image_embeds.to(self.query_tokens.dtype))
        if self.perturbation is None or object_masks is None or box_weights is None:
            return ImageContext(keys, values, None)
        stacked = self.subspace_keys(keys)
        mapped = self.query_map(stacked, object_masks, box_weights, threshold=self.perturbation.threshold)
        return ImageContext(keys, values, mapped, self.perturbation.preserve_norm)

    def subspace_keys(self, keys: Sequence[Tensor]) -> Tensor:
        """A tensors [B, H, N, d] → float32 [B, A, H, N, d], the keys that boxes select from.

        Layer by layer, before they are stacked: the lowering takes such a stack apart without copying it.
        """
        choices = self.perturbation or GraphPerturbation()
        return torch.stack([choices.subspace_keys(layer) for layer in keys], dim=1)

    def encode_queries(
        self, image_embeds: Tensor, object_masks: Tensor | None = None, box_weights: Tensor | None = None
    ) -> Tensor:
        """image_embeds [B, N, C], object_masks float32 [B, O, N], box_weights float32 [B, O] → float32 [B, Q, E].

        Rows have unit length. LAVIS: `F.normalize(self.vision_proj(query_output.last_hidden_state), dim=-1)`.
        """
        hidden = self.Qformer.encode_queries(
            self.query_tokens, self.image_context(image_embeds, object_masks, box_weights)
        )
        return unit_length(self.vision_proj(hidden))

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """input_ids, attention_mask int64 [T, L] → float32 [T, E] of unit length, from the [CLS] token."""
        return unit_length(self.text_proj(self.Qformer.encode_text(input_ids, attention_mask)[:, 0]))

    def match(
        self,
        image_embeds: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        object_masks: Tensor | None = None,
        box_weights: Tensor | None = None,
    ) -> Tensor:
        """image_embeds [I, N, C], input_ids, attention_mask int64 [I, T, L] → itm_scores float32 [I, T].

        The match logit, averaged over queries (LAVIS `compute_itm`): no softmax.
        """
        image = self.image_context(image_embeds, object_masks, box_weights)
        queries = self.Qformer.encode_pairs(self.query_tokens, image, input_ids, attention_mask)
        logits = self.itm_head(queries).float()[..., MATCH_CLASS]  # [I*T, Q]
        return logits.mean(dim=-1).unflatten(0, (input_ids.shape[0], input_ids.shape[1]))


def unit_length(x: Tensor) -> Tensor:
    """Rows of the last axis scaled to length 1, in float32 (`F.normalize`, eps 1e-12)."""
    return nn.functional.normalize(x.float(), dim=-1)


class VisionStage(nn.Module):
    """The `vision` graph. bfloat16 features are returned as float32, which NumPy supports."""

    def __init__(self, model: Blip2Retrieval) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        image_embeds = self.model.encode_image(pixel_values)
        return image_embeds.float() if image_embeds.dtype == torch.bfloat16 else image_embeds


class ImageQueryStage(nn.Module):
    """The `image_query` graph; without masks and weights it is stock BLIP-2."""

    def __init__(self, model: Blip2Retrieval) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, image_embeds: Tensor, object_masks: Tensor | None = None, box_weights: Tensor | None = None
    ) -> Tensor:
        return self.model.encode_queries(image_embeds, object_masks, box_weights)


class TextStage(nn.Module):
    """The `text` graph."""

    def __init__(self, model: Blip2Retrieval) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model.encode_text(input_ids, attention_mask)


class ItmStage(nn.Module):
    """The `itm` graph; masks and weights only if the pair stage is perturbed too."""

    def __init__(self, model: Blip2Retrieval) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        image_embeds: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        object_masks: Tensor | None = None,
        box_weights: Tensor | None = None,
    ) -> Tensor:
        return self.model.match(image_embeds, input_ids, attention_mask, object_masks, box_weights)


STAGES: dict[str, type[nn.Module]] = {
    "vision": VisionStage,
    "image_query": ImageQueryStage,
    "text": TextStage,
    "itm": ItmStage,
}
