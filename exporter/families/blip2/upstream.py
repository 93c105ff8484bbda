"""Computes the four graphs with a third-party network: the common base of the LAVIS and Hugging Face references.

Imports torch and numpy but not qpert: the LAVIS worker loads this file by its path in an environment without qpert. It
is also independent of `qpert.graphs` because that code is compared with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

Pairs = list[tuple[nn.Linear, nn.Linear]]

STAGES = ("itc", "both", "none")

INPUTS: dict[str, tuple[str, ...]] = {
    "vision": ("pixel_values",),
    "image_query": ("image_embeds",),
    "text": ("input_ids", "attention_mask"),
    "itm": ("image_embeds", "input_ids", "attention_mask"),
}
BOX_INPUTS = ("object_masks", "box_weights")
PERTURBED: dict[str, tuple[str, ...]] = {"itc": ("image_query",), "both": ("image_query", "itm"), "none": ()}


class Reference(Protocol):
    """A network that computes the exported graphs by other means. `close` frees it. A context manager."""

    name: str

    def run(self, graph: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs of `graph` (vision, image_query, text, itm), named and shaped as the exported graph's, float32."""
        ...

    def close(self) -> None: ...


def query_maps(
    keys: Tensor, object_masks: Tensor, box_weights: Tensor, threshold: float, centre_keys: bool = False
) -> Tensor:
    """M = I + Σ_b w_b P_b from keys [B,H,N,d], masks [B,O,N] and weights [B,O], in float64: [B,H,d,d].

    P_b projects on the first p eigenvectors of K_bᵀ K_b, K_b = diag(m_b) K, where p is the largest dimension whose
    share of the eigenvalues stays below `threshold`, at least one; P_b = 0 if nothing is covered. ECCV 2024 paper 4.2.
    `centre_keys`, which is qpert's: K is taken from its mean over all N tokens.
    """
    keys = keys.double()
    if centre_keys:
        tokens = keys.shape[2]
        keys = keys - keys.sum(2, keepdim=True) / tokens
    masked = object_masks.double()[:, :, None, :, None] * keys[:, None]  # [B,O,H,N,d]
    values, vectors = torch.linalg.eigh(masked.transpose(-1, -2) @ masked)  # ascending
    values, vectors = values.flip(-1).clamp(min=0), vectors.flip(-1)
    total = values.sum(-1, keepdim=True)
    share = values.cumsum(-1) / total.where(total > 0, 1)
    rank = (share < threshold).sum(-1, keepdim=True).clamp(min=1)
    kept = (torch.arange(values.shape[-1]) < rank) & (total > 0)  # [B,O,H,d]
    basis = vectors * kept[..., None, :]
    projectors = basis @ basis.transpose(-1, -2)  # [B,O,H,d,d]
    return torch.eye(keys.shape[-1], dtype=torch.float64) + torch.einsum(
        "bo,bohij->bhij", box_weights.double(), projectors
    )


def _mapped(output: Tensor, maps: Tensor, preserve_norm: bool) -> Tensor:
    """Queries [B,Q,H·d] times a matrix for each head [B or 1,H,d,d]."""
    heads, size = maps.shape[1], maps.shape[-1]
    queries = output.double().reshape(*output.shape[:-1], heads, size).transpose(1, 2)  # [B,H,Q,d]
    result: Tensor = queries @ maps
    if preserve_norm:
        norm = result.norm(dim=-1, keepdim=True)
        result = result * queries.norm(dim=-1, keepdim=True) / norm.where(norm > 0, 1)
    return result.transpose(1, 2).flatten(2).to(output.dtype)


@contextmanager
def perturbed_cross_attention(
    pairs: Pairs,
    heads: int,
    image_embeds: Tensor,
    object_masks: Tensor,
    box_weights: Tensor,
    threshold: float,
    preserve_norm: bool,
    centre_keys: bool = False,
) -> Iterator[None]:
    """Inside, the outputs of the stock cross-attention `query` layers are perturbed; `pairs` are (query, key) layers.

    `image_embeds` [B,N,C] is what the network attends to, or [1,N,C] for one image with a whole batch.
    """
    with ExitStack() as hooks:
        for query, key in pairs:
            keys: Tensor = key(image_embeds)
            keys = keys.reshape(*keys.shape[:-1], heads, -1).transpose(1, 2)  # [B,H,N,d]
            maps = query_maps(keys, object_masks, box_weights, threshold, centre_keys)
            handle = query.register_forward_hook(lambda _m, _i, output, maps=maps: _mapped(output, maps, preserve_norm))
            hooks.callback(handle.remove)
        yield


