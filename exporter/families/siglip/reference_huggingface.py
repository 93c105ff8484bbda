"""Stock Hugging Face `SiglipModel` as a reference, with boxes added to its pooling head from outside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qpert.exporter.families.blip2.upstream import query_maps
from qpert.exporter.hub.stock import TwoTowerReference, load_stock


class HuggingFaceReference(TwoTowerReference):
    """The parts of the stock model, put together as its own `forward` does (transformers `modeling_siglip.py`).

    Boxes: for each image, the stock head's projected query is multiplied by M = I + Σ_b w_b P_b (float64 `eigh`), and
    the stock head runs with the result.
    """

    class_name = "SiglipModel"

    def __init__(
        self,
        model: nn.Module,
        *,
        threshold: float = 0.95,
        preserve_norm: bool = False,
        centre_keys: bool = False,
        stages: str = "itc",
    ) -> None:
        if stages not in ("itc", "none"):
            raise ValueError(f"stages is {stages!r}, expected 'itc' or 'none': there is no pair stage")
        super().__init__(model)
        self.perturbable = stages == "itc"
        self.threshold = threshold
        self.preserve_norm = preserve_norm
        self.centre_keys = centre_keys

    @classmethod
    def open(
        cls,
        folder_or_id: str | Path,
        *,
        prefix: str = "",
        threshold: float = 0.95,
        preserve_norm: bool = False,
        centre_keys: bool = False,
        stages: str = "itc",
    ) -> HuggingFaceReference:
        """Load a folder or a hub id. Errors as in `load_stock`."""
        model = load_stock(cls.class_name, folder_or_id, prefix)
        return cls(model, threshold=threshold, preserve_norm=preserve_norm, centre_keys=centre_keys, stages=stages)

    def image_vector(
        self, image_tokens: Tensor, object_masks: Tensor | None = None, box_weights: Tensor | None = None
    ) -> Tensor:
        head = self.model.vision_model.head
        if object_masks is None or box_weights is None:
            stock: Tensor = head(image_tokens)
            return stock
        queries = self._perturbed(head, image_tokens, object_masks, box_weights)
        rows = []
        for query, tokens in zip(queries, image_tokens, strict=True):
            with ready_query(head, query):
                rows.append(head(tokens[None]))
        return torch.cat(rows)

    def _perturbed(self, head: Any, image_tokens: Tensor, object_masks: Tensor, box_weights: Tensor) -> Tensor:
        """The head's projected query for each image, [B,C]."""
        width, heads = head.attention.embed_dim, head.attention.num_heads
        weights, biases = head.attention.in_proj_weight.split(width), head.attention.in_proj_bias.split(width)
        query = (head.probe[0, 0] @ weights[0].T + biases[0]).double().reshape(heads, 1, -1)  # [H,1,d]
        keys = (image_tokens @ weights[1].T + biases[1]).unflatten(-1, (heads, -1)).transpose(1, 2)  # [B,H,N,d]
        maps = query_maps(keys, object_masks, box_weights, self.threshold, self.centre_keys)
        result = query @ maps  # [B,H,1,d]
        if self.preserve_norm:
            norm = result.norm(dim=-1, keepdim=True)
            result = result * query.norm(dim=-1, keepdim=True) / norm.where(norm > 0, 1)
        return result.flatten(1).float()

    def __enter__(self) -> HuggingFaceReference:
        return self


@contextmanager
def ready_query(head: Any, query: Tensor) -> Iterator[None]:
    """Inside, the stock head attends with `query` [C] unchanged: its probe is the query, its query projection I."""
    width = head.attention.embed_dim
    kept = head.probe, head.attention.in_proj_weight, head.attention.in_proj_bias
    weight, bias = kept[1].clone(), kept[2].clone()
    weight[:width], bias[:width] = torch.eye(width), 0
    head.probe = nn.Parameter(query[None, None], requires_grad=False)
    head.attention.in_proj_weight = nn.Parameter(weight, requires_grad=False)
    head.attention.in_proj_bias = nn.Parameter(bias, requires_grad=False)
    try:
        yield
    finally:
        head.probe, head.attention.in_proj_weight, head.attention.in_proj_bias = kept
