"""CoCa without its caption decoder: two towers, and one query that pools the image and that boxes may perturb.

Source: open_clip 3.3.0 `coca_model.py` and `transformer.py` (`VisionTransformer`, `AttentionalPooler`,
`TextTransformer`). Transformer blocks have the names of `qpert.graphs.transformer`, the rest open_clip's.

The paper (ECCV 2024, section 5.1) perturbs "the last cross-attention" of CoCa: the pooler, its only one outside the
decoder. Its 256 queries never meet, and retrieval reads the first alone, so only that one is computed (A = 1, Q = 1).
`logit_scale` multiplies all scores equally and is left out. Zero box weights give stock CoCa.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qpert.graphs.families.clip.model import MASKED, VisionEmbeddings, causal_mask
from qpert.graphs.families.coca.config import LAYER_NORM_EPS, CocaConfig
from qpert.graphs.layers import AttentionModule, LayerNorm, merge_heads, split_heads
from qpert.graphs.perturbation.choices import GraphPerturbation, QueryMap
from qpert.graphs.perturbation.oracle import perturb_queries, query_map
from qpert.graphs.stages import PerturbedQueryStage, TextStage, VisionStage
from qpert.graphs.transformer import Encoder, TextConfig, VisionConfig, unit_length

PADDING = 0
"""The id of padding tokens. It is also the id of "!" inside a run of punctuation, which is masked in the same way."""


class VisionTower(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        self.ln_pre = LayerNorm(config.width, eps=config.layer_norm_eps)
        self.encoder = Encoder(config)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[B, 3, S, S] → [B, N, C], CLS first; no norm follows the last block."""
        return self.encoder(self.ln_pre(self.embeddings(pixel_values)))


class AttentionalPooler(AttentionModule):
    """The first learned query attends to all image tokens, CLS included. No residual, no MLP."""

    def __init__(self, config: CocaConfig) -> None:
        super().__init__()
        tokens, width = config.vision.width, config.embed_dim
        self.heads = config.pooler_heads
        self.query = nn.Parameter(torch.zeros(1, width))
        self.ln_q = LayerNorm(width, eps=LAYER_NORM_EPS)
        self.ln_k = LayerNorm(tokens, eps=LAYER_NORM_EPS)
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(tokens, width)
        self.v_proj = nn.Linear(tokens, width)
        self.out_proj = nn.Linear(width, width)

    def keys(self, image_tokens: Tensor) -> Tensor:
        """[B, N, C] → [B, H, N, d]."""
        return split_heads(self.k_proj(self.ln_k(image_tokens)), self.heads)

    def forward(self, image_tokens: Tensor, mapped: Tensor | None, preserve_norm: bool) -> Tensor:
        """image_tokens [B, N, C] and, if boxes are given, the query's map float32 [B, H, d, d] → [B, 1, D]."""
        query = split_heads(self.q_proj(self.ln_q(self.query))[None], self.heads)  # [1, H, 1, d]
        if mapped is not None:
            query = perturb_queries(query.float(), mapped, preserve_norm=preserve_norm).to(query.dtype)
        values = split_heads(self.v_proj(self.ln_k(image_tokens)), self.heads)
        return self.out_proj(merge_heads(self.kernel(query, self.keys(image_tokens), values)))