class UpstreamReference:
    """Computes the four graphs with the parts of a stock model, which a subclass names."""

    name = "stock"

    def __init__(
        self,
        model: nn.Module,
        *,
        heads: int,
        threshold: float = 0.95,
        preserve_norm: bool = False,
        centre_keys: bool = False,
        stages: str = "itc",
    ) -> None:
        if stages not in STAGES:
            raise ValueError(f"stages is {stages!r}, expected one of {', '.join(STAGES)}")
        self.model: Any = model.eval().float().requires_grad_(False)
        self.heads = heads
        self.threshold = threshold
        self.preserve_norm = preserve_norm
        self.centre_keys = centre_keys
        self.stages = stages

    # What a subclass provides.

    def image_embeds(self, pixel_values: Tensor) -> Tensor:
        """[B,3,S,S] → [B,N,C], after the last LayerNorm."""
        raise NotImplementedError

    def query_embeds(self, image_embeds: Tensor) -> Tensor:
        """[B,N,C] → [B,Q,E], unit length."""
        raise NotImplementedError

    def text_embeds(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[T,L] → [T,E], unit length."""
        raise NotImplementedError

    def match_scores(self, image_embeds: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Pairs: [P,N,C] and [P,L] → [P], the logit of class 1 averaged over queries."""
        raise NotImplementedError

    def cross_attention_pairs(self) -> Pairs:
        """The (query, key) layers of every cross-attention, in the order of the layers."""
        raise NotImplementedError

    # The graphs.

    @torch.no_grad()
    def run(self, graph: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs of `graph`, as the exported graph has them. `object_masks` [B,O,N] and `box_weights` [B,O] are
        optional in the perturbed stages; without them, or with no box, the network is the stock one. Features may have
        half precision.
        """
        self._check(graph, inputs)
        arrays = {name: torch.from_numpy(np.array(value, order="C")) for name, value in inputs.items()}
        tensors = {name: value.float() if value.is_floating_point() else value for name, value in arrays.items()}
        if graph == "vision":
            outputs = {"image_embeds": self.image_embeds(tensors["pixel_values"])}
        elif graph == "text":
            outputs = {"text_embeds": self.text_embeds(tensors["input_ids"], tensors["attention_mask"])}
        elif graph == "image_query":
            with self._perturbed(tensors):
                outputs = {"query_embeds": self.query_embeds(tensors["image_embeds"])}
        else:
            outputs = {"itm_scores": self._itm(tensors)}
        return {name: value.float().contiguous().numpy() for name, value in outputs.items()}

    def _itm(self, tensors: dict[str, Tensor]) -> Tensor:
        """Scores [I,T], image by image; an image's features are expanded over its T texts."""
        texts = tensors["input_ids"].shape[1]
        rows = []
        for i in range(len(tensors["image_embeds"])):
            one = {name: value[i : i + 1] for name, value in tensors.items()}
            with self._perturbed(one):
                embeds = one["image_embeds"].expand(texts, -1, -1)
                rows.append(self.match_scores(embeds, one["input_ids"][0], one["attention_mask"][0]))
        return torch.stack(rows)

    @contextmanager
    def _perturbed(self, tensors: dict[str, Tensor]) -> Iterator[None]:
        if "object_masks" not in tensors:
            yield
            return
        with perturbed_cross_attention(
            self.cross_attention_pairs(),
            self.heads,
            tensors["image_embeds"],
            tensors["object_masks"],
            tensors["box_weights"],
            self.threshold,
            self.preserve_norm,
            self.centre_keys,
        ):
            yield

    def _check(self, graph: str, inputs: Mapping[str, np.ndarray]) -> None:
        if graph not in INPUTS:
            raise ValueError(f"graph is {graph!r}, expected one of {', '.join(INPUTS)}")
        needed = set(INPUTS[graph])
        allowed = [needed] + ([needed | set(BOX_INPUTS)] if graph in PERTURBED[self.stages] else [])
        if set(inputs) not in allowed:
            expected = " or ".join(str(sorted(names)) for names in allowed)
            raise ValueError(
                f"{graph} was given {sorted(inputs)}, expected {expected} (perturbed stages: {self.stages})"
            )

    def close(self) -> None:
        """Drop the model."""
        self.model = None

    def __enter__(self) -> UpstreamReference:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
