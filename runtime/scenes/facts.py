"""What a caption claims, and whether a scene makes it true. One definition for captions, ceiling and tests.

Sizes, cells and relations have sharp limits, so that each word has one meaning: an object of 4 % is small and one of
1.5 % is tiny.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from qpert.runtime.scenes.scene import Scene, SceneObject

APART = 0.15
"""Two objects are left/right of or above/below each other if their centres are this far apart (in shares of the
picture's side) along that axis, and farther than along the other."""


@dataclass(frozen=True)
class Mention:
    """A named group: `count` objects of this kind and colour. None leaves a property open."""

    kind: str
    colour: str
    count: int = 1
    texture: str | None = None
    size: str | None = None
    cell: str | None = None


@dataclass(frozen=True)
class Relation:
    """Mention `first` has the relation `name` to mention `second` (indices into the claim's mentions)."""

    first: int
    name: str
    second: int


@dataclass(frozen=True)
class Claim:
    """Everything that a caption states."""

    mentions: tuple[Mention, ...]
    relations: tuple[Relation, ...]
    background: str | None


def size_word_class(area: float) -> str | None:
    """tiny < 2 % ≤ small < 6 % ≤ (no word) < 25 % ≤ big < 60 % ≤ huge, of the picture's area."""
    for word, limit in (("tiny", 0.02), ("small", 0.06), (None, 0.25), ("big", 0.6)):
        if area < limit:
            return word
    return "huge"


def cell_of(scene: Scene, item: SceneObject) -> str:
    """Which of 3×3 equal cells contains the centre of its box."""
    x, y = scene.centre(item)
    row = ("upper", "", "lower")[min(int(y * 3), 2)]
    column = ("left", "", "right")[min(int(x * 3), 2)]
    return f"{row} {column}".strip() or "middle"


def relation_between(scene: Scene, first: SceneObject, second: SceneObject) -> str | None:
    """left of, right of, above, below by their centres; in front of, where the centres are close and it is in front."""
    (x1, y1), (x2, y2) = scene.centre(first), scene.centre(second)
    across, down = x1 - x2, y1 - y2
    if abs(across) >= max(APART, abs(down)):
        return "left of" if across < 0 else "right of"
    if abs(down) >= APART:
        return "above" if down < 0 else "below"
    return "in front of" if scene.objects.index(first) > scene.objects.index(second) else None


def is_true(claim: Claim, scene: Scene) -> bool:
    """Whether the mentions can be assigned to different groups of the scene so that the whole claim holds."""
    if claim.background is not None and claim.background != scene.background:
        return False
    return any(_relations_hold(claim, scene, groups) for groups in _assignments(claim, scene, ()))


def _assignments(claim: Claim, scene: Scene, chosen: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    if len(chosen) == len(claim.mentions):
        yield chosen
        return
    mention = claim.mentions[len(chosen)]
    for group, items in enumerate(scene.groups):
        if group not in chosen and _fits(mention, scene, items):
            yield from _assignments(claim, scene, (*chosen, group))


def _fits(mention: Mention, scene: Scene, items: tuple[SceneObject, ...]) -> bool:
    """ "A red star" is also true of two red stars; "two red stars" is not true of three."""
    first = items[0]
    if (first.kind, first.colour) != (mention.kind, mention.colour):
        return False
    if mention.count > 1 and mention.count != len(items):
        return False
    if mention.texture is not None and mention.texture != first.texture:
        return False
    if mention.size is not None and mention.size != size_word_class(scene.area(first)):
        return False
    return mention.cell is None or mention.cell in [cell_of(scene, item) for item in items]


def _relations_hold(claim: Claim, scene: Scene, groups: tuple[int, ...]) -> bool:
    def between(relation: Relation) -> bool:
        return any(
            relation_between(scene, first, second) == relation.name
            for first in scene.groups[groups[relation.first]]
            for second in scene.groups[groups[relation.second]]
        )

    return all(between(relation) for relation in claim.relations)
