"""Two-stage search: ITC over everything, ITM over the shortlist. What a gallery offers for it, and the results."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from qpert.runtime.errors import InputError
from qpert.runtime.filters.metadata import Metadata, checked_metadata
from qpert.runtime.filters.parsing import as_condition
from qpert.runtime.filters.tree import Condition, holds
from qpert.runtime.gallery.hits import Hit, MatchedBox, TextHit
from qpert.runtime.gallery.scan import Nearest, nearest, top
from qpert.runtime.inputs.arguments import as_boxes, as_count, as_list, as_numbers, as_rows, as_texts, kind_of
from qpert.runtime.inputs.boxes import Boxes
from qpert.runtime.retrieval.encoder import Encoder
from qpert.runtime.retrieval.features import ImageFeatures
from qpert.runtime.retrieval.scores import final_scores, ranking

Rows = Sequence[int] | npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

IMAGES_AT_ONCE = 64
"""Image features held at once while re-ranking: 122 MB at full size in fp16."""
SHARED = 2
"""Texts that an image of the shortlists has to meet on average for going image by image to be the cheaper order."""


class Names(Protocol):
    """The name of each row."""

    def __getitem__(self, row: int, /) -> str: ...


class Searchable(Protocol):
    """Images that can be searched: in memory (`Gallery`) or on disk (`StoredGallery`). Rows are numbered from 0."""

    @property
    def images(self) -> Names: ...

    def __len__(self) -> int: ...

    def nearest(
        self, text_embeds: Floats, count: int, *, exact: bool = False, where: Condition | None = None
    ) -> Nearest:
        """The best `count` images (or all there are) for each of T texts [T, E], by ITC, of those of which `where` is
        true."""
        ...

    def features_of(self, rows: Rows) -> ImageFeatures:
        """The features of some images, in that order."""
        ...

    def matched_box(self, row: int, text_embed: Floats) -> MatchedBox | None:
        """The box of an image that matches a text [E] best; None without a query set for each box."""
        ...

    def require(self, encoder: Encoder) -> None:
        """Raises GalleryError where the images were not encoded as `encoder` does."""
        ...


@dataclass(frozen=True, eq=False)
class Gallery:
    """Images in memory that can be searched: a name for each row of `features`.

    `boxes`: those that the images were encoded with, so that hits can show the box that matched; None leaves its place
    and label out. `metadata`: what filters are about; None is none of any image.
    """

    images: tuple[str, ...]
    features: ImageFeatures
    boxes: tuple[Boxes | None, ...] | None = None
    metadata: tuple[Metadata, ...] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.features, ImageFeatures):
            raise InputError(
                f"features are a {kind_of(self.features)}; expected what encode_images returns", code="features-kind"
            )
        names = as_list(self.images, "the names of images", InputError, code="names-kind")
        object.__setattr__(self, "images", tuple(map(str, names)))
        if len(self.images) != len(self.features):
            raise InputError(
                f"got {len(self.images)} names for {len(self.features)} images' features; give each image one name",
                code="names-count",
            )
        if self.boxes is not None:
            object.__setattr__(self, "boxes", tuple(as_boxes(self.boxes, len(self.images))))
        if self.metadata is not None:
            if len(self.images) != len(self.metadata):
                raise InputError(
                    f"got metadata of {len(self.metadata)} images for {len(self.images)} names; expected one each",
                    code="metadata",
                )
            pairs = zip(self.images, self.metadata, strict=True)
            found = tuple(checked_metadata(one, f"the image {name}") for name, one in pairs)
            object.__setattr__(self, "metadata", found)

    def __len__(self) -> int:
        return len(self.images)

    def nearest(
        self, text_embeds: Floats, count: int, *, exact: bool = False, where: Condition | None = None
    ) -> Nearest:
        """Always by the exact scan."""
        sets, alive = self.features.query_sets, None
        if where is not None:
            alive = np.array([holds(where, one) for one in self.metadata or [{}] * len(self)], bool)
        return nearest(sets.vectors, text_embeds, count, counts=sets.counts, alive=alive, exact=exact)

    def matched_box(self, row: int, text_embed: Floats) -> MatchedBox | None:
        index = self.features.query_sets.matched_box(row, text_embed)
        return MatchedBox.of(index, None if self.boxes is None else self.boxes[row])

    def features_of(self, rows: Rows) -> ImageFeatures:
        return self.features.rows(as_rows(rows, len(self)))

    def require(self, encoder: Encoder) -> None:
        """Features in memory do not say who made them; their shapes are checked where they are used."""


@dataclass(frozen=True, eq=False)
class TextGallery:
    """Texts that can be searched with an image: `embeds` float32 [T, E]; `images` names each one's own, or is None."""

    texts: tuple[str, ...]
    embeds: Floats
    images: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "texts", tuple(as_texts(self.texts)))
        object.__setattr__(self, "embeds", as_numbers(self.embeds, "embeds"))
        if len(self.texts) != len(self.embeds) or (self.images is not None and len(self.images) != len(self.texts)):
            raise InputError(
                f"got {len(self.texts)} texts for {len(self.embeds)} embeddings; expected one for each",
                code="texts-count",
            )

    def __len__(self) -> int:
        return len(self.texts)


