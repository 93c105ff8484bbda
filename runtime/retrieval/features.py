"""What the image branch gives for a batch of images."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt

from qpert.runtime.retrieval.query_sets import QuerySets
from qpert.runtime.sessions.device import DeviceArray, on_host
from qpert.runtime.sessions.protocol import Array

Floats = npt.NDArray[np.floating]


class ImageFeatures:
    """What is kept of B images.

    query_embeds: float32 [B, Q, E], unit length, for ITC; with reduction `each` [B, S·Q, E], S the largest number of
    query sets of an image (`QuerySets.padded`). query_sets: the same without padding, and which box each set is of.
    image_embeds: [B, N, C] in the bundle's feature dtype, for ITM. object_masks float32 [B, O, N] and box_weights
    float32 [B, O] only where ITM is perturbed too.

    On a GPU, features of one call of the graphs stay in its memory: ITM takes them from there (`for_matching`), and
    they are copied to the host when `image_embeds` is first read.
    """

    def __init__(
        self,
        query_embeds: Floats | QuerySets,
        image_embeds: Floats | DeviceArray,
        object_masks: Floats | None = None,
        box_weights: Floats | None = None,
    ) -> None:
        self.query_sets = query_embeds if isinstance(query_embeds, QuerySets) else QuerySets.single(query_embeds)
        self.for_matching: Array = image_embeds
        self.object_masks = object_masks
        self.box_weights = box_weights

    @property
    def query_embeds(self) -> Floats:
        return self.query_sets.padded

    @cached_property
    def image_embeds(self) -> Floats:
        return on_host(self.for_matching)

    def __len__(self) -> int:
        return len(self.query_sets)

    def rows(self, index: slice | Sequence[int] | npt.NDArray[np.int64]) -> ImageFeatures:
        """The features of some of the images, in that order. A slice of neighbours stays where it is."""

        def pick(array: Floats | None) -> Floats | None:
            return None if array is None else array[index]

        return ImageFeatures(
            self.query_sets.of(index), self._embeds_of(index), pick(self.object_masks), pick(self.box_weights)
        )

    def _embeds_of(self, index: slice | Sequence[int] | npt.NDArray[np.int64]) -> Floats | DeviceArray:
        if isinstance(self.for_matching, DeviceArray) and isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step == 1:
                return self.for_matching.rows(start, max(start, stop))
        return self.image_embeds[index]


def concatenated(parts: Sequence[ImageFeatures]) -> ImageFeatures:
    """Features of several chunks as one; masks are padded to the largest number of boxes."""
    if len(parts) == 1:
        return parts[0]
    most = max((part.box_weights.shape[1] for part in parts if part.box_weights is not None), default=0)

    def padded(array: Floats | None) -> Floats | None:
        if array is None:
            return None
        missing = [(0, most - length if axis == 1 else 0) for axis, length in enumerate(array.shape)]
        return np.pad(array, missing)

    def joined(arrays: list[Floats | None]) -> Floats | None:
        present = [array for array in arrays if array is not None]
        return np.concatenate(present) if present else None

    return ImageFeatures(
        QuerySets.joined([part.query_sets for part in parts]),
        np.concatenate([part.image_embeds for part in parts]),
        joined([padded(part.object_masks) for part in parts]),
        joined([padded(part.box_weights) for part in parts]),
    )
