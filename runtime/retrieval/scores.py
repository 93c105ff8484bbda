"""The two scores of BLIP-2 retrieval and how they add up. The formulas stand here and nowhere else."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qpert.runtime.errors import InputError
from qpert.runtime.inputs.arguments import as_numbers

SCORE_FORMULAS = {
    "itc": "max over the Q queries of query_embeds · text_embeds",
    "itm": "match logit (class 1), mean over the Q queries, no softmax",
    "final": "itm + itc",
}
"""What the manifest says of them."""


BLOCK = 1 << 24
"""Similarities held at once: 64 MB in float32, whatever the number of images and texts."""

ONE_THREAD = 1 << 24
"""Products of one text from which waking BLAS's threads pays: below, one thread takes at most some 3 ms."""


def itc_scores(query_embeds: npt.NDArray[np.float32], text_embeds: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Image-text contrastive scores: the best of an image's queries for each text.

    Args:
        query_embeds: float32 [B, Q, E], rows of unit length.
        text_embeds: float32 [T, E], rows of unit length.

    Returns:
        float32 [B, T], cosines in [−1, 1]. Source: LAVIS `blip2_qformer.py`, `sim_q2t.max(-1)`.

    Raises:
        InputError: the shapes are not these.
    """
    query_embeds = as_numbers(query_embeds, "query_embeds")
    text_embeds = as_numbers(text_embeds, "text_embeds")
    if query_embeds.ndim != 3 or text_embeds.ndim != 2 or query_embeds.shape[-1] != text_embeds.shape[-1]:
        raise InputError(
            f"got query_embeds {list(query_embeds.shape)} and text_embeds {list(text_embeds.shape)}, "
            "expected [B, Q, E] and [T, E]",
            code="score-shapes",
        )
    _, queries, width = query_embeds.shape
    texts = len(text_embeds)
    if texts == 1 and query_embeds.size <= ONE_THREAD:
        return itc_scores_of_text(query_embeds, text_embeds[0])[:, None]
    scores = np.empty((len(query_embeds), texts), dtype=np.float32)
    step = max(1, BLOCK // max(1, queries * texts))
    for start in range(0, len(query_embeds), step):
        # One product of all rows: NumPy takes three axes image by image, which is four times slower.
        chunk = query_embeds[start : start + step]
        similarities = chunk.reshape(len(chunk) * queries, width) @ text_embeds.T  # [step * Q, T]
        scores[start : start + step] = similarities.reshape(len(chunk), queries, texts).max(axis=1)
    return scores


def itc_scores_of_text(
    query_embeds: npt.NDArray[np.float32], text_embed: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """float32 [B]: the scores of images [B, Q, E] with one text [E], computed by this thread alone.

    A product of OpenBLAS wakes its threads, which wait for more work at full speed for some 25 ms: longer than the
    product, and than what they then keep from running.
    """
    return np.asarray(np.einsum("bqe,e->bq", query_embeds, text_embed).max(axis=1))


def final_scores(itm: npt.NDArray[np.float32], itc: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The score of a re-ranked pair: ITM + ITC (LAVIS `compute_sim_matrix`, confirmed in its issue 645)."""
    return np.asarray(itm + itc, dtype=np.float32)


def ranking(scores: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """Indices from the highest score to the lowest; ties go to the lower index.

    Raises ValueError for NaN, which has no rank.
    """
    if np.isnan(scores).any():
        raise ValueError(f"{int(np.isnan(scores).sum())} of {scores.size} scores are NaN, which cannot be ranked")
    return np.argsort(-scores, kind="stable")
