"""Scores of a generated split by the PyTorch model: ITC, ITC with perturbed queries, and ITM of the candidates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from data import tokenizer
from safetensors.torch import load_file
from torch import Tensor

from qpert.graphs.families.blip2.config import CONFIGS
from qpert.graphs.families.blip2.model import Blip2Retrieval, unit_length
from qpert.graphs.families.blip2.qformer import ImageContext
from qpert.graphs.perturbation.oracle import key_subspaces
from qpert.runtime.evaluation.metrics import RetrievalMetrics, largest_area, retrieval_metrics
from qpert.runtime.inputs.boxes import Boxes
from qpert.runtime.inputs.datasets import RetrievalDataset
from qpert.runtime.inputs.images import image_size, preprocess_images
from qpert.runtime.inputs.perturbation import Perturbation, box_weights, object_masks
from qpert.runtime.inputs.preprocessing import ImagePreprocessing
from qpert.runtime.inputs.token_grid import TokenGrid
from qpert.runtime.progress import Progress

Floats = npt.NDArray[np.floating]
LATER = 1e4
"""Taken from the ITC score of what is no candidate: it comes after all candidates, in the order of ITC."""


def open_model(path: Path) -> Blip2Retrieval:
    """The shipped checkpoint in float32."""
    model = Blip2Retrieval(CONFIGS["demo"])
    model.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
    return model.eval().requires_grad_(requires_grad=False)


def token_grid() -> TokenGrid:
    """The demonstration's patches: CLS comes before them."""
    vision = CONFIGS["demo"].vision
    return TokenGrid(vision.grid, vision.grid, vision.patch_size, 1, ImagePreprocessing(vision.image_size))


@dataclass(frozen=True, eq=False)
class EncodedSplit:
    """B images and T texts of a split. image_embeds [B, N, C]; text_embeds [T, E]; ids, mask int64 [T, L]."""

    dataset: RetrievalDataset
    boxes: tuple[Boxes, ...]
    image_embeds: Tensor
    text_embeds: Tensor
    ids: Tensor
    mask: Tensor

    @property
    def areas(self) -> npt.NDArray[np.float64]:
        return np.array([largest_area(boxes) for boxes in self.boxes], np.float64)

    def metrics(self, t2i: Floats, i2t: Floats) -> RetrievalMetrics:
        owners = self.dataset.image_of_caption
        return retrieval_metrics(t2i, i2t, image_of_text=owners, largest_areas=self.areas)


def encode_split(model: Blip2Retrieval, dataset: RetrievalDataset) -> EncodedSplit:
    """Everything that does not depend on the perturbation."""
    preprocessing = token_grid().image
    files = dataset.images
    boxes = [dataset.boxes_of(index, image_size(file)) for index, file in enumerate(files)]
    parts = [files[start : start + 100] for start in range(0, len(files), 100)]
    images = torch.cat([model.encode_image(torch.from_numpy(preprocess_images(part, preprocessing))) for part in parts])
    tokens = tokenizer().encode(dataset.captions)
    ids, mask = torch.from_numpy(tokens.input_ids), torch.from_numpy(tokens.attention_mask)
    texts = torch.cat([model.encode_text(*part) for part in zip(ids.split(500), mask.split(500), strict=True)])
    return EncodedSplit(dataset, tuple(boxes), images, texts, ids, mask)


def itc(query_embeds: Tensor, text_embeds: Tensor) -> Floats:
    """float32 [B, T]: the best query of each image for each text."""
    parts = [(part @ text_embeds.T).amax(1) for part in query_embeds.split(50)]
    return torch.cat(parts).numpy()


