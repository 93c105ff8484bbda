"""Reduction `each`: a query set for every box, and what follows from their number differing between images."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.bundle.roles import IMAGE_TOKENS, IMAGE_VECTORS, QUERY_HEAD
from qpert.runtime.errors import InputError
from qpert.runtime.inputs.boxes import Boxes
from qpert.runtime.inputs.perturbation import Perturbation
from qpert.runtime.retrieval.encoder import Encoder, calls
from qpert.runtime.retrieval.query_sets import NO_BOX, QuerySets
from qpert.runtime.retrieval.scores import itc_scores
from qpert.runtime.retriever import Gallery, Retriever

# Rows of one float32 graph in batches of another size: sums may be blocked otherwise (verification's neighbour gate).
CLOSE = {"rtol": 0, "atol": 1e-5}
COUNTS = (0, 1, 5, 12)
"""Boxes of the pictures. A call of the demonstration takes 8 images: 12 sets need two."""


@pytest.fixture(scope="module")
def bundle(demo_bundle):
    return Bundle.open(demo_bundle)


@pytest.fixture(scope="module")
def pictures(random_pictures):
    return random_pictures(len(COUNTS))


@pytest.fixture(scope="module")
def boxes(pictures):
    found = []
    for picture, count in zip(pictures, COUNTS, strict=True):
        height, width = picture.shape[:2]
        corners = [(2 * i, i, 2 * i + width / 3, i + height / 2) for i in range(count)]
        found.append(Boxes(np.array(corners).reshape(-1, 4), (width, height)) if count else None)
    return found


def opened(bundle, **settings):
    return Encoder(bundle, "cpu", Perturbation(**settings), threads=1)


@pytest.fixture(scope="module")
def alone(bundle, pictures, boxes):
    """The queries of every box by itself, and the stock queries: from calls that know nothing of `each`."""
    encoder = opened(bundle, alpha=4.0)
    stock = encoder.encode_images(pictures).query_embeds
    own = [
        [
            encoder.encode_images([picture], [Boxes(one.xyxy[i : i + 1], one.size)]).query_embeds[0]
            for i in range(len(one or ()))
        ]
        for picture, one in zip(pictures, boxes, strict=True)
    ]
    encoder.close()
    return stock, own


@pytest.mark.parametrize("keep_stock", [False, True])
def test_each_box_perturbs_a_set_of_its_own_and_no_other(keep_stock, bundle, pictures, boxes, alone):
    encoder = opened(bundle, alpha=4.0, reduction="each", keep_stock=keep_stock)
    sets = encoder.encode_images(pictures, boxes).query_sets
    encoder.close()
    stock, own = alone
    expected = [[*([stock[image]] if keep_stock or not found else []), *found] for image, found in enumerate(own)]
    assert sets.counts.tolist() == [len(found) for found in expected]
    np.testing.assert_allclose(sets.vectors, np.concatenate(expected), **CLOSE)
    numbers = [[*([NO_BOX] if keep_stock or not found else []), *range(len(found))] for found in own]
    assert sets.boxes.tolist() == [number for found in numbers for number in found]
    assert np.abs(sets.vectors[-1] - stock[-1]).max() > 1e-2, "a box that changes nothing would show nothing"


def test_the_score_is_the_best_of_all_sets_and_the_box_is_the_one_that_reaches_it(bundle, pictures, boxes, alone):
    encoder = opened(bundle, alpha=4.0, reduction="each", keep_stock=True)
    features = encoder.encode_images(pictures, boxes)
    texts = encoder.encode_texts(["a red star", "a small blue ring", "a green heart"])
    encoder.close()
    scores = features.query_sets.itc_scores(texts)
    np.testing.assert_allclose(itc_scores(features.query_embeds, texts), scores, **CLOSE)  # the padded form
    stock, own = alone
    for image, found in enumerate(own):
        by_set = np.array([(queries @ texts.T).max(axis=0) for queries in [stock[image], *found]])  # [sets, T]
        np.testing.assert_allclose(scores[image], by_set.max(axis=0), **CLOSE)
        for text, best in enumerate(by_set.argmax(axis=0)):
            assert features.query_sets.matched_box(image, texts[text]) == (None if best == 0 else best - 1)


def test_hits_say_which_box_matched(bundle, pictures, boxes):
    with Retriever(opened(bundle, alpha=4.0, reduction="each")) as retriever:
        names = [f"picture {i}" for i in range(len(pictures))]
        gallery = Gallery(tuple(names), retriever.encode_images(pictures, boxes), tuple(boxes))
        hits = retriever.search("a red star", gallery, rerank=2)
        embed = retriever.encode_texts(["a red star"])[0]
        assert {hit.image for hit in hits} == set(names)
        for hit in hits:
            image = names.index(hit.image)
            if boxes[image] is None:
                assert hit.box is None
                continue
            rows = gallery.features.query_sets.of([image]).vectors
            best = int((rows @ embed).max(axis=1).argmax())
            assert hit.box.index == best
            assert hit.box.xyxy == tuple(boxes[image].xyxy[best])
        (text,) = retriever.search_texts(pictures[2], ["a red star"], boxes=boxes[2], rerank=0)
        assert text.box.index == next(hit.box.index for hit in hits if hit.image == names[2])


def test_a_sum_names_no_box(bundle, pictures, boxes):
    with Retriever(opened(bundle)) as retriever:
        gallery = Gallery(tuple("abcd"), retriever.encode_images(pictures, boxes), tuple(boxes))
        assert all(hit.box is None for hit in retriever.search("a red star", gallery, rerank=0))


@pytest.mark.parametrize(
    ("settings", "code"),
    [
        ({"reduction": "each", "stages": "both"}, "perturbation-each-itm"),
        ({"keep_stock": True}, "perturbation-keep-stock"),
        ({"reduction": "each", "keep_stock": 1}, "perturbation-switch"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(settings, code):
    with pytest.raises(InputError) as error:
        Perturbation(**settings)
    assert error.value.code == code


@given(counts=st.lists(st.integers(1, 20), max_size=12), most=st.integers(1, 9), alone=st.booleans())
def test_calls_hold_every_row_once_and_split_no_image_that_fits(counts, most, alone):
    found = list(calls(counts, most, alone=alone))
    owners = np.repeat(np.arange(len(counts)), counts)
    assert not alone or all(len(set(owners[part])) == 1 for part in found)
    rows = [row for part in found for row in range(part.start, part.stop)]
    assert rows == list(range(sum(counts)))
    assert all(1 <= part.stop - part.start <= most for part in found)
    starts = np.cumsum([0, *counts])[:-1]
    for start, count in zip(starts, counts, strict=True):
        touched = sum(part.start < start + count and part.stop > start for part in found)
        assert touched == 1 if count <= most and not split_before(counts, most, start) else touched >= 1


def split_before(counts, most, start):
    """Whether the rows right before `start` are the rest of an image too large for one call."""
    end = 0
    for count in counts:
        if end + count == start:
            return count > most
        end += count
    return False


@given(data=st.data())
def test_any_selection_of_images_keeps_their_sets_together(data):
    counts = np.array(data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=6)))
    vectors = np.arange(counts.sum() * 2, dtype=np.float32).reshape(-1, 1, 2)
    sets = QuerySets(vectors, counts, np.arange(counts.sum()))
    wanted = data.draw(st.lists(st.integers(0, len(counts) - 1), max_size=6))
    found = sets.of(np.array(wanted, np.int64))
    ends = np.cumsum(counts)
    expected = [row for image in wanted for row in range(ends[image] - counts[image], ends[image])]
    assert found.boxes.tolist() == expected
    np.testing.assert_array_equal(found.vectors, vectors[expected])
    assert len(found) == len(wanted)


def test_one_row_of_image_tokens_serves_all_boxes_as_copies_of_it_do(bundle, pictures, boxes):
    encoder = opened(bundle)
    tokens = encoder.encode_images(pictures[:1]).image_embeds
    objects = encoder.box_slots(boxes[1:])  # three pictures' boxes on the tokens of another one
    head = encoder.graph(QUERY_HEAD)
    assert head.spec.input(IMAGE_TOKENS).shared
    found = head.run({IMAGE_TOKENS: tokens, **objects})[IMAGE_VECTORS]
    expected = head.run({IMAGE_TOKENS: np.repeat(tokens, 3, axis=0), **objects})[IMAGE_VECTORS]
    np.testing.assert_allclose(found, expected, **CLOSE)
    with pytest.raises(InputError) as error:
        head.run({IMAGE_TOKENS: np.repeat(tokens, 2, axis=0), **objects})
    assert error.value.code == "graph-input-shape"
    encoder.close()


@pytest.mark.parametrize("keep_stock", [False, True])
def test_a_graph_that_shares_nothing_gives_the_same_sets(keep_stock, bundle, pictures, boxes, monkeypatch):
    """As bundles from before do, and engines."""
    encoder = opened(bundle, alpha=4.0, reduction="each", keep_stock=keep_stock)
    shared = encoder.encode_images(pictures, boxes).query_sets
    monkeypatch.setattr("qpert.runtime.retrieval.encoder.SHARING", ())
    repeated = encoder.encode_images(pictures, boxes).query_sets
    encoder.close()
    np.testing.assert_allclose(repeated.vectors, shared.vectors, **CLOSE)
    assert repeated.boxes.tolist() == shared.boxes.tolist()
