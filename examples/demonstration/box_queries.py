"""Query embeddings of pictures under boxes, fast enough for hundreds of settings: one query set for all boxes of a
picture (sum, mean), or one for each box.

The decomposition of each box's keys is done once; a threshold τ and a weight then cost a product and the Q-Former.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scoring import token_grid
from torch import Tensor

from qpert.graphs.families.blip2.model import Blip2Retrieval, unit_length
from qpert.graphs.families.blip2.qformer import ImageContext
from qpert.runtime.inputs.boxes import Boxes
from qpert.runtime.inputs.perturbation import object_masks

SETS_AT_ONCE = 200


@dataclass(frozen=True, eq=False)
class BoxedImages:
    """B pictures with F boxes in all. keys, values: A tensors [B, H, N, d].

    owners int64 [F]: the picture of each box. areas float32 [F]: its share of the picture. covered float32 [F, N]: its
    mask. directions float32 [F, A, H, d, R]: the eigenvectors of each box's key Gram matrix, leading first (R: the most
    tokens that a box covers, or d). ratios float64 [F, A, H, R]: contribution ratios c_p (paper, section 4.3).
    """

    model: Blip2Retrieval
    keys: list[Tensor]
    values: list[Tensor]
    owners: Tensor
    areas: Tensor
    covered: Tensor
    directions: Tensor
    ratios: Tensor

    def __len__(self) -> int:
        return len(self.keys[0])

    def ranks(self, threshold: float) -> Tensor:
        """int64 [F, A, H]: p, as in `graphs/perturbation/oracle.py`; 0 if a box covers nothing."""
        covered = self.ratios[..., -1] > 0
        return (self.ratios < threshold).sum(-1).clamp(min=1) * covered

    def each(self, weights: Tensor, threshold: float) -> Tensor:
        """A query set for every box: weights [F] → float32 [F, Q, E] of unit length."""
        kept = self._kept(threshold)
        rows = []
        for part in torch.arange(len(self.owners)).split(SETS_AT_ONCE):
            maps = _maps(self.directions[part], kept[part] * weights[part, None, None, None])
            rows.append(self._queries(self.owners[part], maps))
        return torch.cat(rows)

    def together(self, weights: Tensor, threshold: float) -> Tensor:
        """One query set for all boxes of a picture, their weighted projectors added: float32 [B, Q, E]."""
        kept = self._kept(threshold)
        rows = []
        for part in torch.arange(len(self)).split(SETS_AT_ONCE):
            low, high = torch.searchsorted(self.owners, torch.stack([part[0], part[-1] + 1])).tolist()
            chosen = slice(low, high)
            single = _maps(self.directions[chosen], kept[chosen] * weights[chosen, None, None, None])
            maps = torch.zeros(len(part), *single.shape[1:]).index_add_(0, self.owners[chosen] - part[0], single)
            rows.append(self._queries(part, maps))
        return torch.cat(rows)

    def stock(self) -> Tensor:
        """Without boxes: float32 [B, Q, E]."""
        return torch.cat([self._queries(part, None) for part in torch.arange(len(self)).split(SETS_AT_ONCE)])

    def counts(self) -> Tensor:
        """int64 [B]: boxes of each picture."""
        return torch.bincount(self.owners, minlength=len(self))

    def _kept(self, threshold: float) -> Tensor:
        return (torch.arange(self.ratios.shape[-1]) < self.ranks(threshold)[..., None]).float()  # [F, A, H, R]

    def _queries(self, images: Tensor, added: Tensor | None) -> Tensor:
        keys, values = ([layer[images] for layer in layers] for layers in (self.keys, self.values))
        query_map = None if added is None else added + torch.eye(added.shape[-1])
        hidden = self.model.Qformer.encode_queries(self.model.query_tokens, ImageContext(keys, values, query_map))
        return unit_length(self.model.vision_proj(hidden))


def boxed_images(model: Blip2Retrieval, image_embeds: Tensor, boxes: Sequence[Boxes]) -> BoxedImages:
    """Decompose the keys of every box. image_embeds [B, N, C]; a picture may have no boxes."""
    with torch.no_grad():
        keys, values = model.Qformer.keys_and_values(image_embeds)
    owners = torch.from_numpy(np.repeat(np.arange(len(boxes)), [len(each) for each in boxes]))
    areas = torch.from_numpy(np.concatenate([np.zeros(0), *[each.areas for each in boxes]]).astype(np.float32))
    masks = torch.from_numpy(object_masks(boxes, grid=token_grid(), coverage="exact"))  # [B, O, N]
    flat = torch.cat([masks[:0, 0], *[masks[image, : len(each)] for image, each in enumerate(boxes)]])  # [F, N]
    stacked = torch.stack(keys, dim=1)  # [B, A, H, N, d]
    rank = min(int((flat > 0).sum(1).max()), stacked.shape[-1])
    directions, ratios = [], []
    for part in torch.arange(len(owners)).split(SETS_AT_ONCE):
        masked = flat[part][:, None, None, :, None].double() * stacked[owners[part]].double()  # [f, A, H, N, d]
        _, values_, vectors = torch.linalg.svd(masked, full_matrices=False)
        energy = values_.square()  # descending: the eigenvalues of K_bᵀ K_b
        total = energy.sum(-1, keepdim=True)
        ratios.append((energy.cumsum(-1) / torch.where(total > 0, total, 1.0))[..., :rank])
        directions.append(vectors.mT[..., :rank].float())
    return BoxedImages(model, keys, values, owners, areas, flat, torch.cat(directions), torch.cat(ratios))


def _maps(directions: Tensor, scale: Tensor) -> Tensor:
    """Σ_r scale_r v_r v_rᵀ: [F, A, H, d, R] and [F, A, H, R] → [F, A, H, d, d]."""
    return (directions * scale[..., None, :]) @ directions.mT


def best_of_sets(set_scores: np.ndarray, owners: np.ndarray, images: int) -> np.ndarray:
    """[F, T] scores of sets → [B, T], the best set of each picture; −inf for a picture without sets. Owners ascend."""
    result = np.full((images, set_scores.shape[1]), -np.inf, set_scores.dtype)
    if len(owners):
        starts = np.flatnonzero(np.r_[True, owners[1:] != owners[:-1]])
        result[owners[starts]] = np.maximum.reduceat(set_scores, starts, axis=0)
    return result
