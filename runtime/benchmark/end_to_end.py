"""Both directions as in an application: picture files to embeddings, and a text to the best ten of a gallery."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qpert.runtime.inputs.boxes import Boxes
from qpert.runtime.retrieval.encoder import Encoder
from qpert.runtime.retrieval.features import ImageFeatures
from qpert.runtime.retriever import Gallery, Retriever

PICTURE = (640, 480)
"""Width and height of the picture file: those of most COCO images."""
GALLERY = 256
FOUND = 10
TEXT = "a small red box on a table"


@dataclass(frozen=True)
class EndToEnd:
    """A picture file and a gallery in memory. The gallery holds `GALLERY` copies of one image's features: the cost
    of a search does not depend on its results."""

    picture: Path
    gallery: Gallery

    @classmethod
    @contextmanager
    def open(cls, encoder: Encoder) -> Iterator[EndToEnd]:
        """Draw the picture into a folder that is deleted at the end, and encode it once."""
        with tempfile.TemporaryDirectory() as folder:
            picture = Path(folder) / "picture.jpg"
            draw(picture)
            one = encoder.encode_images([picture])
            names = tuple(f"{number}.jpg" for number in range(GALLERY))
            yield cls(picture, Gallery(names, one.rows(np.zeros(GALLERY, np.int64))))

    def features(self) -> np.ndarray:
        """image_embeds [1, N, C] of the picture."""
        return self.gallery.features.image_embeds[:1]

    def call(self, encoder: Encoder, stage: str, batch: int, boxes: int) -> Callable[[], object]:
        """One call of `encode` (batch pictures, each with `boxes` boxes) or of `search`."""
        if stage == "search":
            retriever = Retriever(encoder)
            return lambda: retriever.search(TEXT, self.gallery, k=FOUND)
        given = [draw_boxes(boxes)] * batch
        pictures = [self.picture] * batch
        return lambda: encode(encoder, pictures, given)


def encode(encoder: Encoder, pictures: list[Path], boxes: list[Boxes | None]) -> ImageFeatures:
    return encoder.encode_images(pictures, boxes)


def draw(path: Path) -> None:
    """A JPEG of soft colours with grain, which compresses like a photograph."""
    from PIL import Image

    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize(PICTURE, Image.Resampling.BICUBIC), np.float64)
    grainy = np.clip(smooth + rng.normal(0, 6, smooth.shape), 0, 255).astype(np.uint8)
    Image.fromarray(grainy).save(path, quality=90)


def draw_boxes(count: int) -> Boxes | None:
    if not count:
        return None
    rng = np.random.default_rng(count)
    width, height = PICTURE
    corners = rng.uniform(0, 0.7, (count, 2)) * PICTURE
    sizes = rng.uniform(0.05, 0.3, (count, 2)) * PICTURE
    return Boxes(np.concatenate([corners, corners + sizes], axis=1), (width, height))
