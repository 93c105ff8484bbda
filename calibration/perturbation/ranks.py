"""What a search stores for one setting: its ranks by ITC, and its shortlists with their ITC scores.

ITM does not depend on the setting (only ITC is perturbed), so once the pairs on any setting's shortlists are matched,
the final ranks of every setting follow from this. Ranks count from 0; ties go to the lower index, as everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from qpert.runtime.evaluation.metrics import image_to_text_ranks, text_to_image_ranks
from qpert.runtime.evaluation.schedule import Schedule
from qpert.runtime.retrieval.scores import final_scores

Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class SettingRanks:
    """B images and T texts under one setting.

    t2i int64 [T], i2t int64 [B]: ranks by ITC. by_text int64 [T, K], by_image int64 [B, L]: the shortlists, with their
    ITC scores float32 of the same shapes.
    """

    t2i: Indices = field(repr=False)
    i2t: Indices = field(repr=False)
    by_text: Indices = field(repr=False)
    by_image: Indices = field(repr=False)
    itc_by_text: Floats = field(repr=False)
    itc_by_image: Floats = field(repr=False)

    @classmethod
    def of(cls, itc: Floats, image_of_text: Indices, rerank: int) -> SettingRanks:
        """From the scores of all pairs, float32 [B, T]."""
        images, texts = itc.shape
        schedule = Schedule.plan(itc, rerank)
        return cls(
            text_to_image_ranks(itc, image_of_text),
            image_to_text_ranks(itc, image_of_text),
            schedule.by_text,
            schedule.by_image,
            itc[schedule.by_text, np.arange(texts)[:, None]],
            itc[np.arange(images)[:, None], schedule.by_image],
        )

    def keys(self) -> Indices:
        """The pairs on the shortlists as image · T + text, ascending and unique."""
        images, texts = len(self.i2t), len(self.t2i)
        by_text = self.by_text * texts + np.arange(texts)[:, None]
        by_image = self.by_image + texts * np.arange(images)[:, None]
        return np.unique(np.concatenate([by_text.ravel(), by_image.ravel()]))

    def final(self, image_of_text: Indices, matched: Schedule, itm: Floats) -> tuple[Indices, Indices]:
        """Ranks by ITM + ITC, text to image [T] and image to text [B].

        A shortlist comes first, by its final scores; the rest follows by ITC, so candidates outside it keep their rank.

        Args:
            image_of_text: int64 [T].
            matched, itm: every pair of `keys()` at least, and their ITM scores.
        """
        if not self.by_text.shape[1]:
            return self.t2i, self.i2t
        images, texts = np.arange(len(self.i2t))[:, None], np.arange(len(self.t2i))[:, None]
        t2i = final_scores(itm[matched.places(self.by_text, texts)], self.itc_by_text)
        i2t = final_scores(itm[matched.places(images, self.by_image)], self.itc_by_image)
        own_images = self.by_text == image_of_text[:, None]  # [T, K]
        own_texts = image_of_text[self.by_image] == images  # [B, L]
        return _best(t2i, self.by_text, own_images, self.t2i), _best(i2t, self.by_image, own_texts, self.i2t)

    def pack(self) -> Floats:
        """All arrays as one flat float32 array; indices below 2²⁴ are exact."""
        return np.concatenate([np.ravel(array).astype(np.float32) for array in self._arrays()])

    @classmethod
    def unpack(cls, values: Floats, images: int, texts: int, rerank: int) -> SettingRanks | None:
        """The inverse of `pack`; None if the length does not match these sizes."""
        by_text, by_image = (texts, min(rerank, images)), (images, min(rerank, texts))
        shapes = [(texts,), (images,), by_text, by_image, by_text, by_image]
        ends = np.cumsum([int(np.prod(shape)) for shape in shapes])
        if len(values) != ends[-1]:
            return None
        parts = [part.reshape(shape) for part, shape in zip(np.split(values, ends[:-1]), shapes, strict=True)]
        t2i, i2t, listed_images, listed_texts = (part.astype(np.int64) for part in parts[:4])
        return cls(t2i, i2t, listed_images, listed_texts, *parts[4:])

    def _arrays(self) -> tuple[npt.NDArray[np.generic], ...]:
        return (self.t2i, self.i2t, self.by_text, self.by_image, self.itc_by_text, self.itc_by_image)


def _best(scores: Floats, candidates: Indices, own: npt.NDArray[np.bool_], otherwise: Indices) -> Indices:
    """For each row, the rank of its best own candidate among the candidates; `otherwise` if none is its own."""
    order = np.lexsort((candidates, -scores), axis=1)
    found = np.take_along_axis(own, order, axis=1)
    return np.where(found.any(axis=1), found.argmax(axis=1), otherwise)
