"""The query sets of images: one each, or with reduction `each` one for every box.

The paper perturbs one set of Q queries by all boxes of an image together. With reduction `each` (ours, beyond the
paper) every box perturbs a set of its own, and an image's ITC score is the maximum over the queries of all its sets: a
box can then add a match, and cannot spoil another box's. Images have different numbers of boxes, so the sets of a batch
are kept side by side, with a count for each image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from qpert.runtime.inputs.boxes import Boxes
from qpert.runtime.inputs.perturbation import Perturbation
from qpert.runtime.retrieval.scores import BLOCK, itc_scores

Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]

NO_BOX = -1
"""In place of a box's number: the set is stock, or perturbed by all boxes together."""


@dataclass(frozen=True, eq=False)
class QuerySets:
    """The query sets of B images, R in all, those of an image side by side and in the order of its boxes.

    vectors: float32 [R, Q, E], unit length. counts: int64 [B], how many sets each image has, at least 1. boxes:
    int64 [R], the number of the box that perturbs the set, or NO_BOX; None where no set has a box of its own.
    """

    vectors: Floats
    counts: Indices
    boxes: Indices | None = None

    @classmethod
    def single(cls, vectors: Floats) -> QuerySets:
        """One set for each image: [B, Q, E]."""
        return cls(vectors, np.ones(len(vectors), np.int64))

    @classmethod
    def joined(cls, parts: Sequence[QuerySets]) -> QuerySets:
        """Those of the images of all parts, in order."""
        boxes = None
        if any(part.boxes is not None for part in parts):
            boxes = np.concatenate([part.box_numbers for part in parts])
        vectors, counts = [part.vectors for part in parts], [part.counts for part in parts]
        return cls(np.concatenate(vectors), np.concatenate(counts), boxes)

    @property
    def box_numbers(self) -> Indices:
        """int64 [R]: `boxes`, or NO_BOX for each."""
        return np.full(len(self.vectors), NO_BOX, np.int64) if self.boxes is None else self.boxes

    def __len__(self) -> int:
        """The number of images."""
        return len(self.counts)

    @property
    def is_single(self) -> bool:
        """Whether each image has exactly one set."""
        return len(self.vectors) == len(self.counts)

    @cached_property
    def starts(self) -> Indices:
        """int64 [B]: where each image's sets begin."""
        return starts_of(self.counts)

    def of(self, images: slice | Sequence[int] | Indices) -> QuerySets:
        """The sets of some images, in that order."""
        counts = self.counts[images]
        rows = images if self.is_single else set_rows(self.starts[images], counts)
        return QuerySets(self.vectors[rows], counts, None if self.boxes is None else self.boxes[rows])

    @cached_property
    def padded(self) -> Floats:
        """float32 [B, S·Q, E], S the largest number of sets of an image; images with fewer repeat their last set, which
        leaves every maximum over queries as it is."""
        if self.is_single:
            return self.vectors
        most = int(self.counts.max(initial=1))
        places = np.minimum(np.arange(most), self.counts[:, None] - 1)  # [B, S]
        found = self.vectors[self.starts[:, None] + places]  # [B, S, Q, E]
        return found.reshape(len(self), -1, self.vectors.shape[-1])

    def itc_scores(self, text_embeds: Floats) -> Floats:
        """float32 [B, T]: for each image the best of all queries of all its sets with each text."""
        if self.is_single:
            return itc_scores(self.vectors, text_embeds)
        scores = np.empty((len(self), len(text_embeds)), np.float32)
        step = max(1, BLOCK // max(1, len(text_embeds) * int(self.counts.max(initial=1))))
        for start in range(0, len(self), step):
            part = self.of(slice(start, start + step))
            scores[start : start + step] = best_of_sets(itc_scores(part.vectors, text_embeds), part.starts)
        return scores

    def matched_box(self, image: int, text_embed: Floats) -> int | None:
        """The number of the box whose set holds the image's best query for a text [E]; None where that set has none.

        Of equal sets the first counts, so that a box without influence is not named before the stock queries.
        """
        one = self.of([image])
        box = int(one.box_numbers[int(itc_scores(one.vectors, text_embed[None])[:, 0].argmax())])
        return None if box == NO_BOX else box


def inputs_of_sets(masks: Floats, weights: Floats, counts: Indices, set_boxes: Indices) -> tuple[Floats, Floats]:
    """`object_masks` [B, O, N] and `box_weights` [B, O] of images → [R, 1, N] and [R, 1] of their sets, each with its
    own box alone; zero for a set without one. `counts` [B] and `set_boxes` [R] as in `QuerySets`."""
    image, stock = np.repeat(np.arange(len(counts)), counts), set_boxes == NO_BOX
    set_masks, set_weights = masks[image, set_boxes][:, None], weights[image, set_boxes][:, None]
    set_masks[stock], set_weights[stock] = 0, 0
    return set_masks, set_weights


def starts_of(counts: Indices) -> Indices:
    """int64 [B]: where the sets of each image begin, given how many each has."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])[:-1]


def set_rows(starts: Indices, counts: Indices) -> Indices:
    """The numbers of the sets of some images, one image after the other: `starts` and `counts` int64 [B] → [R]."""
    within = np.arange(int(counts.sum())) - np.repeat(starts_of(counts), counts)
    return np.asarray(np.repeat(starts, counts) + within, np.int64)


def best_of_sets(scores: Floats, starts: Indices) -> Floats:
    """Scores of sets [R, …] → of images [B, …]: the maximum over an image's sets, which begin at `starts`."""
    return np.asarray(np.maximum.reduceat(scores, starts, axis=0)) if len(starts) else scores[:0]


def image_sets(boxes: int, perturbation: Perturbation) -> Indices:
    """int64 [sets]: the box of each query set of an image with this number of boxes, under these settings.

    With reduction `each` a set for every box, in order; with `keep_stock` the stock set (NO_BOX) before them. Without
    boxes, and with every other reduction, one set.
    """
    if not boxes or not perturbation.splits_boxes:
        return np.full(1, NO_BOX, np.int64)
    return np.arange(NO_BOX if perturbation.keep_stock else 0, boxes, dtype=np.int64)


def sets_of_images(boxes: Sequence[Boxes | None], perturbation: Perturbation) -> tuple[Indices, Indices]:
    """`counts` [B] and `boxes` [R] of the `QuerySets` of B images."""
    sets = [image_sets(0 if one is None else len(one), perturbation) for one in boxes]
    return np.array([len(one) for one in sets], np.int64), np.concatenate([*sets, np.empty(0, np.int64)])
