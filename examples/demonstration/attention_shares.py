"""Where queries look, without boxes and with them: why boxes help, or do not."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from study_data import Point, Scorer
from torch import Tensor

from qpert.graphs.families.blip2.model import Blip2Retrieval
from qpert.graphs.layers import AttentionKernel, AttentionModule


def attention(scorer: Scorer, points: dict[str, Point]) -> dict[str, Any]:
    """Where the queries look, by cross-attention and averaged over heads and queries: the share of attention on the
    tokens that the smallest box of a picture covers, without boxes and with that box's own query set; the ranks kept;
    and the share of queries (and heads) whose product with the box's leading direction has the sign of its mean key,
    so that the perturbation raises the box's logits."""
    boxed, model = scorer.boxed, scorer.boxed.model
    smallest = [int(i) for i in _smallest_boxes(boxed.owners.numpy(), boxed.areas.numpy())]
    images = boxed.owners[smallest]
    masks = boxed.covered[smallest]  # [F', N]
    result: dict[str, Any] = {"tokens covered": round(float((masks > 0).float().sum(1).mean()), 2)}
    result["picture"] = round(float(boxed.areas[smallest].mean()), 4)
    with AttentionRecord(model) as record:
        boxed.stock()
    plain = [torch.cat(layer)[images] for layer in record.attention]
    result["stock"] = [_on_box(layer, masks) for layer in plain]
    for name, point in points.items():
        with AttentionRecord(model) as record:
            boxed.each(point.weights(boxed), point.threshold)
        perturbed = [torch.cat(layer)[smallest] for layer in record.attention]
        result[name] = {
            "setting": asdict(point),
            "on the box": [_on_box(layer, masks) for layer in perturbed],
            "raised": [
                round(float((_mass(a, masks) > _mass(b, masks)).float().mean()), 3)
                for a, b in zip(perturbed, plain, strict=True)
            ],
            "rank": [round(float(r), 2) for r in boxed.ranks(point.threshold)[smallest].float().mean((0, 2))],
        }
    return result


def _mass(layer: Tensor, masks: Tensor) -> Tensor:
    return (layer * (masks > 0)[:, None, None]).sum(-1)  # [F', H, Q]


def _on_box(layer: Tensor, masks: Tensor) -> float:
    return round(float(_mass(layer, masks).mean()), 4)


def _smallest_boxes(owners: np.ndarray, areas: np.ndarray) -> list[int]:
    order = np.lexsort((areas, owners))
    return [int(order[start]) for start in np.flatnonzero(np.r_[True, owners[1:] != owners[:-1]])]


class AttentionRecord:
    """Records what each cross-attention does while it is open: attention [rows, H, Q, N] by layer, in order of calls,
    and the queries before scaling. A context manager."""

    def __init__(self, model: Blip2Retrieval) -> None:
        self.layers: list[AttentionModule] = list(model.Qformer.cross_attentions)
        self.attention: list[list[Tensor]] = [[] for _ in self.layers]

    def __enter__(self) -> AttentionRecord:
        self._kernels = [layer.kernel for layer in self.layers]
        for layer, found in zip(self.layers, self.attention, strict=True):
            layer.kernel = _recording(layer.kernel, found)
        return self

    def __exit__(self, *_: object) -> None:
        for layer, kernel in zip(self.layers, self._kernels, strict=True):
            layer.kernel = kernel


def _recording(kernel: AttentionKernel, found: list[Tensor]) -> AttentionKernel:
    def recorded(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
        found.append((queries.float() @ keys.float().mT / keys.shape[-1] ** 0.5).softmax(-1))
        return kernel(queries, keys, values, mask)

    return recorded
