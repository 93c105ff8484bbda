"""The Q-Former's three uses (queries to an image, a text alone, queries and text to an image), with LAVIS's names.

Source: LAVIS `lavis/models/blip2_models/Qformer.py`. It is BERT with two changes: layers whose index is a multiple of
the cross-attention frequency let the *queries* attend to image tokens, and queries have their own feed-forward
(`intermediate_query`, `output_query`). LAVIS stacks queries and text in one tensor and slices it; here the two stay
separate and are joined only in self-attention.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qpert.graphs.families.blip2.config import QFormerConfig
from qpert.graphs.layers import AttentionModule, LayerNorm, merge_heads, split_heads
from qpert.graphs.perturbation.oracle import perturb_queries

MASKED = -10000.0
"""Added to the scores of padding tokens (LAVIS `get_extended_attention_mask`); exp(-10000) is 0 in float32."""


@dataclass(frozen=True)
class ImageContext:
    """What the A cross-attentions of one batch of images need.

    keys, values: A tensors each, [B, H, N, d]. query_map: [B, A, H, d, d] float32, or None for stock attention.
    """

    keys: list[Tensor]
    values: list[Tensor]
    query_map: Tensor | None
    preserve_norm: bool = False


class Projections(nn.Module):
    """`self` of LAVIS's BertAttention: the three input projections of an attention."""

    def __init__(self, width: int, source_width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(source_width, width)
        self.value = nn.Linear(source_width, width)


class ResidualOutput(nn.Module):
    """`dense`, then LayerNorm of the sum with the residual (post-norm)."""

    def __init__(self, source_width: int, config: QFormerConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(source_width, config.width)
        self.LayerNorm = LayerNorm(config.width, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dense(x) + residual)


class Intermediate(nn.Module):
    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.width, config.mlp_width)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.gelu(self.dense(x))


class SelfAttention(AttentionModule):
    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.self = Projections(config.width, config.width, config.heads)
        self.output = ResidualOutput(config.width, config)

    def forward(self, x: Tensor, additive_mask: Tensor | None) -> Tensor:
        projections = (self.self.query(x), self.self.key(x), self.self.value(x))
        queries, keys, values = (split_heads(part, self.self.heads) for part in projections)
        context = self.kernel(queries, keys, values, additive_mask)
        return self.output(merge_heads(context), x)


class CrossAttention(AttentionModule):
    """Queries to image tokens; keys and values come from the `ImageContext`."""

    def __init__(self, config: QFormerConfig, image_width: int) -> None:
        super().__init__()
        self.self = Projections(config.width, image_width, config.heads)
        self.output = ResidualOutput(config.width, config)

    def forward(self, x: Tensor, image: ImageContext, index: int) -> Tensor:
        """x [B, T*Q, C] (T = 1 where no texts are involved); `index` counts cross-attentions."""
        queries = split_heads(self.self.query(x), self.self.heads)  # [B, H, T*Q, d]
        if image.query_map is not None:
            perturbed = perturb_queries(queries.float(), image.query_map[:, index], preserve_norm=image.preserve_norm)
            queries = perturbed.to(queries.dtype)
        context = self.kernel(queries, image.keys[index], image.values[index])
        return self.output(merge_heads(context), x)


class Layer(nn.Module):
    """One Q-Former layer. `crossattention` is None in layers without it."""

    def __init__(self, config: QFormerConfig, image_width: int, *, cross: bool) -> None:
        super().__init__()
        self.attention = SelfAttention(config)
        self.crossattention = CrossAttention(config, image_width) if cross else None
        self.intermediate = Intermediate(config)
        self.output = ResidualOutput(config.mlp_width, config)
        self.intermediate_query = Intermediate(config)
        self.output_query = ResidualOutput(config.mlp_width, config)

    def feed_forward_query(self, queries: Tensor) -> Tensor:
        return self.output_query(self.intermediate_query(queries), queries)

    def feed_forward_text(self, text: Tensor) -> Tensor:
        return self.output(self.intermediate(text), text)


class Encoder(nn.Module):
    def __init__(self, config: QFormerConfig, image_width: int) -> None:
        super().__init__()
        self.layer = nn.ModuleList(
            Layer(config, image_width, cross=i in config.cross_layers) for i in range(config.layers)
        )


class Embeddings(nn.Module):
    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.width)
        self.position_embeddings = nn.Embedding(config.max_positions, config.width)
        self.LayerNorm = LayerNorm(config.width, eps=config.layer_norm_eps)

    def forward(self, input_ids: Tensor) -> Tensor:
        """[B, L] → [B, L, C], before the LayerNorm (which LAVIS applies to queries and text alike)."""
        return self.word_embeddings(input_ids) + self.position_embeddings.weight[: input_ids.shape[1]]


