"""What each method makes of the images of a split, from image tokens that all methods share."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from qpert.runtime.bundle.roles import BOX_WEIGHTS, IMAGE_TOWER, OBJECT_MASKS
from qpert.runtime.evaluation.inputs import EvaluationData
from qpert.runtime.evaluation.journal import Journal, key_of
from qpert.runtime.evaluation.methods.choices import LABELS, PERTURBING, Choices, Method
from qpert.runtime.evaluation.methods.complement import ComplementEncoder
from qpert.runtime.evaluation.methods.objects import ObjectEncoder
from qpert.runtime.evaluation.running import ImageStore, Watch, recorded
from qpert.runtime.gallery.batches import IMAGES_AT_ONCE
from qpert.runtime.inputs.boxes import Boxes
from qpert.runtime.progress import Progress
from qpert.runtime.retrieval.encoder import Encoder
from qpert.runtime.retrieval.features import ImageFeatures
from qpert.runtime.retrieval.query_sets import QuerySets, sets_of_images

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class MethodImages:
    """An `ImageStore`: the images of a split as one method sees them.

    base: the stored images, without boxes. sets: their query sets; None are those of `base`. objects: what OEs add, as
    query sets. encoder: gives the masks and weights of `boxes` to a pair scorer that takes them; None gives none.
    """

    base: ImageStore
    sets: QuerySets | None = None
    objects: QuerySets | None = None
    encoder: Encoder | None = None
    boxes: tuple[Boxes, ...] = field(default=(), repr=False)

    def itc_scores(self, text_embeds: Floats) -> Floats:
        """float32 [B, T], without objects."""
        return self.base.itc_scores(text_embeds) if self.sets is None else self.sets.itc_scores(text_embeds)

    def object_scores(self, text_embeds: Floats) -> Floats | None:
        """float32 [B, T]: the highest similarity of each text with an object of the image; None without objects."""
        return None if self.objects is None else self.objects.itc_scores(text_embeds)

    def features_of(self, rows: Sequence[int]) -> ImageFeatures:
        features = self.base.features_of(rows)
        if self.encoder is None:
            return features
        slots = self.encoder.box_slots([self.boxes[row] for row in rows])
        return ImageFeatures(features.query_sets, features.for_matching, slots[OBJECT_MASKS], slots[BOX_WEIGHTS])


class MethodReader:
    """Makes `MethodImages` of stored images; what is finished is in the journal."""

    def __init__(
        self,
        encoder: Encoder,
        data: EvaluationData,
        base: ImageStore,
        choices: Choices,
        journal: Journal,
        progress: Progress,
        watch: Watch,
    ) -> None:
        self.encoder, self.data, self.base, self.choices = encoder, data, base, choices
        self.journal, self.progress, self.watch = journal, progress, watch

    def images(self, method: Method) -> MethodImages:
        """Raises InputError, UnavailableError or BundleError for choices that this bundle or machine cannot follow."""
        if method in PERTURBING:
            return self._perturbed(method, settings_encoder(self.encoder, method, self.choices))
        return MethodImages(self.base, objects=self._objects() if method == "oes" else None)

    def _perturbed(self, method: Method, encoder: Encoder) -> MethodImages:
        """In batches of the size in which images are encoded, so that both give the same bits."""
        boxes, step = self.data.boxes, min(encoder.limit(IMAGE_TOWER, "B"), IMAGES_AT_ONCE)
        batches = [range(start, min(start + step, len(boxes))) for start in range(0, len(boxes), step)]

        def compute(number: int) -> Floats:
            rows = batches[number]
            tokens = self.base.features_of(rows).image_embeds
            given = [boxes[row] if len(boxes[row]) else None for row in rows]
            return encoder.encode_features(tokens, given).query_sets.vectors

        found = self._recorded(method, [len(rows) for rows in batches], compute)
        counts, numbers = sets_of_images(boxes, encoder.perturbation)
        vectors = np.concatenate(found).reshape(int(counts.sum()), *self._vector_shape)
        scorer = encoder.manifest.pair_scorer
        pairs = encoder if scorer is not None and scorer.takes_boxes else None
        return MethodImages(self.base, QuerySets(vectors, counts, numbers), None, pairs, boxes)

    def _objects(self) -> QuerySets:
        """Object embeddings, image by image."""
        objects, paths, boxes = ObjectEncoder(self.encoder, self.choices), self.data.dataset.images, self.data.boxes

        def compute(image: int) -> Floats:
            return objects.of_image(self.base.features_of([image]).image_embeds, boxes[image], paths[image])

        found = self._recorded("oes", [1] * len(boxes), compute)
        queries, width = self._vector_shape
        rows = [values.reshape(-1, 1 if self.choices.similarity == "mean" else queries, width) for values in found]
        return QuerySets(np.concatenate(rows), np.array([len(one) for one in rows], np.int64))

    @property
    def _vector_shape(self) -> tuple[int, int]:
        """Q and E."""
        stock = self.base.features_of([0]).query_sets.vectors
        return stock.shape[1], stock.shape[2]

    def _recorded(self, method: Method, sizes: list[int], compute: Callable[[int], Floats]) -> list[Floats]:
        """Flat arrays. The work folder is bound to images, boxes and settings, so the key holds the choices alone."""
        text = json.dumps([self.choices.of(method), len(sizes)], sort_keys=True)
        key = key_of(np.frombuffer(text.encode(), np.uint8))
        what = f"{LABELS[method]} of {sum(sizes):,} images"
        kind = f"images {method}"
        found = recorded(kind, sizes, lambda _: key, compute, what, self.journal, self.progress, self.watch)
        return [values.ravel() for values in found]


def settings_encoder(encoder: Encoder, method: Method, choices: Choices) -> Encoder:
    """The encoder with a perturbing method's settings, over the same sessions."""
    return encoder if method == "q-pert" else ComplementEncoder(encoder, choices.several_boxes)
