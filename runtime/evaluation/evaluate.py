"""`evaluate`: a bundle on a data set, from image files to recall."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from qpert.runtime.errors import InputError, LimitError, TextError
from qpert.runtime.evaluation.inputs import EvaluationData
from qpert.runtime.evaluation.journal import DiskJournal
from qpert.runtime.evaluation.result import Evaluation
from qpert.runtime.evaluation.running import ImagesInMemory, ImageStore, Watch, score_pairs
from qpert.runtime.gallery.entries import ImageEntry
from qpert.runtime.gallery.indexing import index_images
from qpert.runtime.gallery.reader import StoredGallery
from qpert.runtime.inputs.perturbation import FIXED_IN_GRAPHS, Coverage, Perturbation, Reduction, Semantics
from qpert.runtime.inputs.text import TokenizedTexts
from qpert.runtime.progress import Progress, Silent
from qpert.runtime.retrieval.encoder import Encoder
from qpert.runtime.retrieval.features import ImageFeatures, concatenated

IMAGES_AT_ONCE = 64
GALLERY_NAME = "gallery"
JOURNAL_NAME = "scores.sqlite"


def evaluate(
    encoder: Encoder,
    data: EvaluationData,
    *,
    rerank: int | None = None,
    work: Path | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Recall of the encoder's bundle, with the encoder's perturbation settings, on a split.

    Args:
        encoder: an opened bundle.
        data: the split and its boxes, see `open_data`.
        rerank: how many candidates of each text and of each image ITM scores; 0 disables ITM; None is 64, or 0 if the
            bundle has no pair scorer.
        work: a folder from `open_work` that keeps features and scores, so that a second call resumes from them. None
            keeps everything in memory, including the features of all images.

    Raises:
        LimitError: an image with more boxes than the bundle takes. TextError: a caption that cannot be used.
        InputError: NaN among the scores, a work folder in use.
        UnavailableError: the disk is full; the same call resumes.
    """
    progress, watch = progress or Silent(), Watch()
    rerank = encoder.shortlist(rerank)
    began = time.perf_counter()
    texts = check_data(encoder, data)
    with opened_images(encoder, data, work, progress, watch) as store:
        if work is None:
            scores = score_pairs(encoder, store, texts, rerank=rerank, progress=progress, watch=watch)
        else:
            with DiskJournal(work / JOURNAL_NAME) as journal:
                scores = score_pairs(
                    encoder, store, texts, rerank=rerank, journal=journal, progress=progress, watch=watch
                )
    ranked = time.perf_counter()
    owners, areas = data.dataset.image_of_caption, data.largest_areas
    metrics, alone = scores.metrics(owners, areas), scores.itc_alone().metrics(owners, areas)
    watch.measure("ranks", ranked)
    watch.measure("total", began)
    family, seconds = encoder.manifest.family, watch.seconds
    return Evaluation(metrics, alone, scores, data, encoder.perturbation, rerank, seconds, watch.resumed, family)


def check_data(encoder: Encoder, data: EvaluationData) -> TokenizedTexts:
    """Check that the bundle can take these boxes and captions, before hours of work; returns the tokenised captions.

    Raises LimitError for an image with more boxes than the bundle takes, TextError for a caption that cannot be used.
    """
    check_boxes(encoder, data)
    return check_captions(encoder, data)


def check_captions(encoder: Encoder, data: EvaluationData) -> TokenizedTexts:
    """The tokenised captions. Raises TextError for one that cannot be used."""
    try:
        return encoder.tokenize(data.dataset.captions)
    except TextError as error:
        raise TextError(
            f"a caption of the {data.dataset.split} split of {data.dataset.root}: {error}", code="caption"
        ) from error


