"""Which image-text pairs an evaluation has to match: the ITC shortlists of both directions, and their union by image.

Source: LAVIS `compute_sim_matrix` (`lavis/models/blip2_models/blip2_qformer.py`): for every image its `k_test` best
texts and for every text its `k_test` best images are re-ranked. LAVIS computes a pair that is on both lists twice and
repeats the image's features for each; here every pair occurs once, grouped by image.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from qpert.runtime.retrieval.scores import ranking

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Schedule:
    """Shortlists over B images and T texts, and the P pairs that they need.

    by_text: int64 [T, min(k, B)], each text's best images, best first. by_image: int64 [B, min(k, T)], each image's
    best texts, best first. keys: int64 [P], ascending and unique: image · T + text of every pair on either list.
    """

    images: int
    texts: int
    by_text: Indices = field(repr=False)
    by_image: Indices = field(repr=False)
    keys: Indices = field(repr=False)

    @classmethod
    def plan(cls, itc: npt.NDArray[np.float32], rerank: int) -> Schedule:
        """The shortlists of the `rerank` best by ITC [B, T], or of all if there are fewer. 0 disables ITM."""
        images, texts = itc.shape
        by_text = np.empty((texts, min(rerank, images)), np.int64)
        for text in range(texts):
            by_text[text] = ranking(itc[:, text])[:rerank]
        by_image = np.empty((images, min(rerank, texts)), np.int64)
        for image in range(images):
            by_image[image] = ranking(itc[image])[:rerank]
        wanted = (by_text * texts + np.arange(texts)[:, None], by_image + texts * np.arange(images)[:, None])
        return cls(images, texts, by_text, by_image, np.unique(np.concatenate([keys.ravel() for keys in wanted])))

    def __len__(self) -> int:
        return len(self.keys)

    def pairs_of(self, image: int) -> slice:
        """The positions in `keys` of an image's pairs."""
        start, end = np.searchsorted(self.keys, [image * self.texts, (image + 1) * self.texts]).tolist()
        return slice(start, end)

    def texts_of(self, image: int) -> Indices:
        """The texts to match an image with, ascending."""
        return self.keys[self.pairs_of(image)] - image * self.texts

    def places(self, images: Indices, texts: Indices) -> Indices:
        """The positions in `keys` of pairs that are on a list."""
        return np.searchsorted(self.keys, images * self.texts + texts)