class Bert(nn.Module):
    def __init__(self, config: QFormerConfig, image_width: int) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config, image_width)


class QFormer(nn.Module):
    """`Qformer` of LAVIS's `Blip2Qformer`, without the language-model head that retrieval does not use."""

    def __init__(self, config: QFormerConfig, image_width: int) -> None:
        super().__init__()
        self.config = config
        self.bert = Bert(config, image_width)

    @property
    def layers(self) -> list[Layer]:
        return [layer for layer in self.bert.encoder.layer if isinstance(layer, Layer)]

    @property
    def cross_attentions(self) -> list[CrossAttention]:
        return [layer.crossattention for layer in self.layers if layer.crossattention is not None]

    def keys_and_values(self, image_embeds: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The keys and the values of all A cross-attentions.

        Separate projections: the result of a single one, 2·A·H·d wide, exceeds a CPU's cache, and adding its bias and
        splitting it took a seventh of the `itm` graph's time.

        Args:
            image_embeds: [B, N, C].

        Returns:
            Twice A tensors [B, H, N, d] in the dtype of `image_embeds`.
        """
        projections = [cross.self for cross in self.cross_attentions]
        keys = [split_heads(p.key(image_embeds), self.config.heads) for p in projections]
        values = [split_heads(p.value(image_embeds), self.config.heads) for p in projections]
        return keys, values

    def encode_queries(self, query_tokens: Tensor, image: ImageContext) -> Tensor:
        """Queries to an image: query_tokens [1, Q, C] → [B, Q, C].

        The batch axis stays 1 until the first cross-attention, because nothing depends on the image before it; runtimes
        precompute that part as a constant.
        """
        hidden = self.bert.embeddings.LayerNorm(query_tokens)
        index = 0
        for layer in self.layers:
            hidden = layer.attention(hidden, None)
            if layer.crossattention is not None:
                hidden = layer.crossattention(hidden, image, index)
                index += 1
            hidden = layer.feed_forward_query(hidden)
        return hidden

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """A text alone: input_ids and attention_mask int64 [T, L] → [T, L, C]."""
        hidden = self.bert.embeddings.LayerNorm(self.bert.embeddings(input_ids))
        mask = additive_mask(attention_mask)
        for layer in self.layers:
            hidden = layer.feed_forward_text(layer.attention(hidden, mask))
        return hidden

    def encode_pairs(
        self, query_tokens: Tensor, image: ImageContext, input_ids: Tensor, attention_mask: Tensor
    ) -> Tensor:
        """T texts for each of I images: input_ids and attention_mask int64 [I, T, L] → queries [I*T, Q, C].

        In cross-attention all texts of an image share its keys and values: their queries form one row [I, T*Q, C].
        """
        images, texts = input_ids.shape[0], input_ids.shape[1]
        ids, text_mask = input_ids.flatten(0, 1), attention_mask.flatten(0, 1)  # [I*T, L]
        text = self.bert.embeddings.LayerNorm(self.bert.embeddings(ids))
        queries = self.bert.embeddings.LayerNorm(query_tokens).expand(text.shape[0], -1, -1)
        count = query_tokens.shape[1]
        mask = additive_mask(torch.cat([text_mask.new_ones(text_mask.shape[0], count), text_mask], dim=1))
        index = 0
        for number, layer in enumerate(self.layers):
            joint = layer.attention(torch.cat([queries, text], dim=1), mask)  # [I*T, Q+L, C]
            queries, text = joint[:, :count], joint[:, count:]
            if layer.crossattention is not None:
                rows = queries.unflatten(0, (images, texts)).flatten(1, 2)  # [I, T*Q, C]
                rows = layer.crossattention(rows, image, index)
                queries = rows.unflatten(1, (texts, count)).flatten(0, 1)  # [I*T, Q, C]
                index += 1
            queries = layer.feed_forward_query(queries)
            if number + 1 < self.config.layers:  # the text of the last layer is not used
                text = layer.feed_forward_text(text)
        return queries


def additive_mask(attention_mask: Tensor) -> Tensor:
    """int64 [B, L], 1 for tokens and 0 for padding → float32 [B, 1, 1, L] to be added to attention scores."""
    return (1.0 - attention_mask.float())[:, None, None, :] * MASKED