def check_boxes(encoder: Encoder, data: EvaluationData) -> None:
    """Raise InputError if the bundle takes no boxes, LimitError if an image has more boxes than it takes."""
    if any(map(len, data.boxes)) and not encoder.manifest.query_head.takes_boxes:
        raise InputError(
            "this bundle was exported with --perturb none and takes no boxes; evaluate with --boxes none",
            code="bundle-without-boxes",
        )
    check_box_counts(encoder, data.dataset.names, [len(boxes) for boxes in data.boxes])


def check_box_counts(encoder: Encoder, names: Sequence[str], counts: Sequence[int]) -> None:
    """Raise LimitError if an image has more boxes than the bundle takes: none is dropped silently.

    names: of the images. counts: boxes of each image.
    """
    graph = encoder.manifest.query_head
    most, limit = max(counts, default=0), graph.ranges["O"].max if graph.takes_boxes else 0
    if most > limit:
        raise LimitError(
            f"{sum(count > limit for count in counts)} images have more boxes than the {limit} that this bundle takes, "
            f"{names[counts.index(most)]} has {most}; keep the best ones with --max-boxes {limit}, or export "
            f"again with --max-boxes {most}",
            code="too-many-boxes",
        )


@contextmanager
def opened_images(
    encoder: Encoder,
    data: EvaluationData,
    work: Path | None,
    progress: Progress,
    watch: Watch,
    *,
    name: str = GALLERY_NAME,
) -> Iterator[ImageStore]:
    """The encoded images: a gallery of that name in the work folder, or memory."""
    began = time.perf_counter()
    if work is None:
        store = ImagesInMemory(encoded(encoder, data, progress))
        watch.measure("images", began)
        yield store
        return
    dataset = data.dataset
    entries = [
        ImageEntry(name, path, boxes if len(boxes) else None)
        for name, path, boxes in zip(dataset.names, dataset.images, data.boxes, strict=True)
    ]
    summary = index_images(work / name, encoder, entries, progress=progress)
    watch.resumed["images"] = summary.unchanged
    watch.measure("images", began)
    with StoredGallery.open(work / name, encoder) as gallery:
        if gallery.images != dataset.names:
            raise InputError(
                f"the gallery in {work} does not hold the images of this split in order; delete {work}",
                code="work-gallery",
            )
        yield gallery


def encoded(encoder: Encoder, data: EvaluationData, progress: Progress) -> ImageFeatures:
    """All images in memory."""
    images, parts = data.dataset.images, []
    with progress.stage(f"encoding {len(images):,} images", len(images)) as advance:
        for start in range(0, len(images), IMAGES_AT_ONCE):
            part = slice(start, start + IMAGES_AT_ONCE)
            parts.append(encoder.encode_images(images[part], data.boxes[part]))
            advance(len(images[part]))
    return concatenated(parts)


def overridden(
    exported: Perturbation,
    *,
    semantics: Semantics | None = None,
    alpha: float | None = None,
    beta: float | None = None,
    gamma: float | None = None,
    reduction: Reduction | None = None,
    coverage: Coverage | None = None,
    keep_stock: bool | None = None,
) -> Perturbation:
    """A bundle's settings with some replaced; those fixed inside its graphs (`FIXED_IN_GRAPHS`) stay.

    `semantics` replaces reduction and coverage by those of that reading, unless they are given too.
    """
    base = exported
    if semantics is not None:
        kept = asdict(exported)
        fixed = {name: kept[name] for name in (*FIXED_IN_GRAPHS, "alpha", "beta", "gamma")}
        fixed |= {name: value for name, value in (("beta", beta), ("gamma", gamma)) if value is not None}
        base = Perturbation.release(**fixed) if semantics == "release" else Perturbation.paper(**fixed)
        beta = gamma = None
    if keep_stock is None and reduction not in (None, "each"):
        keep_stock = False  # of the bundle's `each`, which is replaced
    given = {
        "keep_stock": keep_stock,
        "alpha": alpha,
        "beta": beta,
        "gamma": gamma,
        "reduction": reduction,
        "coverage": coverage,
    }
    return replace(base, **{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