def search_images(
    encoder: Encoder,
    texts: Iterable[str],
    gallery: Searchable,
    *,
    k: int,
    rerank: int | None,
    exact: bool,
    where: str | Condition | None = None,
) -> list[list[Hit]]:
    """The best images for each text; see `Retriever.search`."""
    condition = as_condition(where)
    k, shortlist = as_count(k, "k", least=1), encoder.shortlist(rerank)
    check_gallery(gallery)
    texts = as_texts(texts)
    gallery.require(encoder)
    text_embeds = encoder.encode_texts(texts)
    if not len(gallery):
        return [[] for _ in texts]
    found = gallery.nearest(text_embeds, max(k, shortlist), exact=exact, where=condition)
    matched = match_shortlists(encoder, texts, gallery, found.rows[:, :shortlist])
    names = gallery.images
    return [
        [
            Hit(names[row], score, float(itc[place]), itm_score, place + 1, gallery.matched_box(row, embed))
            for place, score, itm_score in reranked(itc, itm)[:k]
            for row in [int(rows[place])]
        ]
        for rows, itc, itm, embed in zip(found.rows, found.scores, matched, text_embeds, strict=True)
    ]


def search_texts(
    encoder: Encoder,
    features: ImageFeatures,
    gallery: TextGallery,
    *,
    boxes: Boxes | None = None,
    k: int,
    rerank: int | None,
) -> list[TextHit]:
    """The best texts for one image's features; see `Retriever.search_texts`."""
    k, shortlist = as_count(k, "k", least=1), encoder.shortlist(rerank)
    if not len(gallery):
        return []
    sets = features.query_sets
    scores = sets.itc_scores(gallery.embeds)[0]
    check_scores(scores, "ITC")
    order = top(scores, min(max(k, shortlist), len(gallery)))
    candidates = [gallery.texts[row] for row in order[:shortlist]]
    itm = encoder.itm_scores(features, candidates)[0] if candidates else np.empty(0, np.float32)
    check_scores(itm, "ITM")
    owners = gallery.images
    return [
        TextHit(
            gallery.texts[row],
            score,
            float(scores[row]),
            itm_score,
            place + 1,
            None if owners is None else owners[row],
            MatchedBox.of(sets.matched_box(0, gallery.embeds[row]), boxes),
        )
        for place, score, itm_score in reranked(scores[order], itm)[:k]
        for row in [int(order[place])]
    ]


def reranked(itc: Floats, itm: Floats) -> list[tuple[int, float, float | None]]:
    """(place by ITC, score, ITM) in final order: the shortlist by ITM + ITC, then the rest by ITC alone.

    `itc` [m] is in descending order; `itm` [r] is of its first r.
    """
    final = final_scores(itm, itc[: len(itm)])
    first = [(int(place), float(final[place]), float(itm[place])) for place in ranking(final)]
    return [*first, *((place, float(itc[place]), None) for place in range(len(itm), len(itc)))]


def match_shortlists(
    encoder: Encoder, texts: Sequence[str], gallery: Searchable, shortlists: npt.NDArray[np.int64]
) -> Floats:
    """ITM of each text with its own shortlist: rows int64 [T, r] → float32 [T, r].

    Where the shortlists share images, each image is read once and its keys and values are computed once for all the
    texts that need it; else one text meets its images in one call.
    """
    scores = np.empty(shortlists.shape, np.float32)
    needed = len(np.unique(shortlists))
    by_image = len(texts) > 1 and shortlists.size >= SHARED * needed
    for places, part in (_by_image if by_image else _by_text)(encoder, texts, gallery, shortlists):
        scores[places] = part
    check_scores(scores, "ITM")
    return scores


Part = tuple[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]], Floats]
"""Where scores belong in [T, r], and the scores."""


def _by_text(
    encoder: Encoder, texts: Sequence[str], gallery: Searchable, shortlists: npt.NDArray[np.int64]
) -> Iterator[Part]:
    for number, rows in enumerate(shortlists):
        for start in range(0, len(rows), IMAGES_AT_ONCE):
            part = rows[start : start + IMAGES_AT_ONCE]
            places = np.arange(start, start + len(part))
            scores = encoder.itm_scores(gallery.features_of(part), [texts[number]])[:, 0]
            yield (np.full(len(part), number), places), scores


def _by_image(
    encoder: Encoder, texts: Sequence[str], gallery: Searchable, shortlists: npt.NDArray[np.int64]
) -> Iterator[Part]:
    needing: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for number, rows in enumerate(shortlists.tolist()):
        for place, row in enumerate(rows):
            needing[row].append((number, place))
    images = sorted(needing)
    for start in range(0, len(images), IMAGES_AT_ONCE):
        part = images[start : start + IMAGES_AT_ONCE]
        features = gallery.features_of(part)
        for index, row in enumerate(part):
            numbers, places = np.array(needing[row], np.int64).T
            own = encoder.itm_scores(features.rows(slice(index, index + 1)), [texts[number] for number in numbers])
            yield (numbers, places), own[0]


def check_gallery(gallery: object) -> None:
    """Raises InputError for what is no gallery. A path is not opened in silence: that reads the whole catalogue, which
    a program that searches more than once does not want to do each time."""
    if isinstance(gallery, str | Path):
        raise InputError(
            f"the gallery is the path {str(gallery)!r}; expected an open gallery: "
            "`with retriever.open_gallery(path) as gallery`",
            code="gallery-kind",
        )
    if not all(hasattr(gallery, name) for name in ("images", "nearest", "features_of", "matched_box", "require")):
        raise InputError(
            f"the gallery is a {kind_of(gallery)}; expected a Gallery(names, features), or what open_gallery returns",
            code="gallery-kind",
        )


def check_scores(scores: Floats, stage: str) -> None:
    """Raises InputError for NaN, which has no rank."""
    if np.isnan(scores).any():
        raise InputError(
            f"{int(np.isnan(scores).sum())} of {scores.size} {stage} scores are NaN, which cannot be ranked; verify "
            "the bundle (`qpert verify`), and export it in fp32 if half precision overflows",
            code="scores-nan",
        )
