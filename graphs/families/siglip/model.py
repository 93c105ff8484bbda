"""SigLIP: two towers, the image pooled by one learned query, with Hugging Face's parameter names.

Source: transformers `modeling_siglip.py`. `logit_scale` and `logit_bias` change all scores equally and are left out.

Perturbing the pooling head's query is an extension of qpert: the paper (ECCV 2024) perturbs the cross-attentions of
BLIP-2, CoCa and InternVL. The head is a cross-attention of one query to the patches, so the definition applies
unchanged (A = 1, Q = 1). Zero box weights give stock SigLIP.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qpert.graphs.families.siglip.config import SiglipConfig
from qpert.graphs.layers import AttentionModule, LayerNorm, merge_heads, split_heads
from qpert.graphs.perturbation.choices import GraphPerturbation, QueryMap
from qpert.graphs.perturbation.oracle import perturb_queries, query_map
from qpert.graphs.stages import PerturbedQueryStage, TextStage, VisionStage
from qpert.graphs.transformer import Encoder, Mlp, TextConfig, TextEmbeddings, VisionConfig, patch_tokens, unit_length


class VisionEmbeddings(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, config.width, config.patch_size, config.patch_size)
        self.position_embedding = nn.Embedding(config.patches, config.width)

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = patch_tokens(pixel_values.to(self.patch_embedding.weight.dtype), self.patch_embedding)
        return patches + self.position_embedding.weight


class PackedAttention(AttentionModule):
    """`nn.MultiheadAttention`'s parameters, with the attention written out: `in_proj` stacks query, key and value."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.in_proj_weight = nn.Parameter(torch.zeros(3 * config.width, config.width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * config.width))
        self.out_proj = nn.Linear(config.width, config.width)

    def project(self, x: Tensor, part: int) -> Tensor:
        """[B, N, C] → [B, H, N, d]; `part` is 0 for queries, 1 for keys, 2 for values."""
        width = self.in_proj_weight.shape[1]
        rows = slice(part * width, (part + 1) * width)
        return split_heads(nn.functional.linear(x, self.in_proj_weight[rows], self.in_proj_bias[rows]), self.heads)

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """[B or 1, H, Q, d] and twice [B, H, N, d] → [B, Q, C]."""
        return self.out_proj(merge_heads(self.kernel(queries, keys, values)))


class PoolingHead(nn.Module):
    """One learned query, the probe, attends to the image tokens; then an MLP with a residual."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.zeros(1, 1, config.width))
        self.attention = PackedAttention(config)
        self.layernorm = LayerNorm(config.width, eps=config.layer_norm_eps)
        self.mlp = Mlp(config)

    def keys(self, image_tokens: Tensor) -> Tensor:
        """[B, N, C] → [B, H, N, d]."""
        return self.attention.project(image_tokens, 1)

    def forward(self, image_tokens: Tensor, mapped: Tensor | None, preserve_norm: bool) -> Tensor:
        """image_tokens [B, N, C] and, if boxes are given, the query's map float32 [B, H, d, d] → [B, 1, C]."""
        query = self.attention.project(self.probe, 0)  # [1, H, 1, d]
        if mapped is not None:
            query = perturb_queries(query.float(), mapped, preserve_norm=preserve_norm).to(query.dtype)
        pooled = self.attention(query, self.keys(image_tokens), self.attention.project(image_tokens, 2))
        return pooled + self.mlp(self.layernorm(pooled))


class VisionModel(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        self.encoder = Encoder(config)
        self.post_layernorm = LayerNorm(config.width, eps=config.layer_norm_eps)
        self.head = PoolingHead(config)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[B, 3, S, S] → [B, N, C], normalised, for the pooling head to attend to."""
        return self.post_layernorm(self.encoder(self.embeddings(pixel_values)))


class TextModel(nn.Module):
    """Bidirectional and without a mask: padding matters, so all texts have the length used in training."""

    def __init__(self, config: TextConfig, embed_dim: int) -> None:
        super().__init__()
        self.embeddings = TextEmbeddings(config)
        self.encoder = Encoder(config)
        self.final_layer_norm = LayerNorm(config.width, eps=config.layer_norm_eps)
        self.head = nn.Linear(config.width, embed_dim)

    def forward(self, input_ids: Tensor) -> Tensor:
        """int64 [T, L] → [T, E], from the last position, which is usually padding."""
        hidden = self.encoder(self.embeddings(input_ids))
        return self.head(self.final_layer_norm(hidden[:, -1]))


class SiglipRetrieval(nn.Module):
    """The whole model in eager PyTorch; `perturbation` None is stock SigLIP.

    `query_map` computes the query's map: by default the float64 `eigh` oracle, which makes this module the reference;
    the exporter passes the placeholder for tracing.
    """

    def __init__(
        self, config: SiglipConfig, perturbation: GraphPerturbation | None = None, *, query_map: QueryMap = query_map
    ) -> None:
        super().__init__()
        self.config = config
        self.perturbation = perturbation
        self.query_map = query_map
        self.vision_model = VisionModel(config.vision)
        self.text_model = TextModel(config.text, config.embed_dim)

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """pixel_values float32 [B, 3, S, S] → image_embeds [B, N, C] after `post_layernorm`, one for each patch."""
        return self.vision_model(pixel_values)

    def keys(self, image_embeds: Tensor) -> Tensor:
        """image_embeds [B, N, C] → float32 [B, A, H, N, d], the keys that boxes select from; A is 1."""
        choices = self.perturbation or GraphPerturbation()
        return choices.subspace_keys(self.vision_model.head.keys(self._cast(image_embeds)))[:, None]

    def encode_queries(
        self, image_embeds: Tensor, object_masks: Tensor | None = None, box_weights: Tensor | None = None
    ) -> Tensor:
        """image_embeds [B, N, C], object_masks float32 [B, O, N], box_weights float32 [B, O] → float32 [B, 1, E].

        Rows have unit length. There is no CLS, so every token has a cell that boxes may cover.
        """
        mapped, preserve_norm = None, False
        if self.perturbation is not None and object_masks is not None and box_weights is not None:
            threshold, preserve_norm = self.perturbation.threshold, self.perturbation.preserve_norm
            mapped = self.query_map(self.keys(image_embeds), object_masks, box_weights, threshold=threshold)[:, 0]
        return unit_length(self.vision_model.head(self._cast(image_embeds), mapped, preserve_norm))

    def encode_text(self, input_ids: Tensor) -> Tensor:
        """input_ids int64 [T, L] → float32 [T, E] of unit length.

        L is `max_positions`: shorter texts, or other padding than in training, give other vectors.
        """
        return unit_length(self.text_model(input_ids))

    def _cast(self, image_embeds: Tensor) -> Tensor:
        return image_embeds.to(self.vision_model.head.probe.dtype)


STAGES: dict[str, type[nn.Module]] = {"vision": VisionStage, "image_query": PerturbedQueryStage, "text": TextStage}
