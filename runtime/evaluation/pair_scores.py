"""ITC of all pairs, ITM of the shortlists, and the resulting order in both directions.

A shortlist comes first, by ITM + ITC; the rest follows by ITC alone, as in `Retriever.search`. LAVIS gives all of the
rest the score −100, so this order refines its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from qpert.runtime.evaluation.metrics import RetrievalMetrics, metrics_of_ranks
from qpert.runtime.evaluation.schedule import Schedule
from qpert.runtime.retrieval.scores import final_scores, ranking

Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class PairScores:
    """Scores of B images and T texts. itc: float32 [B, T]; itm: float32 [P], in the order of `schedule.keys`."""

    itc: Floats = field(repr=False)
    schedule: Schedule
    itm: Floats = field(repr=False)

    @property
    def t2i_scores(self) -> Floats:
        """float32 [T, K]: ITM + ITC of each text's shortlist, `schedule.by_text`."""
        texts = np.arange(self.schedule.texts)[:, None]
        return self._final(self.schedule.by_text, texts)

    @property
    def i2t_scores(self) -> Floats:
        """float32 [B, K]: ITM + ITC of each image's shortlist, `schedule.by_image`."""
        images = np.arange(self.schedule.images)[:, None]
        return self._final(images, self.schedule.by_image)

    def images_for(self, text: int) -> Indices:
        """All images, best first, int64 [B]."""
        return _order(self.itc[:, text], self.schedule.by_text[text], self.t2i_scores_of(text))

    def texts_for(self, image: int) -> Indices:
        """All texts, best first, int64 [T]."""
        return _order(self.itc[image], self.schedule.by_image[image], self.i2t_scores_of(image))

    def t2i_scores_of(self, text: int) -> Floats:
        """float32 [K]: one row of `t2i_scores`."""
        return self._final(self.schedule.by_text[text], np.array(text))

    def i2t_scores_of(self, image: int) -> Floats:
        """float32 [K]: one row of `i2t_scores`."""
        return self._final(np.array(image), self.schedule.by_image[image])

    def t2i_ranks(self, image_of_text: Indices) -> Indices:
        """int64 [T]: the rank, from 0, of each text's image."""
        ranks = np.empty(self.schedule.texts, np.int64)
        for text, image in enumerate(image_of_text):
            ranks[text] = np.flatnonzero(self.images_for(text) == image)[0]
        return ranks

    def i2t_ranks(self, image_of_text: Indices) -> Indices:
        """int64 [B]: the rank, from 0, of each image's first own text.

        Raises ValueError for an image that has no text.
        """
        ranks = np.empty(self.schedule.images, np.int64)
        for image in range(self.schedule.images):
            found = np.flatnonzero(image_of_text[self.texts_for(image)] == image)
            if not len(found):
                raise ValueError(f"image {image} has no text; expected at least one for each image")
            ranks[image] = found[0]
        return ranks

    def metrics(self, image_of_text: Indices, largest_areas: npt.NDArray[np.float64]) -> RetrievalMetrics:
        """R@K and mR@K of both directions; arguments as in `qpert.runtime.evaluation.metrics.retrieval_metrics`."""
        return metrics_of_ranks(
            self.t2i_ranks(image_of_text),
            self.i2t_ranks(image_of_text),
            image_of_text=image_of_text,
            largest_areas=largest_areas,
        )

    def itc_alone(self) -> PairScores:
        """The same without re-ranking."""
        return PairScores(self.itc, Schedule.plan(self.itc, 0), np.zeros(0, np.float32))

    def _final(self, images: Indices, texts: Indices) -> Floats:
        return final_scores(self.itm[self.schedule.places(images, texts)], self.itc[images, texts])


def _order(itc: Floats, shortlist: Indices, final: Floats) -> Indices:
    """The shortlist by its final scores (of equal ones the lower index first), then the rest by ITC."""
    ascending = np.argsort(shortlist, kind="stable")
    best = shortlist[ascending][ranking(final[ascending])]
    rest = ranking(itc)[len(shortlist) :]
    return np.concatenate([best, rest])
