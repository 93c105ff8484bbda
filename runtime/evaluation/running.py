"""The schedule of an evaluation over any network: texts once, ITC of all pairs, then ITM image by image.

`score_pairs` sees the network only as a `PairScorer`, so the same schedule runs over a bundle (`Encoder`) and over a
PyTorch reference, and the two can be compared rank by rank.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from qpert.runtime.errors import InputError
from qpert.runtime.evaluation.journal import Journal, NullJournal, key_of
from qpert.runtime.evaluation.pair_scores import PairScores
from qpert.runtime.evaluation.schedule import Schedule
from qpert.runtime.inputs.text import TokenizedTexts
from qpert.runtime.progress import Progress, Silent
from qpert.runtime.retrieval.features import ImageFeatures

TEXTS_A_RECORD = 256

Floats = npt.NDArray[np.float32]


class PairScorer(Protocol):
    """What the schedule needs from a network. `Encoder` is one."""

    def encode_texts(self, texts: TokenizedTexts) -> Floats:
        """T texts → float32 [T, E], unit length."""
        ...

    def itm_scores(self, features: ImageFeatures, texts: TokenizedTexts) -> Floats:
        """Match logits float32 [B, T] of every image with every text."""
        ...


class ImageStore(Protocol):
    """Encoded images. `StoredGallery` is one, on disk."""

    def itc_scores(self, text_embeds: Floats) -> Floats:
        """ITC scores float32 [B, T] of all images with T texts [T, E]."""
        ...

    def features_of(self, rows: Sequence[int]) -> ImageFeatures: ...


@dataclass(frozen=True, eq=False)
class ImagesInMemory:
    """An `ImageStore` over features that fit into memory."""

    features: ImageFeatures

    def itc_scores(self, text_embeds: Floats) -> Floats:
        return self.features.query_sets.itc_scores(text_embeds)

    def features_of(self, rows: Sequence[int]) -> ImageFeatures:
        return self.features.rows(rows)


@dataclass
class Watch:
    """Seconds of each stage in this process, and the work it found already done."""

    seconds: dict[str, float] = field(default_factory=dict)
    resumed: dict[str, int] = field(default_factory=dict)

    def measure(self, stage: str, began: float) -> None:
        self.seconds[stage] = time.perf_counter() - began


def score_pairs(
    scorer: PairScorer,
    store: ImageStore,
    texts: TokenizedTexts,
    *,
    rerank: int = 64,
    journal: Journal | None = None,
    progress: Progress | None = None,
    watch: Watch | None = None,
) -> PairScores:
    """ITC of every image with every text, and ITM of the pairs that are among the `rerank` best of either.

    Args:
        scorer: the network.
        store: B encoded images.
        texts: T texts of that network's tokenizer.
        rerank: length of the shortlists; the number of candidates or more re-ranks all of them, 0 none.
        journal: where texts and pairs are looked up and stored; None stores nothing.

    Raises:
        InputError: a negative `rerank`, or NaN among the scores, which cannot be ranked.
    """
    if rerank < 0:
        raise InputError(f"got rerank={rerank}, expected 0 (no re-ranking) or more", code="rerank-negative")
    journal, progress, watch = journal or NullJournal(), progress or Silent(), watch or Watch()
    began = time.perf_counter()
    text_embeds = encode_all_texts(scorer, texts, journal, progress, watch)
    watch.measure("texts", began)
    began = time.perf_counter()
    itc = store.itc_scores(text_embeds)
    check_itc(itc)
    schedule = Schedule.plan(itc, rerank)
    watch.measure("itc", began)
    began = time.perf_counter()
    itm = match_all(scorer, store, texts, schedule, journal, progress, watch)
    watch.measure("pairs", began)
    return PairScores(itc, schedule, itm)


def encode_all_texts(
    scorer: PairScorer, texts: TokenizedTexts, journal: Journal, progress: Progress, watch: Watch
) -> Floats:
    """float32 [T, E]. Records hold texts of similar length, so that little is spent on padding."""
    order = np.argsort(texts.attention_mask.sum(axis=1), kind="stable")
    records = [order[start : start + TEXTS_A_RECORD] for start in range(0, len(order), TEXTS_A_RECORD)]

    def compute(number: int) -> Floats:
        return scorer.encode_texts(texts.rows(records[number]))

    def key(number: int) -> bytes:
        part = texts.rows(records[number])
        return key_of(part.input_ids, part.attention_mask)

    sizes = [len(record) for record in records]
    found = recorded("texts", sizes, key, compute, f"encoding {len(texts):,} texts", journal, progress, watch)
    embeds = np.concatenate([values.reshape(size, -1) for values, size in zip(found, sizes, strict=True)])
    result = np.empty_like(embeds)
    result[order] = embeds
    return result


def match_all(
    scorer: PairScorer,
    store: ImageStore,
    texts: TokenizedTexts,
    schedule: Schedule,
    journal: Journal,
    progress: Progress,
    watch: Watch,
    *,
    kind: str = "pairs",
) -> Floats:
    """float32 [P]: ITM of the schedule's pairs, image by image, so that each image is loaded once.

    kind: of the journal's records.
    """

    def compute(image: int) -> Floats:
        wanted = schedule.texts_of(image)
        if not len(wanted):
            return np.zeros(0, np.float32)
        found = scorer.itm_scores(store.features_of([image]), texts.rows(wanted))[0]
        if np.isnan(found).any():
            raise not_a_number("ITM", image, int(wanted[np.isnan(found).argmax()]), int(np.isnan(found).sum()))
        return found

    sizes = [len(schedule.texts_of(image)) for image in range(schedule.images)]
    what = f"matching {len(schedule):,} pairs, image by image"
    found = recorded(kind, sizes, lambda i: key_of(schedule.texts_of(i)), compute, what, journal, progress, watch)
    return np.concatenate(found)


def recorded(
    kind: str,
    sizes: Sequence[int],
    key: Callable[[int], bytes],
    compute: Callable[[int], Floats],
    what: str,
    journal: Journal,
    progress: Progress,
    watch: Watch,
) -> list[Floats]:
    """`compute(0)`, `compute(1)` …, except results that the journal has. `sizes` are the units of progress.

    Progress counts only what this process computes, not what it reads, so that the remaining time is realistic.
    """
    found = [journal.get(kind, number, key(number)) for number in range(len(sizes))]
    missing = [number for number, values in enumerate(found) if values is None]
    watch.resumed[kind] = sum(sizes) - sum(sizes[number] for number in missing)
    if watch.resumed[kind]:
        progress.say(f"{watch.resumed[kind]:,} of {sum(sizes):,} {kind} are already computed")
    if not missing:
        return [values for values in found if values is not None]
    with progress.stage(what, sum(sizes[number] for number in missing)) as advance:
        for number in missing:
            found[number] = values = compute(number)
            journal.put(kind, number, key(number), values.ravel())
            advance(sizes[number])
    return [values for values in found if values is not None]


def check_itc(itc: Floats) -> None:
    """Raise InputError if an ITC score is NaN."""
    bad = np.argwhere(np.isnan(itc))
    if len(bad):
        raise not_a_number("ITC", int(bad[0, 0]), int(bad[0, 1]), len(bad))


def not_a_number(score: str, image: int, text: int, count: int) -> InputError:
    return InputError(
        f"{count} {score} scores are NaN, which cannot be ranked, the first of image {image} with text {text} (counted "
        "from 0); check the bundle with `qpert verify`: half precision may have overflowed, then export in fp32",
        code="scores-nan",
    )
