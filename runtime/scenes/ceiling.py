"""The best recall that any retriever could reach, given that some captions are true of several pictures.

A perfect retriever knows for every pair whether the caption is true of the picture, and nothing more: the true ones are
first, in random order.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from qpert.runtime.scenes.captions import Caption
from qpert.runtime.scenes.facts import is_true
from qpert.runtime.scenes.scene import Scene

CUTS = (1, 5, 10)


@dataclass(frozen=True)
class Ceiling:
    """Best attainable recall in percent at 1, 5 and 10, expected over random tie-breaking."""

    t2i: dict[int, float]
    i2t: dict[int, float]
    ambiguous_captions: int
    """Captions that are true of more than their own picture."""


def caption_ceiling(scenes: Sequence[Scene], captions: Sequence[Sequence[Caption]]) -> Ceiling:
    """`captions[i]` are those of `scenes[i]`. Each caption is assumed true of its own scene.

    T2I: with n pictures that a caption is true of, its own is in the top K with probability min(1, K/n). I2T: of the n
    captions true of a picture m are its own; one of these is in the top K with probability 1 − C(n−m, K)/C(n, K).
    """
    truths = _true_pictures(scenes, captions)
    true_of = [0] * len(scenes)
    for pictures in truths:
        for picture in pictures:
            true_of[picture] += 1
    t2i = {cut: _mean([min(1.0, cut / len(pictures)) for pictures in truths]) for cut in CUTS}
    own = [len(texts) for texts in captions]
    i2t = {cut: _mean([_hit(n, m, cut) for n, m in zip(true_of, own, strict=True)]) for cut in CUTS}
    return Ceiling(t2i, i2t, sum(len(pictures) > 1 for pictures in truths))


def _true_pictures(scenes: Sequence[Scene], captions: Sequence[Sequence[Caption]]) -> list[list[int]]:
    """For each caption in order, the pictures it is true of, among those with all its kinds and colours."""
    having: dict[tuple[str, str], set[int]] = defaultdict(set)
    for index, scene in enumerate(scenes):
        for item in scene.objects:
            having[item.kind, item.colour].add(index)
    truths = []
    for texts in captions:
        for caption in texts:
            candidates = set.intersection(*(having[m.kind, m.colour] for m in caption.claim.mentions))
            truths.append([index for index in sorted(candidates) if is_true(caption.claim, scenes[index])])
    return truths


def _hit(n: int, m: int, cut: int) -> float:
    """The chance that at least one of m among n is drawn in `cut` draws."""
    miss = 1.0
    for drawn in range(min(cut, n)):
        miss *= max(n - m - drawn, 0) / (n - drawn)
    return 1 - miss


def _mean(values: Sequence[float]) -> float:
    return 100 * sum(values) / len(values)
