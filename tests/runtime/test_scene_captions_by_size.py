"""Captions that speak of what is large, and those of the smallest object."""

from __future__ import annotations

import pytest

from qpert.runtime.scenes import Salience, describe, describe_large, describe_smallest, sample_scene
from qpert.runtime.scenes.facts import is_true

SCENES = 400
SALIENCE = Salience(half=0.1, steepness=2.0)


@pytest.fixture(scope="module")
def scenes():
    return [sample_scene(f"test captions by size/{index}") for index in range(SCENES)]


def shares_named(scenes, edges, captions_of):
    """The share of captions that name a group, by its area, counted from the claims."""
    named, total = [0] * (len(edges) - 1), [0] * (len(edges) - 1)
    for scene in scenes:
        texts = captions_of(scene)
        for items in scene.groups:
            area = max(scene.area(item) for item in items)
            bin_ = next(index for index, high in enumerate(edges[1:]) if area < high)
            total[bin_] += len(texts)
            for text in texts:
                # colours of a scene's groups differ
                named[bin_] += any(mention.colour == items[0].colour for mention in text.claim.mentions)
    return [one / count for one, count in zip(named, total, strict=True)]


def test_the_chance_of_being_named_is_a_half_at_half_and_rises_with_the_area():
    assert SALIENCE.chance(0.1) == 0.5
    assert SALIENCE.chance(0.3) == pytest.approx(0.9)  # 0.09 / (0.09 + 0.01)
    assert SALIENCE.chance(0.01) == pytest.approx(1 / 101)


def test_small_objects_are_named_as_rarely_as_declared(scenes):
    edges = (0.0, 0.02, 0.06, 0.1, 0.2, 1.01)
    found = shares_named(scenes, edges, lambda scene: describe_large(scene, f"{scene.seed}/large", SALIENCE))
    assert found == sorted(found)
    # The chances at the bins' ends are 0.8 % to 3.8 % and 3.8 % to 26 %; forms that name two or three groups leave some
    # out. 400 scenes have over a hundred objects in each bin, five captions each: a share of 3 % has a standard error
    # of about 0.5 points.
    assert found[0] < 0.06
    assert 0.04 < found[1] < 0.26
    assert found[-1] > 0.95


def test_without_a_bias_small_objects_are_named_as_often_as_large_ones(scenes):
    small, _, large = shares_named(scenes, (0.0, 0.02, 0.2, 1.01), lambda scene: describe(scene, scene.seed))
    assert small > 0.8 * large


def test_the_largest_group_is_in_every_caption_that_lists_or_places(scenes):
    for scene in scenes[:50]:
        largest = max(scene.objects, key=scene.area)
        for caption in describe_large(scene, "x", Salience(half=10.0, steepness=8.0)):  # nothing else is ever named
            assert [mention.colour for mention in caption.claim.mentions] == [largest.colour]


def test_captions_of_the_smallest_group_name_it_alone_and_are_true(scenes):
    for scene in scenes[:100]:
        captions = describe_smallest(scene, f"{scene.seed}/smallest", count=3)
        assert len({caption.text for caption in captions}) == 3
        sizes = [max(map(scene.area, items)) for items in scene.groups]
        smallest = scene.groups[sizes.index(min(sizes))][0]
        for caption in captions:
            (mention,) = caption.claim.mentions
            assert (mention.kind, mention.colour) == (smallest.kind, smallest.colour)
            assert is_true(caption.claim, scene)


def test_captions_of_large_objects_are_true_and_different(scenes):
    for scene in scenes[:100]:
        captions = describe_large(scene, scene.seed, SALIENCE, rounds=2)
        assert len({caption.text for caption in captions}) == len(captions) == 10
        assert all(is_true(caption.claim, scene) for caption in captions)


def test_one_object_alone_is_not_a_plural(scenes):
    texts = [
        caption.text
        for scene in scenes
        for caption in describe_large(scene, scene.seed, Salience(half=10.0, steepness=8.0))
    ]
    openings = [text for text in texts if text.startswith(("There is", "There are"))]
    assert openings
    for text in openings:
        assert text.startswith(("There is a", "There are two", "There are three"))
