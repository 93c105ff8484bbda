"""A store as a gallery that `Retriever.search` takes: ITC by the engine, re-ranking with features from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from qpert.runtime.errors import GalleryError
from qpert.runtime.filters.tree import Condition
from qpert.runtime.gallery.box_json import boxes_from_json
from qpert.runtime.gallery.files import check_unchanged
from qpert.runtime.gallery.hits import MatchedBox
from qpert.runtime.gallery.reader import Rows, StoredGallery
from qpert.runtime.gallery.scan import Nearest
from qpert.runtime.inputs.boxes import Boxes
from qpert.runtime.inputs.perturbation import Perturbation
from qpert.runtime.retrieval.encoder import Encoder
from qpert.runtime.retrieval.features import ImageFeatures
from qpert.runtime.retrieval.query_sets import QuerySets, sets_of_images
from qpert.runtime.stores.opening import made_spec
from qpert.runtime.stores.protocol import Floats, StoredImage, VectorStore, id_of

KEPT = 10_000
"""Images of the last searches whose facts are held: a few hundred bytes each."""


class Names:
    """The names of images by row, which is their id."""

    def __init__(self, gallery: StoreGallery) -> None:
        self.gallery = gallery

    def __getitem__(self, row: int) -> str:
        return self.gallery.image(row).name


class StoreGallery:
    """Use `open`. Rows are ids of the store's images. Several threads may search.

    Scores are those of the engine: of float32 vectors in PostgreSQL, of float16 ones in Qdrant.
    """

    def __init__(self, store: VectorStore, encoder: Encoder, features: StoredGallery | None = None) -> None:
        self.store, self.encoder, self.features = store, encoder, features
        self.made = made_spec(store).gallery
        self._perturbation = Perturbation.from_dict(self.made.perturbation)
        self._seen: dict[int, StoredImage] = {}

    @classmethod
    def open(cls, store: VectorStore, encoder: Encoder, features: str | Path | None = None) -> StoreGallery:
        """`features`: the gallery with the images' features; None is the one that the store was made with, where there
        was one, or else images are encoded again from their files.

        Raises:
            GalleryError: the store, or the gallery of features, was not made, or with another bundle or settings.
        """
        spec = made_spec(store)
        spec.gallery.require(encoder, store.name)
        folder = features or spec.features_in
        stored = None if folder is None or not encoder.reranks else StoredGallery.open(folder, encoder)
        return cls(store, encoder, stored)

    @property
    def images(self) -> Names:
        return Names(self)

    @property
    def title(self) -> str:
        """What reports call it."""
        return self.store.name

    @property
    def has_boxes(self) -> bool:
        """Whether images may have boxes: a store is not read through for that."""
        return self.encoder.manifest.query_head.takes_boxes

    def picture_of(self, name: str) -> tuple[Path, Boxes | None]:
        """An image's file and boxes, by its name."""
        image = self.image(id_of(name))
        return Path(image.path), boxes_of(image)

    def __len__(self) -> int:
        return self.store.count()

    def nearest(
        self, text_embeds: Floats, count: int, *, exact: bool = False, where: Condition | None = None
    ) -> Nearest:
        """Always exact; `exact` changes nothing."""
        found = [self.store.search(text, count, where) for text in text_embeds]
        if len(self._seen) > KEPT:
            self._seen = {}
        self._seen |= {one.image.id: one.image for ones in found for one in ones}
        most = min(map(len, found), default=0)  # alike, but for images that come or go meanwhile
        rows = np.array([[one.image.id for one in ones[:most]] for ones in found], np.int64)
        scores = np.array([[one.score for one in ones[:most]] for ones in found], np.float32)
        return Nearest(rows.reshape(len(found), most), scores.reshape(len(found), most))

    def features_of(self, rows: Rows) -> ImageFeatures:
        """Read from the gallery of features, or encoded again from the images' files.

        Raises GalleryError for an image that the gallery of features lacks, ImageError for a file that has gone or
        changed.
        """
        images = [self.image(row) for row in rows]
        if self.features is not None:
            return self.features.features_of(self._rows_of(self.features, images))
        for image in images:
            check_unchanged(image)
        return self.encoder.encode_images([image.path for image in images], [boxes_of(image) for image in images])

    def matched_box(self, row: int, text_embed: Floats) -> MatchedBox | None:
        if not self._perturbation.splits_boxes:
            return None
        image = self.store.get([row], vectors=True)[row]
        boxes = boxes_of(image)
        counts, numbers = sets_of_images([boxes], self._perturbation)
        vectors = image.embeddings.reshape(len(numbers), -1, image.embeddings.shape[-1])
        return MatchedBox.of(QuerySets(vectors, counts, numbers).matched_box(0, text_embed), boxes)

    def require(self, encoder: Encoder) -> None:
        self.made.require(encoder, self.store.name)

    def image(self, row: int) -> StoredImage:
        """What the store knows of an image. Raises GalleryError where it was deleted meanwhile."""
        number = int(row)
        image = self._seen.get(number) or self.store.get([number]).get(number)
        if image is None:
            raise GalleryError(
                f"an image of {self.store.name} was deleted while it was searched for; search again",
                code="store-image-gone",
            )
        return image

    def boxes_of(self, row: int) -> Boxes | None:
        return boxes_of(self.image(row))

    def _rows_of(self, gallery: StoredGallery, images: Sequence[StoredImage]) -> list[int]:
        found = []
        for image in images:
            row = gallery.row_of(image.name)
            if row is None or gallery.record(row).sha256 != image.sha256:
                raise GalleryError(
                    f"the gallery {gallery.folder} has no features of {image.name} as the store {self.store.name} "
                    "knows it; index the images into both again, or give another --features-from",
                    code="store-features",
                )
            found.append(row)
        return found


def boxes_of(image: StoredImage) -> Boxes | None:
    return boxes_from_json(image.boxes)
