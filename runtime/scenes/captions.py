"""Captions of scenes in everyday English, each with the facts that it states and the phrases that name boxes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice

from qpert.runtime.scenes.facts import Claim, Mention, Relation, cell_of, relation_between, size_word_class
from qpert.runtime.scenes.objects import BACKGROUNDS, KINDS, TEXTURES, Dice
from qpert.runtime.scenes.scene import Scene

COUNTS = {2: "two", 3: "three"}
SIZE_WORDS = {"tiny": ("tiny",), "small": ("small", "little"), "big": ("big", "large"), "huge": ("huge", "giant")}
CELL_PHRASES = {
    "upper left": ("in the upper left corner", "at the top left"),
    "upper": ("at the top", "near the top"),
    "upper right": ("in the upper right corner", "at the top right"),
    "left": ("on the left", "on the left side"),
    "middle": ("in the middle", "in the center"),
    "right": ("on the right", "on the right side"),
    "lower left": ("in the lower left corner", "at the bottom left"),
    "lower": ("at the bottom", "near the bottom"),
    "lower right": ("in the lower right corner", "at the bottom right"),
}
RELATION_PHRASES = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
    "in front of": ("in front of", "partly covering"),
}
TEXTURE_VISIBLE = 36
"""Pixels: the shorter side from which captions mention an object's texture."""
MOST_WORDS = 33
"""Including commas: the most that fit into the 35 tokens of a text."""
SMALL = 0.05
"""Largest box area over picture area of an object that has a caption of its own."""


@dataclass(frozen=True)
class Salience:
    """How likely a caption speaks of an object, by its size: people name what is large.

    An object whose box takes the share a of the picture is named with probability aᵏ / (aᵏ + hᵏ), where h is `half`
    and k is `steepness`: one half at a = h. The largest group of a scene is always named.
    """

    half: float = 0.1
    steepness: float = 2.0

    def chance(self, area: float) -> float:
        """Of being named, for a box area in shares of the picture's."""
        return area**self.steepness / (area**self.steepness + self.half**self.steepness)


@dataclass(frozen=True)
class Phrase:
    """Words that name a chain of the Entities annotation: a group of objects, or the background (`group` −1)."""

    words: str
    group: int


@dataclass(frozen=True)
class Caption:
    """One sentence: words and phrases in order, and its claim about a scene."""

    pieces: tuple[str | Phrase, ...]
    claim: Claim

    @property
    def text(self) -> str:
        """The sentence in normal spelling: a capital first, a full stop last, no space before a comma."""
        words = " ".join(piece if isinstance(piece, str) else piece.words for piece in self.pieces)
        words = words.replace(" ,", ",")
        return f"{words[0].upper()}{words[1:]}."


