"""Levels `rank` and `recall`: a bundle and a live reference on the same pictures and captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from qpert.runtime.bundle.samples import Samples
from qpert.runtime.errors import InputError
from qpert.runtime.evaluation.evaluate import check_data, encoded
from qpert.runtime.evaluation.inputs import EvaluationData
from qpert.runtime.evaluation.pair_scores import PairScores
from qpert.runtime.evaluation.running import ImagesInMemory, PairScorer, score_pairs
from qpert.runtime.inputs.boxes import Boxes
from qpert.runtime.progress import Progress, Silent
from qpert.runtime.retrieval.encoder import Encoder
from qpert.runtime.retrieval.features import ImageFeatures
from qpert.runtime.verification.evidence import evidence_of
from qpert.runtime.verification.host import host_gates
from qpert.runtime.verification.ranks import RankComparison, compare_ranks
from qpert.runtime.verification.recall import RecallComparison, compare_recall, rounding_ties
from qpert.runtime.verification.result import Gate, Verification
from qpert.runtime.verification.tolerances import RANK_LIMITS, RankLimits


class LiveReference(PairScorer, Protocol):
    """A reference that also encodes pictures from files."""

    @property
    def name(self) -> str: ...

    def encode_images(
        self, files: Sequence[Path], boxes: Sequence[Boxes | None], progress: Progress
    ) -> ImageFeatures: ...

    def own_inputs(self, samples: Samples) -> Samples:
        """The recorded pictures and captions, with the reference's pixels and ids for them."""
        ...


def limits_for(precision: str, allowed: dict[str, float]) -> RankLimits:
    """The limits of a precision, with some of them replaced.

    Raises:
        InputError: an unknown name, or a limit that is negative or NaN.
    """
    names = [field.name for field in fields(RankLimits)]
    for name, value in allowed.items():
        if name not in names:
            raise InputError(
                f"--allow {name}={value:g} is not a limit; expected one of {', '.join(names)}", code="allow-unknown"
            )
        if not value >= 0:
            raise InputError(f"--allow {name}={value:g}: expected a limit of 0 or more", code="allow-negative")
    return replace(RANK_LIMITS[precision], **allowed)


def verify_live(
    encoder: Encoder,
    reference: LiveReference,
    data: EvaluationData,
    samples: Samples,
    *,
    level: str,
    limits: RankLimits,
    rerank: int | None = None,
    provider: str = "cpu",
    progress: Progress | None = None,
) -> Verification:
    """Score `data` on both sides and compare ranks and, at level `recall`, recall.

    Args:
        encoder: the opened bundle.
        reference: what it must agree with.
        data: the pictures, captions and boxes.
        samples: the recorded ones, for the gates around the network.
        level: `rank` or `recall`.
        limits: see `limits_for`.
        rerank: length of the shortlists; None is 64, or 0 if the bundle has no pair scorer.
    """
    progress = progress or Silent()
    rerank = encoder.shortlist(rerank)
    texts = check_data(encoder, data)
    progress.say("the bundle:")
    store = ImagesInMemory(encoded(encoder, data, progress))
    deployed = score_pairs(encoder, store, texts, rerank=rerank, progress=progress)
    progress.say(f"the reference ({reference.name}):")
    features = reference.encode_images(data.dataset.images, data.boxes, progress)
    expected = score_pairs(reference, ImagesInMemory(features), texts, rerank=rerank, progress=progress)
    ranks = compare_ranks(expected, deployed, limits)
    recall = recall_of(expected, deployed, ranks, data) if level == "recall" else None
    return Verification(
        level,
        reference.name,
        provider,
        encoder.manifest.precision,
        gates_of(ranks, recall, limits, host_gates(encoder, reference.own_inputs(samples))),
        details=details_of(ranks, recall, data, rerank),
        evidence=evidence_of(expected, deployed, ranks, data),
    )


def recall_of(
    expected: PairScores, deployed: PairScores, ranks: RankComparison, data: EvaluationData
) -> RecallComparison:
    owners = data.dataset.image_of_caption

    def both(scores: PairScores) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        return scores.t2i_ranks(owners), scores.i2t_ranks(owners)

    return compare_recall(
        both(expected),
        both(deployed),
        (rounding_ties(ranks.t2i), rounding_ties(ranks.i2t)),
        image_of_text=owners,
        largest_areas=data.largest_areas,
    )


def gates_of(
    ranks: RankComparison, recall: RecallComparison | None, limits: RankLimits, host: list[Gate]
) -> tuple[Gate, ...]:
    return (*(recall.gates(limits) if recall else ()), *ranks.gates(), *host)


def details_of(
    ranks: RankComparison, recall: RecallComparison | None, data: EvaluationData, rerank: int
) -> dict[str, Any]:
    """The part of the JSON besides the gates."""
    dataset = data.dataset
    details: dict[str, Any] = {
        "data": {
            "title": data.title,
            "root": str(dataset.root),
            "images": len(dataset),
            "texts": len(dataset.captions),
            "boxes": data.boxes_from,
            "rerank": rerank,
        },
        "ranks": ranks.to_dict(),
    }
    return details | ({"recall": recall.to_dict()} if recall else {})
