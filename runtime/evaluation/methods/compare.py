"""`compare`: several methods on one split, which share image tokens, texts and matched pairs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from qpert.runtime.errors import InputError
from qpert.runtime.evaluation.evaluate import (
    JOURNAL_NAME,
    check_box_counts,
    check_captions,
    opened_images,
)
from qpert.runtime.evaluation.inputs import EvaluationData
from qpert.runtime.evaluation.journal import DiskJournal, Journal, NullJournal
from qpert.runtime.evaluation.methods.choices import PERTURBING, Choices, Method, check_methods
from qpert.runtime.evaluation.methods.comparison import Comparison
from qpert.runtime.evaluation.methods.images import MethodImages, MethodReader, settings_encoder
from qpert.runtime.evaluation.pair_scores import PairScores
from qpert.runtime.evaluation.result import Evaluation
from qpert.runtime.evaluation.running import Watch, check_itc, encode_all_texts, match_all
from qpert.runtime.evaluation.schedule import Schedule
from qpert.runtime.inputs.boxes import Boxes
from qpert.runtime.inputs.perturbation import Perturbation
from qpert.runtime.inputs.text import TokenizedTexts
from qpert.runtime.progress import Progress, Silent
from qpert.runtime.retrieval.encoder import Encoder

Floats = npt.NDArray[np.float32]

STOCK_GALLERY = "stock-gallery"
"""In the work folder, beside the gallery of an evaluation whose images are perturbed as they are encoded."""


def compare(
    encoder: Encoder,
    data: EvaluationData,
    methods: Sequence[Method],
    choices: Choices | None = None,
    *,
    rerank: int | None = None,
    work: Path | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Recall of each method on a split. The encoder's perturbation settings are those of `q-pert`.

    Images go through the image tower once, texts through theirs once; a pair that several methods match is matched
    once, where the pair scorer sees no boxes. A method alone gives the same as among others.

    Args:
        encoder, data, rerank, work: as in `qpert.runtime.evaluation.evaluate.evaluate`.
        methods: at least one, each once.
        choices: what the paper leaves open about the baselines.

    Raises:
        InputError: a method that the bundle's graphs do not allow; see also `evaluate`.
        UnavailableError: a choice that needs a package which is missing here; a full disk.
    """
    choices, progress, watch = choices or Choices(), progress or Silent(), Watch()
    rerank = encoder.shortlist(rerank)
    began = time.perf_counter()
    texts = check_comparison(encoder, data, methods, choices, rerank)
    with (
        opened_images(encoder, without_boxes(data), work, progress, watch, name=STOCK_GALLERY) as base,
        opened_journal(work) as journal,
    ):
        reader = MethodReader(encoder, data, base, choices, journal, progress, watch)
        boxed = time.perf_counter()
        images = {method: reader.images(method) for method in methods}
        watch.measure("boxes", boxed)
        run = _Run(encoder, texts, choices, rerank, journal, progress, watch)
        scores = run.scores(images)
    watch.measure("total", began)
    found = [evaluation(encoder, data, method, choices, scores[method], rerank, watch) for method in methods]
    return Comparison(tuple(found))


def check_comparison(
    encoder: Encoder, data: EvaluationData, methods: Sequence[Method], choices: Choices, rerank: int
) -> TokenizedTexts:
    """Check that the bundle can run these methods on these boxes and captions; returns the tokenised captions."""
    check_methods(encoder.manifest, methods, choices)
    if "oes" in methods and choices.joins == "final" and not rerank:
        raise InputError(
            "--oes-joins final adds object embeddings to re-ranked pairs, and nothing is re-ranked; use --oes-joins "
            "all, or --rerank 64 where the bundle has a pair scorer",
            code="method-without-reranking",
        )
    needing = [method for method in methods if method != "none"]
    if needing and not any(map(len, data.boxes)):
        raise InputError(
            f"--method {', '.join(needing)} needs boxes, and there are none; give --boxes entities or a file, or "
            "evaluate --method none",
            code="method-needs-boxes",
        )
    perturbing = [method for method in methods if method in PERTURBING]
    if perturbing:
        check_box_counts(encoder, data.dataset.names, [len(boxes) for boxes in data.boxes])
    for method in perturbing:
        settings_encoder(encoder, method, choices)
    return check_captions(encoder, data)


def without_boxes(data: EvaluationData) -> EvaluationData:
    """The same split with no box that acts; size bins stay."""
    empty = tuple(Boxes.empty(boxes.size) for boxes in data.boxes)
    return replace(data, boxes=empty, boxes_from="no boxes")