class Narrator:
    """Describes one scene; every call draws new words, and with `salience` also which groups it may speak of."""

    def __init__(self, scene: Scene, dice: Dice, salience: Salience | None = None) -> None:
        self.scene = scene
        self.dice = dice
        self.salience = salience

    def _nameable(self) -> list[int]:
        """The groups that a caption may name. A group is as large as its largest member."""
        areas = [max(map(self.scene.area, items)) for items in self.scene.groups]
        if self.salience is None:
            return list(range(len(areas)))
        largest = areas.index(max(areas))
        named = [self.dice.chance(self.salience.chance(area)) for area in areas]
        return [group for group, chosen in enumerate(named) if chosen or group == largest]

    def everything(self) -> Caption:
        """Up to four groups and the background."""
        groups = self.dice.shuffled(self._nameable())[:4]
        named = [self._named(group, sized=len(groups) < 3) for group in groups]
        # without salience as ever: the published test captions stay what they are
        alone = self.salience is not None and len(named) == 1 and named[0][1].count == 1
        pieces = self._opening(alone=alone) + _listed([phrase for phrase, _ in named]) + self._place()
        return Caption(pieces, Claim(tuple(mention for _, mention in named), (), self.scene.background))

    def places(self) -> Caption:
        """Two or three groups, single objects with their position."""
        groups = self.dice.shuffled(self._nameable())[:3]
        pieces: list[str | Phrase] = []
        mentions = []
        for index, group in enumerate(groups):
            phrase, mention = self._named(group, placed=True)
            where = (self.dice.pick(CELL_PHRASES[mention.cell]),) if mention.cell else ()
            if index:
                pieces += [","] if index < len(groups) - 1 else ["and"]
            pieces += [phrase, *where]
            mentions.append(mention)
        placed = self.dice.chance(0.6)
        return Caption((*pieces, *(self._place() if placed else ())), self._claim(mentions, placed=placed))

    def relation(self) -> Caption:
        """Two related groups, often with a third; `places` if no two are related."""
        nameable = self._nameable()
        single = [(group, self.scene.groups[group][0]) for group in nameable if len(self.scene.groups[group]) == 1]
        pairs = [
            (a, b, found)
            for a, first in single
            for b, second in single
            if a != b and (found := relation_between(self.scene, first, second))
        ]
        if not pairs:
            return self.places()
        a, b, found = self.dice.pick(pairs)
        named = [self._named(a, sized=True), self._named(b)]
        verb = self.dice.pick(("is", "", "")) if found != "in front of" else ""
        pieces: list[str | Phrase] = [named[0][0], *([verb] if verb else []), self.dice.pick(RELATION_PHRASES[found])]
        pieces.append(named[1][0])
        others = [group for group in nameable if group not in (a, b)]
        if others and self.dice.chance(0.65):
            named.append(self._named(self.dice.pick(others)))
            pieces += [self.dice.pick(("and", "with", "beside")), named[2][0]]
        placed = self.dice.chance(0.65)
        claim = self._claim([mention for _, mention in named], placed=placed, relations=(Relation(0, found, 1),))
        return Caption((*pieces, *(self._place() if placed else ())), claim)

    def small_one(self) -> Caption:
        """One small object alone, with its position; `everything` if there is no small one."""
        small = [
            group
            for group, items in enumerate(self.scene.groups)
            if len(items) == 1 and self.scene.area(items[0]) <= SMALL
        ]
        if not small:
            return self.everything()
        phrase, mention = self._named(self.dice.pick(small), sized=True, placed=True)
        start = self.dice.pick(((), ("there is",), ("you can see",)))
        pieces = (*start, phrase, self.dice.pick(CELL_PHRASES[mention.cell or "middle"]), *self._place())
        return Caption(pieces, self._claim([mention], placed=True))

    def smallest(self) -> Caption:
        """The smallest group alone, with its position if it is a single object, and the background."""
        group = min(range(len(self.scene.groups)), key=lambda one: max(map(self.scene.area, self.scene.groups[one])))
        phrase, mention = self._named(group, sized=True, placed=True)
        where = (self.dice.pick(CELL_PHRASES[mention.cell]),) if mention.cell else ()
        pieces = (*self.dice.pick(((), ("there is",), ("you can see",))), phrase, *where, *self._place())
        return Caption(pieces, self._claim([mention], placed=True))

    def _claim(self, mentions: list[Mention], *, placed: bool, relations: tuple[Relation, ...] = ()) -> Claim:
        return Claim(tuple(mentions), relations, self.scene.background if placed else None)

    def _named(self, group: int, *, sized: bool = False, placed: bool = False) -> tuple[Phrase, Mention]:
        """A noun phrase for a group, and what it mentions."""
        items = self.scene.groups[group]
        first = items[0]
        size = size_word_class(self.scene.area(first)) if sized and self.dice.chance(0.75) else None
        seen = min(first.place[2:]) >= TEXTURE_VISIBLE and first.texture != "plain"
        texture = first.texture if seen and self.dice.chance(0.85) else None
        cell = cell_of(self.scene, first) if placed and len(items) == 1 else None
        mention = Mention(first.kind, first.colour, len(items), texture, size, cell)
        return Phrase(self._noun_phrase(mention), group), mention

    def _noun_phrase(self, mention: Mention) -> str:
        adjectives, nouns = TEXTURES[mention.texture or "plain"]
        size = [self.dice.pick(SIZE_WORDS[mention.size])] if mention.size else []
        trailing = ""
        if mention.texture and self.dice.chance(0.3):
            words, trailing = [*size, mention.colour], f" with {self.dice.pick(nouns)}"
        elif mention.texture and self.dice.chance(0.6):
            words = [*size, mention.colour, self.dice.pick(adjectives)]
        else:
            words = [*size, *([self.dice.pick(adjectives)] if mention.texture else []), mention.colour]
        words.append(self.dice.pick(KINDS[mention.kind].nouns)[mention.count > 1])
        article = COUNTS.get(mention.count) or ("an" if words[0][0] in "aeiou" else "a")
        return " ".join([article, *words]) + trailing

    def _opening(self, *, alone: bool) -> tuple[str, ...]:
        start = "there is" if alone else "there are"
        return self.dice.pick(((), (), (), (start,), ("a picture of",), ("we see",)))

    def _place(self) -> tuple[str | Phrase, ...]:
        preposition, words = self.dice.pick(BACKGROUNDS[self.scene.background].phrases)
        return preposition, Phrase(words, -1)


