"""The accuracy gate: does the quantised bundle rank as the float one does?

R@1 of ITC over the whole split, in both directions; how many queries keep their first result; and the pair stage's
final scores on the shortlists of some images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qpert.calibration.quantization.data import chunks
from qpert.runtime.bundle.roles import IMAGE_TOWER
from qpert.runtime.errors import QpertError
from qpert.runtime.evaluation.metrics import image_to_text_ranks, recall, text_to_image_ranks
from qpert.runtime.inputs.datasets import RetrievalDataset
from qpert.runtime.inputs.images import load_image
from qpert.runtime.progress import Progress
from qpert.runtime.retrieval.encoder import Encoder
from qpert.runtime.retrieval.features import ImageFeatures
from qpert.runtime.retrieval.scores import final_scores
from qpert.runtime.verification import Gate

PAIR_IMAGES = 64
"""Images whose shortlists judge the pair stage: pairs cost more than features."""
SHORTLIST = 16
Floats = npt.NDArray[np.float32]


class AccuracyError(QpertError):
    """The quantised bundle lost too much accuracy. `report`: the measurements."""

    exit_code = 1

    def __init__(self, message: str, report: dict[str, Any]) -> None:
        super().__init__(message, code="accuracy-lost")
        self.report = report


@dataclass(frozen=True, eq=False)
class Measured:
    """Scores of one bundle on one split: itc float32 [B, T]; final float32 [P, K] on given shortlists.

    `final` is ITM + ITC; K is 0 where the bundle has no pair scorer.
    """

    itc: Floats
    final: Floats


def measure(
    encoder: Encoder, split: RetrievalDataset, shortlists: npt.NDArray[np.int64] | None, progress: Progress, what: str
) -> tuple[Measured, npt.NDArray[np.int64]]:
    """Score a split and return the shortlists too; if they are None, they come from this run's ITC scores."""
    with progress.stage(f"scoring {len(split)} images ({what})", len(split)) as advance:
        texts = encoder.encode_texts(split.captions)
        itc_parts: list[Floats] = []
        embeds: list[ImageFeatures] = []
        for rows in chunks(len(split), encoder.limit(IMAGE_TOWER, "B")):
            images = [load_image(split.images[row], name=split.names[row]) for row in rows]
            given = [split.boxes_of(row, image.size) for row, image in zip(rows, images, strict=True)]
            features = encoder.encode_images(images, given if split.boxes else None)
            itc_parts.append(features.query_sets.itc_scores(texts))
            embeds += [features.rows([i]) for i in range(len(rows))] if len(embeds) < PAIR_IMAGES else []
            advance(len(rows))
    itc = np.concatenate(itc_parts)
    if shortlists is None:
        length = SHORTLIST if encoder.reranks else 0
        shortlists = np.argsort(-itc[:PAIR_IMAGES], axis=1, kind="stable")[:, :length]
    final = np.empty(shortlists.shape, np.float32)
    for row, columns in enumerate(shortlists if shortlists.size else ()):
        itm = encoder.itm_scores(embeds[row], [split.captions[column] for column in columns])[0]
        final[row] = final_scores(itm, itc[row, columns])
    return Measured(itc, final), shortlists


def recall_at_1(itc: Floats, owners: npt.NDArray[np.int64]) -> dict[str, float]:
    """R@1 in percent, text to image and image to text."""
    ranks = {"t2i": text_to_image_ranks(itc, owners), "i2t": image_to_text_ranks(itc, owners)}
    return {direction: recall(found)[1] or 0.0 for direction, found in ranks.items()}


def changed_first(reference: Floats, got: Floats) -> float:
    """Percent of rows whose best column differs."""
    return float(100 * np.mean(reference.argmax(axis=1) != got.argmax(axis=1)))


def judge(
    reference: Measured, got: Measured, owners: npt.NDArray[np.int64], *, max_drop: float, min_agreement: float
) -> tuple[Gate, ...]:
    """The gates. A score that is not finite fails the verdict."""
    if not (np.isfinite(got.itc).all() and np.isfinite(got.final).all()):
        return (Gate("scores not finite", float((~np.isfinite(got.itc)).sum() + (~np.isfinite(got.final)).sum()), 0.0),)
    before, after = recall_at_1(reference.itc, owners), recall_at_1(got.itc, owners)
    most = 100 - min_agreement
    return (
        *(Gate(f"{way}: R@1 lost, points", before[way] - after[way], max_drop) for way in before),
        Gate("t2i: first results that changed, %", changed_first(reference.itc.T, got.itc.T), most),
        Gate("i2t: first results that changed, %", changed_first(reference.itc, got.itc), most),
        *reranked_gates(reference.final, got.final, most),
    )


def reranked_gates(reference: Floats, got: Floats, most: float) -> tuple[Gate, ...]:
    """A gate on shortlists whose first result differs; none if the bundle does not re-rank."""
    if not got.size:
        return ()
    return (Gate("i2t re-ranked: first results that changed, %", changed_first(reference, got), most),)


def passed(gates: Sequence[Gate]) -> bool:
    return all(gate.passed for gate in gates)
