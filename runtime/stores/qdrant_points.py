"""What Qdrant keeps of an image: a point with a multivector and a payload. The server and the edge shard share it.

The point of id 0 has no vector and holds what the store was made with; no search finds it, and filters leave it out.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qpert.runtime.filters.qdrant import Filter, qdrant_filter
from qpert.runtime.filters.tree import Condition
from qpert.runtime.stores.protocol import StoredImage

VECTOR = "queries"
SPEC_ID = 0
SPEC_KEY = "qpert"
POINTS_AT_ONCE = 100
NUMBERS_AT_ONCE = 400_000
"""Of vectors in one request: 9 MB of JSON, where a server takes 32 by default."""


def payload_of(image: StoredImage) -> dict[str, Any]:
    return image.facts()


def image_of(payload: dict[str, Any], vector: Any = None) -> StoredImage:
    """`vector`: what an engine returns, by name; None or empty where it was not asked for."""
    rows = vector.get(VECTOR) if isinstance(vector, dict) else None
    return StoredImage.of(payload, None if rows is None else np.array(rows, np.float32))


def images_filter(where: Condition | None) -> Filter:
    """The points that are images, of which `where` is true."""
    return {"must": [] if where is None else [qdrant_filter(where)], "must_not": [{"has_id": [SPEC_ID]}]}


def portions(images: list[StoredImage]) -> list[list[StoredImage]]:
    """In order, few enough numbers for a request each."""
    found: list[list[StoredImage]] = []
    room = 0
    for image in images:
        size = 0 if image.vectors is None else image.vectors.size
        if not found or size > room:
            found.append([])
            room = NUMBERS_AT_ONCE
        found[-1].append(image)
        room -= size
    return found