def describe(scene: Scene, seed: str, *, rounds: int = 1) -> tuple[Caption, ...]:
    """Five different captions (times `rounds`), in random order. The seed decides the words only.

    One is of everything, one of places, two of a relation and one of a small object; other kinds replace those that a
    scene does not allow.
    """
    narrator = Narrator(scene, Dice(seed))
    captions: dict[str, Caption] = {}
    forms = (narrator.everything, narrator.relation, narrator.places, narrator.small_one, narrator.relation)
    for make in forms * rounds:
        caption = make()
        for _ in range(8):
            if caption.text not in captions and len(caption.text.replace(",", " ,").split()) <= MOST_WORDS:
                break
            caption = narrator.everything()
        captions.setdefault(caption.text, caption)
    while len(captions) < 5 * rounds:  # a scene with one object has few descriptions
        caption = narrator.places()
        captions.setdefault(caption.text, caption)
    return tuple(narrator.dice.shuffled(list(captions.values())))


def describe_large(scene: Scene, seed: str, salience: Salience, *, rounds: int = 1) -> tuple[Caption, ...]:
    """Five different captions (times `rounds`) that speak of what is large; see `Salience`."""
    narrator = Narrator(scene, Dice(seed), salience)
    forms = (narrator.everything, narrator.relation, narrator.places, narrator.everything, narrator.relation)
    return _different(narrator, forms * rounds, 5 * rounds)


def describe_smallest(scene: Scene, seed: str, *, count: int = 2) -> tuple[Caption, ...]:
    """`count` different captions that name the scene's smallest group and nothing else but the background."""
    narrator = Narrator(scene, Dice(seed))
    return _different(narrator, (narrator.smallest,), count)


def _different(narrator: Narrator, forms: Sequence[Callable[[], Caption]], count: int) -> tuple[Caption, ...]:
    """The first `count` captions of different words that fit, the forms taken in turn."""
    captions: dict[str, Caption] = {}
    for make in islice(cycle(forms), 100 * count):
        caption = make()
        if len(caption.text.replace(",", " ,").split()) <= MOST_WORDS:
            captions.setdefault(caption.text, caption)
        if len(captions) == count:
            return tuple(narrator.dice.shuffled(list(captions.values())))
    raise RuntimeError(f"the scene of the seed {narrator.scene.seed!r} has fewer than {count} descriptions")


def _listed(phrases: list[Phrase]) -> tuple[str | Phrase, ...]:
    """A, B and C."""
    pieces: list[str | Phrase] = [phrases[0]]
    for index, phrase in enumerate(phrases[1:], start=1):
        pieces += ["and" if index == len(phrases) - 1 else ",", phrase]
    return tuple(pieces)