@contextmanager
def opened_journal(work: Path | None) -> Iterator[Journal]:
    if work is None:
        yield NullJournal()
        return
    with DiskJournal(work / JOURNAL_NAME) as journal:
        yield journal


class _Run:
    """The stages that follow the images: texts, ITC and shortlists of each method, pairs."""

    def __init__(
        self,
        encoder: Encoder,
        texts: TokenizedTexts,
        choices: Choices,
        rerank: int,
        journal: Journal,
        progress: Progress,
        watch: Watch,
    ) -> None:
        self.encoder, self.texts, self.choices, self.rerank = encoder, texts, choices, rerank
        self.journal, self.progress, self.watch = journal, progress, watch

    def scores(self, images: Mapping[Method, MethodImages]) -> dict[Method, PairScores]:
        began = time.perf_counter()
        text_embeds = encode_all_texts(self.encoder, self.texts, self.journal, self.progress, self.watch)
        self.watch.measure("texts", began)
        began = time.perf_counter()
        first = {method: self._first(one, text_embeds) for method, one in images.items()}
        plans = {method: Schedule.plan(itc, self.rerank) for method, (itc, _) in first.items()}
        self.watch.measure("itc", began)
        began = time.perf_counter()
        itm = self._pairs(images, plans)
        self.watch.measure("pairs", began)
        return {
            method: PairScores(itc, plans[method], with_objects(itm[method], objects, plans[method]))
            for method, (itc, objects) in first.items()
        }

    def _first(self, images: MethodImages, text_embeds: Floats) -> tuple[Floats, Floats | None]:
        """The scores [B, T] that choose shortlists, and those that join only the final score."""
        itc, objects = images.itc_scores(text_embeds), images.object_scores(text_embeds)
        if objects is not None and self.choices.joins == "all":
            itc, objects = itc + objects, None
        check_itc(itc)
        return itc, objects

    def _pairs(self, images: Mapping[Method, MethodImages], plans: Mapping[Method, Schedule]) -> dict[Method, Floats]:
        """ITM of each method's pairs. Methods whose pair scorer sees the same share one pass over the images."""
        groups: dict[str, list[Method]] = {}
        for method, one in images.items():
            groups.setdefault(pair_kind(method, one, self.choices), []).append(method)
        found: dict[Method, Floats] = {}
        for kind, members in groups.items():
            union = joined([plans[method] for method in members])
            store = images[members[0]]
            itm = match_all(self.encoder, store, self.texts, union, self.journal, self.progress, self.watch, kind=kind)
            found |= {method: itm[np.searchsorted(union.keys, plans[method].keys)] for method in members}
        return found


def pair_kind(method: Method, images: MethodImages, choices: Choices) -> str:
    """The journal's name for pairs: one for all methods whose pair scorer sees no boxes."""
    if images.encoder is None:
        return "pairs without boxes"
    return " ".join(["pairs", method, *choices.of(method).values()])


def joined(plans: Sequence[Schedule]) -> Schedule:
    """Every pair on any list; shortlists are left out."""
    keys = np.unique(np.concatenate([plan.keys for plan in plans]))
    first = plans[0]
    return replace(first, by_text=first.by_text[:, :0], by_image=first.by_image[:, :0], keys=keys)


def with_objects(itm: Floats, objects: Floats | None, plan: Schedule) -> Floats:
    """float32 [P]: what `PairScores` adds to ITC; objects [B, T] join the final score alone."""
    if objects is None:
        return itm
    return np.asarray(itm + objects.ravel()[plan.keys], np.float32)


def evaluation(
    encoder: Encoder,
    data: EvaluationData,
    method: Method,
    choices: Choices,
    scores: PairScores,
    rerank: int,
    watch: Watch,
) -> Evaluation:
    """One method's results; without boxes in its data where they change nothing."""
    owners, areas = data.dataset.image_of_caption, data.largest_areas
    metrics, alone = scores.metrics(owners, areas), scores.itc_alone().metrics(owners, areas)
    return Evaluation(
        metrics,
        alone,
        scores,
        without_boxes(data) if method == "none" else data,
        perturbation_of(encoder, method, choices),
        rerank,
        watch.seconds,
        watch.resumed,
        encoder.manifest.family,
        method=method,
        choices=choices,
    )


def perturbation_of(encoder: Encoder, method: Method, choices: Choices) -> Perturbation:
    """The settings to record: strength 0 where the queries are the stock ones."""
    if method in PERTURBING:
        return settings_encoder(encoder, method, choices).perturbation
    return replace(encoder.perturbation, alpha=0.0, reduction="sum", keep_stock=False)
