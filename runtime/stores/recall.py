"""How much of an exact search an engine finds: a figure to look at, not a promise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from qpert.runtime.gallery.reader import StoredGallery
from qpert.runtime.stores.protocol import Floats, VectorStore, id_of

DEPTHS = (10, 64)


@dataclass(frozen=True)
class Recall:
    """Of the best 10 and 64 images by exact search in float32, the share that the engine returned among its own; None
    where there are fewer images. `against`: the vectors of the exact search, which are the gallery's that was copied,
    or those that the engine has stored (then rounding by the engine does not count)."""

    queries: int
    r10: float | None
    r64: float | None
    against: Literal["gallery", "stored"]


def measure_recall(store: VectorStore, queries: Floats, gallery: StoredGallery | None = None) -> Recall:
    """Search with each of N `queries` [N, E], and compare with the exact scores of all images, which are read once.

    An image counts as found where the engine returned one that is as good: of equal images, either may come first.
    """
    exact = stored_scores(store, queries) if gallery is None else gallery_scores(gallery, queries)
    shares: dict[int, list[float]] = {depth: [] for depth in DEPTHS}
    for number, query in enumerate(queries):
        found = store.search(query, max(DEPTHS))
        scores = np.array([exact[one.image.id][number] for one in found if one.image.id in exact])
        ranked = np.sort([own[number] for own in exact.values()])[::-1]
        for depth, values in shares.items():
            if len(ranked) >= depth:
                values.append(float((scores[:depth] >= ranked[depth - 1]).sum()) / depth)
    r10, r64 = (float(np.mean(values)) if values else None for values in shares.values())
    return Recall(len(queries), r10, r64, "stored" if gallery is None else "gallery")


def stored_scores(store: VectorStore, queries: Floats) -> dict[int, Floats]:
    """By id, float32 [N]."""
    return {one.id: (one.embeddings @ queries.T).max(axis=0) for one in store.scan(vectors=True)}


def gallery_scores(gallery: StoredGallery, queries: Floats) -> dict[int, Floats]:
    scores = gallery.itc_scores(queries)
    return {id_of(name): scores[row] for row, name in enumerate(gallery.images)}


def sample_queries(store: VectorStore, count: int, gallery: StoredGallery | None = None) -> Floats:
    """Vectors to search with: of captions, where the gallery has some, or else one vector each of some images."""
    if gallery is not None and len(gallery.texts):
        return gallery.text_embeds[np.linspace(0, len(gallery.texts) - 1, min(count, len(gallery.texts))).astype(int)]
    ids = []
    for one in store.scan():  # in the order of hashes: as good as drawn
        ids.append(one.id)
        if len(ids) == count:
            break
    return np.array([one.embeddings[0] for one in store.get(ids, vectors=True).values()], np.float32)
