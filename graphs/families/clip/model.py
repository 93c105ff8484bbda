"""CLIP: two towers that meet in one dot product, with Hugging Face's parameter names.

Source: transformers `modeling_clip.py`. `logit_scale` multiplies all scores equally and is left out. CLIP pools the
image at its class token: it has no cross-attention, so there are no queries that boxes could perturb.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qpert.graphs.families.clip.config import LEGACY_EOS, ClipConfig
from qpert.graphs.layers import LayerNorm
from qpert.graphs.stages import PlainQueryStage, TextStage, VisionStage
from qpert.graphs.transformer import Encoder, TextConfig, TextEmbeddings, VisionConfig, patch_tokens, unit_length

MASKED = -10000.0
"""Added to the scores of later tokens; exp(-10000) is 0 in float32."""


class VisionEmbeddings(nn.Module):
    """CLS and the patches, each with its position."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.zeros(config.width))
        self.patch_embedding = nn.Conv2d(3, config.width, config.patch_size, config.patch_size, bias=False)
        self.position_embedding = nn.Embedding(config.patches + 1, config.width)

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = patch_tokens(pixel_values.to(self.class_embedding.dtype), self.patch_embedding)
        class_token = self.class_embedding.expand(patches.shape[0], 1, -1)
        return torch.cat([class_token, patches], dim=1) + self.position_embedding.weight


class VisionModel(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        self.pre_layrnorm = LayerNorm(config.width, eps=config.layer_norm_eps)  # sic, as in the state dict
        self.encoder = Encoder(config)
        self.post_layernorm = LayerNorm(config.width, eps=config.layer_norm_eps)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[B, 3, S, S] → [B, N, C] before `post_layernorm`, which CLIP applies to CLS only."""
        return self.encoder(self.pre_layrnorm(self.embeddings(pixel_values)))


class TextModel(nn.Module):
    """A causal text transformer. Tokens after the end of text cannot affect it, so padding needs no mask."""

    def __init__(self, config: TextConfig, eos_token_id: int) -> None:
        super().__init__()
        self.eos_token_id = eos_token_id
        self.embeddings = TextEmbeddings(config)
        self.encoder = Encoder(config)
        self.final_layer_norm = LayerNorm(config.width, eps=config.layer_norm_eps)

    def forward(self, input_ids: Tensor) -> Tensor:
        """int64 [T, L] → [T, C], the final hidden state at the end of text."""
        hidden = self.encoder(self.embeddings(input_ids), causal_mask(input_ids.shape[1], input_ids.device))
        places = end_of_text(input_ids, self.eos_token_id)
        pooled = hidden.gather(1, places[:, None, None].expand(-1, 1, hidden.shape[-1]))
        return self.final_layer_norm(pooled[:, 0])


class ClipRetrieval(nn.Module):
    """The whole model in eager PyTorch."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_model = VisionModel(config.vision)
        self.text_model = TextModel(config.text, config.eos_token_id)
        self.visual_projection = nn.Linear(config.vision.width, config.embed_dim, bias=False)
        self.text_projection = nn.Linear(config.text.width, config.embed_dim, bias=False)

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """pixel_values float32 [B, 3, S, S] → image_embeds [B, N, C], CLS first, before any pooling."""
        return self.vision_model(pixel_values)

    def encode_queries(self, image_embeds: Tensor) -> Tensor:
        """image_embeds [B, N, C] → float32 [B, 1, E] of unit length, from CLS only."""
        class_token = image_embeds[:, :1].to(self.visual_projection.weight.dtype)
        return unit_length(self.visual_projection(self.vision_model.post_layernorm(class_token)))

    def encode_text(self, input_ids: Tensor) -> Tensor:
        """input_ids int64 [T, L], padded on the right with anything, L ≤ max_positions → float32 [T, E] of unit
        length."""
        return unit_length(self.text_projection(self.text_model(input_ids)))


def causal_mask(length: int, device: torch.device) -> Tensor:
    """float32 [1, 1, L, L] to be added to attention scores: no token sees a later one."""
    places = torch.arange(length, device=device)
    return (places[None, :] > places[:, None]).float()[None, None] * MASKED


def end_of_text(input_ids: Tensor, eos_token_id: int) -> Tensor:
    """int64 [T, L] → int64 [T], the position where each text is pooled: the first end of text, or 0 if there is none.

    Written without argmax, whose choice among equal values depends on the runtime (padding is often the end-of-text
    token).
    """
    sought = input_ids.amax(dim=1, keepdim=True) if eos_token_id == LEGACY_EOS else eos_token_id
    length = input_ids.shape[1]
    places = torch.arange(length, device=input_ids.device)
    first = torch.where(input_ids == sought, places, length).amin(dim=1)
    return torch.where(first < length, first, 0)


STAGES: dict[str, type[nn.Module]] = {"vision": VisionStage, "image_query": PlainQueryStage, "text": TextStage}