class Perturber:
    """Query embeddings of a split under many settings: the subspaces of a threshold are computed once."""

    def __init__(self, model: Blip2Retrieval, split: EncodedSplit, *, threshold: float) -> None:
        self.model, self.split = model, split
        masks = torch.from_numpy(object_masks(split.boxes, grid=token_grid(), coverage="exact"))  # [B, O, N]
        self.keys, self.values = model.Qformer.keys_and_values(split.image_embeds)
        stacked = torch.stack(self.keys, dim=1)
        _, layers, heads, _, size = stacked.shape
        self.projectors = torch.zeros(*masks.shape[:2], layers, heads, size, size)
        counts = torch.tensor([len(boxes) for boxes in split.boxes])
        for part in counts.argsort().split(50):  # alike in number of boxes, so that little padding is decomposed
            most = int(counts[part].max())
            found = key_subspaces(stacked[part], masks[part, :most], threshold=threshold)
            self.projectors[part, :most] = found.projectors.float()

    def query_embeds(self, setting: Perturbation) -> Tensor:
        """float32 [B, Q, E], of unit length."""
        weights = torch.from_numpy(box_weights(self.split.boxes, setting))  # [B, O]
        rows = []
        for start in range(0, len(weights), 50):
            part = slice(start, start + 50)
            added = torch.einsum("bo,boahij->bahij", weights[part], self.projectors[part])
            keys, values = ([layer[part] for layer in layers] for layers in (self.keys, self.values))
            context = ImageContext(keys, values, added + torch.eye(added.shape[-1]))
            rows.append(self.model.Qformer.encode_queries(self.model.query_tokens, context))
        return unit_length(self.model.vision_proj(torch.cat(rows)))


class Matcher:
    """ITM logits of a split's pairs, each computed once, image by image; `bf16`: under bfloat16 autocast."""

    def __init__(self, model: Blip2Retrieval, split: EncodedSplit, progress: Progress, *, bf16: bool = False) -> None:
        self.model, self.split, self.progress, self.bf16 = model, split, progress, bf16
        self.scores = np.full((len(split.dataset), len(split.ids)), np.nan, np.float32)
        self.lengths = split.mask.sum(1).numpy()

    def final(self, itc_scores: Floats, k: int) -> tuple[Floats, Floats]:
        """ITM + ITC of the top k in each direction, [B, T] for text to image and for image to text."""
        by_text, by_image = (_candidates(itc_scores, k, axis) for axis in (0, 1))
        self._fill((by_text | by_image) & np.isnan(self.scores))
        wide = itc_scores.astype(np.float64)
        t2i, i2t = (np.where(chosen, wide + self.scores, wide - LATER) for chosen in (by_text, by_image))
        return t2i, i2t

    def _fill(self, wanted: npt.NDArray[np.bool_]) -> None:
        with self.progress.stage(f"matching {int(wanted.sum()):,} pairs", len(wanted)) as advance:
            for image in range(len(wanted)):
                texts = np.flatnonzero(wanted[image])
                for part in _chunks(texts[np.argsort(self.lengths[texts], kind="stable")], 256):
                    length = int(self.lengths[part].max())
                    ids, mask = self.split.ids[part, :length][None], self.split.mask[part, :length][None]
                    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.bf16):
                        scores = self.model.match(self.split.image_embeds[image : image + 1], ids, mask)
                    self.scores[image, part] = scores[0].numpy()
                advance(1)


def _candidates(scores: Floats, k: int, axis: int) -> npt.NDArray[np.bool_]:
    """True where a pair is in the top k along `axis`."""
    order = np.argsort(-scores, axis=axis, kind="stable").take(range(min(k, scores.shape[axis])), axis)
    chosen = np.zeros(scores.shape, np.bool_)
    np.put_along_axis(chosen, order, values=True, axis=axis)
    return chosen


def _chunks(rows: npt.NDArray[np.int64], size: int) -> Iterator[npt.NDArray[np.int64]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def settings_grid(
    weights: dict[str, tuple[float, float]], alphas: Sequence[float]
) -> Iterator[tuple[str, Perturbation]]:
    """The paper's grid of weight functions and α, under both reductions; the threshold is set by the caller."""
    for reduction in ("sum", "mean"):
        for name, (beta, gamma) in weights.items():
            for alpha in alphas:
                base = Perturbation(alpha=alpha, beta=beta, gamma=gamma)
                yield name, replace(base, reduction="sum" if reduction == "sum" else "mean")