class TextTower(nn.Module):
    """A causal text transformer that is pooled at a class token behind the text.

    open_clip pads every text to `max_positions` tokens and puts the class token behind the padding. Its mask of padding
    is shifted by one, as the published weights were trained: key j is hidden unless j = 0 or token j − 1 is not
    padding. The class token therefore sees the text and one padding token, and itself only behind a text of full
    length. The same numbers come from any shorter length: here one padding token always follows the L tokens, and the
    class token keeps the last position.
    """

    def __init__(self, config: TextConfig, embed_dim: int) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.positional_embedding = nn.Parameter(torch.zeros(config.max_positions + 1, config.width))
        self.cls_emb = nn.Parameter(torch.zeros(config.width))
        self.encoder = Encoder(config)
        self.ln_final = LayerNorm(config.width, eps=config.layer_norm_eps)
        self.text_projection = nn.Parameter(torch.zeros(config.width, embed_dim))

    def forward(self, input_ids: Tensor) -> Tensor:
        """int64 [T, L], L ≤ `max_positions` → [T, E]."""
        mask = self.mask(input_ids)
        padded = torch.cat([input_ids, torch.full_like(input_ids[:, :1], PADDING)], dim=1)
        positions = self.positional_embedding
        tokens = self.token_embedding(padded) + positions[: padded.shape[1]]
        class_token = (self.cls_emb + positions[-1]).expand(tokens.shape[0], 1, -1)
        hidden = self.encoder(torch.cat([tokens, class_token], dim=1), mask)
        return self.ln_final(hidden[:, -1]) @ self.text_projection

    def mask(self, input_ids: Tensor) -> Tensor:
        """float32 [T, 1, L + 2, L + 2], to be added to attention scores.

        Behind a text of `max_positions` tokens there is no room for padding: its column is hidden, and the class token
        takes its place as key `max_positions`.
        """
        length = input_ids.shape[1]
        full = torch.arange(length, device=input_ids.device)[-1:] == self.positional_embedding.shape[0] - 2  # [1]
        seen = input_ids != PADDING  # [T, L]: whether the key after each token is seen
        last = seen[:, -1:]
        keys = torch.cat([torch.ones_like(last), seen[:, :-1], last & ~full, last & full], dim=1)  # [T, L + 2]
        return (~keys).float()[:, None, None] * MASKED + causal_mask(length + 2, input_ids.device)


class CocaRetrieval(nn.Module):
    """The whole model in eager PyTorch; `perturbation` None is stock CoCa.

    `query_map` computes the query's map: by default the float64 `eigh` oracle, which makes this module the reference;
    the exporter passes the placeholder for tracing.
    """

    def __init__(
        self, config: CocaConfig, perturbation: GraphPerturbation | None = None, *, query_map: QueryMap = query_map
    ) -> None:
        super().__init__()
        self.config = config
        self.perturbation = perturbation
        self.query_map = query_map
        self.visual = VisionTower(config.vision)
        self.pooler = AttentionalPooler(config)
        self.ln_post = LayerNorm(config.embed_dim, eps=LAYER_NORM_EPS)
        self.proj = nn.Parameter(torch.zeros(config.embed_dim, config.embed_dim))
        self.text = TextTower(config.text, config.embed_dim)

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """pixel_values float32 [B, 3, S, S] → image_embeds [B, N, C], CLS first, before any pooling."""
        return self.visual(pixel_values)

    def keys(self, image_embeds: Tensor) -> Tensor:
        """image_embeds [B, N, C] → float32 [B, A, H, N, d], the keys that boxes select from; A is 1."""
        choices = self.perturbation or GraphPerturbation()
        return choices.subspace_keys(self.pooler.keys(self._cast(image_embeds)))[:, None]

    def encode_queries(
        self, image_embeds: Tensor, object_masks: Tensor | None = None, box_weights: Tensor | None = None
    ) -> Tensor:
        """image_embeds [B, N, C], object_masks float32 [B, O, N], box_weights float32 [B, O] → float32 [B, 1, E].

        Rows have unit length. Masks are 0 at CLS, which no box covers.
        """
        mapped, preserve_norm = None, False
        if self.perturbation is not None and object_masks is not None and box_weights is not None:
            threshold, preserve_norm = self.perturbation.threshold, self.perturbation.preserve_norm
            mapped = self.query_map(self.keys(image_embeds), object_masks, box_weights, threshold=threshold)[:, 0]
        pooled = self.pooler(self._cast(image_embeds), mapped, preserve_norm)
        return unit_length(self.ln_post(pooled) @ self.proj)

    def encode_text(self, input_ids: Tensor) -> Tensor:
        """input_ids int64 [T, L], padded on the right with 0, L ≤ `max_positions` → float32 [T, E] of unit length."""
        return unit_length(self.text(input_ids))

    def _cast(self, image_embeds: Tensor) -> Tensor:
        return image_embeds.to(self.proj.dtype)


STAGES: dict[str, type[nn.Module]] = {"vision": VisionStage, "image_query": PerturbedQueryStage, "text": TextStage}
