"""From images, boxes and texts to features: splitting is exact, limits are said, inputs are checked."""

import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_model import THRESHOLD

from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.errors import (
    BoxError,
    ImageError,
    InputError,
    LimitError,
    QpertWarning,
    TextError,
    UnavailableError,
)
from qpert.runtime.inputs.boxes import Boxes
from qpert.runtime.inputs.perturbation import Perturbation
from qpert.runtime.inputs.text import TokenizedTexts
from qpert.runtime.retrieval.encoder import Encoder, by_length
from qpert.runtime.retrieval.features import ImageFeatures, concatenated
from qpert.runtime.sessions.providers import PROVIDERS, available_providers

# Rows of one float32 graph in batches of another size: sums may be blocked otherwise (verification's neighbour gate).
CLOSE = {"rtol": 0, "atol": 1e-5}


@pytest.fixture(scope="module")
def encoder(tiny_bundle):
    """At most 3 images, 4 boxes, 6 texts of 12 tokens in a call; both stages perturbed."""
    found = Encoder(Bundle.open(tiny_bundle), "cpu")
    yield found
    found.close()


@pytest.fixture(scope="module")
def stock(stock_export):
    """`--perturb none`."""
    found = Encoder(Bundle.open(stock_export.folder), "cpu")
    yield found
    found.close()


def some_boxes(picture, count):
    height, width = picture.shape[:2]
    corners = [(2 * i, i, width / 2 + 2 * i, height / 2 + i) for i in range(count)]
    return Boxes(np.array(corners).reshape(-1, 4), (width, height))


def assert_same(found: ImageFeatures, expected: ImageFeatures):
    np.testing.assert_allclose(found.query_embeds, expected.query_embeds, **CLOSE)
    np.testing.assert_allclose(found.image_embeds, expected.image_embeds, **CLOSE)


def test_more_images_than_one_call_takes_are_split_and_give_the_same(encoder, random_pictures):
    pictures = random_pictures(8)  # 3 + 3 + 2
    boxes = [some_boxes(picture, i % 4) if i % 3 else None for i, picture in enumerate(pictures)]
    together = encoder.encode_images(pictures, boxes)
    assert len(together) == 8
    assert together.query_embeds.dtype == np.float32
    assert together.object_masks.shape == (8, 3, 17)
    for i in range(8):
        assert_same(together.rows([i]), encoder.encode_images(pictures[i : i + 1], boxes[i : i + 1]))


def test_images_with_different_numbers_of_boxes_give_what_each_gives_alone(encoder, random_pictures):
    pictures = random_pictures(3)
    boxes = [some_boxes(pictures[0], 4), None, some_boxes(pictures[2], 1)]
    together = encoder.encode_images(pictures, boxes)
    scores = encoder.itm_scores(together, ["a dog", "a cat on a table"])
    for i in range(3):
        alone = encoder.encode_images(pictures[i : i + 1], boxes[i : i + 1])
        assert_same(together.rows([i]), alone)
        np.testing.assert_allclose(encoder.itm_scores(alone, ["a dog", "a cat on a table"]), scores[i : i + 1], **CLOSE)
    plain = encoder.encode_images(pictures)
    assert np.abs(plain.query_embeds[0] - together.query_embeds[0]).max() > 1e-2
    np.testing.assert_allclose(plain.query_embeds[1], together.query_embeds[1], **CLOSE)


def test_an_empty_set_of_boxes_is_no_boxes(encoder, random_pictures):
    (picture,) = random_pictures(1)
    none = encoder.encode_images([picture], [Boxes.empty((60, 40))])
    np.testing.assert_array_equal(none.query_embeds, encoder.encode_images([picture]).query_embeds)


@given(words=st.lists(st.integers(1, 9), min_size=1, max_size=15))
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_texts_of_any_length_and_number_give_what_each_gives_alone(encoder, words):
    texts = [" ".join(["dog", "red", "a"][(i + k) % 3] for k in range(count)) for i, count in enumerate(words)]
    together = encoder.encode_texts(texts)
    assert together.shape == (len(texts), 16)
    assert together.dtype == np.float32
    alone = np.concatenate([encoder.encode_texts([text]) for text in texts])
    np.testing.assert_allclose(together, alone, **CLOSE)


def test_pair_scores_come_out_in_the_order_of_images_and_texts_however_they_are_batched(encoder, random_pictures):
    features = encoder.encode_images(random_pictures(5))
    texts = [" ".join(["a"] * (1 + 5 * i % 7) + [word]) for i, word in enumerate(["dog", "cat", "boat", "car"] * 2)]
    together = encoder.itm_scores(features, texts)  # 8 texts: 6 + 2 a call, for one image at a time
    assert together.shape == (5, 8)
    assert together.std() > 1e-3, "scores that hardly differ would show nothing"
    for i in range(5):
        for t, text in enumerate(texts):
            np.testing.assert_allclose(encoder.itm_scores(features.rows([i]), [text])[0, 0], together[i, t], **CLOSE)


def test_few_texts_meet_several_images_in_a_call(encoder, random_pictures, monkeypatch):
    features = encoder.encode_images(random_pictures(5))
    session, shapes = encoder.sessions["itm"], []
    real = session.run
    monkeypatch.setattr(session, "run", lambda inputs: shapes.append(inputs["input_ids"].shape[:2]) or real(inputs))
    encoder.itm_scores(features, ["a dog"])
    encoder.itm_scores(features.rows([0, 1]), ["a dog", "a cat", "a car", "a boat"])
    assert shapes == [(3, 1), (2, 1), (1, 4), (1, 4)]


def test_paths_pil_images_and_arrays_of_one_picture_give_the_same(encoder, photos):
    with Image.open(photos[0]) as image:
        array = np.asarray(image.convert("RGB"))
        forms = [photos[0], str(photos[0]), image, array]
        features = [encoder.encode_images([form]).query_embeds for form in forms]
    for other in features[1:]:
        np.testing.assert_array_equal(other, features[0])


def test_more_boxes_than_the_bundle_takes_are_refused_with_the_option(encoder, random_pictures):
    (picture,) = random_pictures(1)
    with pytest.raises(LimitError, match=r"an image has 5 boxes, this bundle takes up to 4; .*larger --max-boxes"):
        encoder.encode_images([picture], [some_boxes(picture, 5)])


def test_boxes_for_another_picture_size_are_refused_and_the_picture_is_named(encoder, random_pictures, photos):
    pictures = random_pictures(5)
    boxes = [None] * 4 + [Boxes([[0, 0, 5, 5]], (500, 400))]
    with pytest.raises(
        BoxError, match="boxes of image 4 are for a picture of 500×400 pixels, it has 52×52; give boxes"
    ):
        encoder.encode_images(pictures, boxes)
    with pytest.raises(BoxError, match=rf"boxes of .*{photos[0].name} are for a picture of 5×5"):
        encoder.encode_images(photos[:1], [Boxes([[0, 0, 5, 5]], (5, 5))])


def test_boxes_are_in_the_pixels_of_the_rotated_picture(encoder, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter: 60×40 in the file is 40×60 to the eye
    Image.new("RGB", (60, 40), "red").save(tmp_path / "r.jpg", exif=exif)
    encoder.encode_images([tmp_path / "r.jpg"], [Boxes([[0, 50, 5, 60]], (40, 60))])
    with pytest.raises(BoxError, match=r"it has 40×60; give boxes in the picture's own pixels \(after EXIF rotation\)"):
        encoder.encode_images([tmp_path / "r.jpg"], [Boxes([[0, 0, 5, 5]], (60, 40))])


def test_boxes_for_a_bundle_without_perturbation_are_refused(stock, random_pictures):
    (picture,) = random_pictures(1)
    with pytest.raises(InputError) as caught:
        stock.encode_images([picture], [some_boxes(picture, 1)])
    assert caught.value.code == "bundle-without-boxes"
    features = stock.encode_images([picture], [None])
    assert features.object_masks is None
    assert stock.itm_scores(features, ["a dog"]).shape == (1, 1)


def test_without_boxes_a_perturbed_bundle_gives_what_a_stock_one_gives(encoder, stock, random_pictures):
    pictures = random_pictures(2)
    perturbed, plain = encoder.encode_images(pictures), stock.encode_images(pictures)
    assert_same(perturbed, plain)
    texts = ["a dog", "two red boats"]
    np.testing.assert_allclose(encoder.itm_scores(perturbed, texts), stock.itm_scores(plain, texts), **CLOSE)


@pytest.mark.parametrize("boxes", [[], [None], [None] * 3])
def test_boxes_for_another_number_of_images_are_refused(encoder, random_pictures, boxes):
    with pytest.raises(InputError, match=f"got boxes for {len(boxes)} images and 2 images"):
        encoder.encode_images(random_pictures(2), boxes)


def test_one_boxes_object_is_not_a_sequence_of_them(encoder, random_pictures):
    (picture,) = random_pictures(1)
    with pytest.raises(InputError, match=r"boxes is one Boxes; .*put it in a list"):
        encoder.encode_images([picture], some_boxes(picture, 1))


@pytest.mark.parametrize("one", ["a.jpg", Path("a.jpg"), np.zeros((4, 4, 3), np.uint8), Image.new("RGB", (4, 4))])
def test_one_image_is_not_a_sequence_of_images(encoder, one):
    with pytest.raises(ImageError, match=r"images is one (str|PosixPath|NumPy array .*|Image); .*put it in a list"):
        encoder.encode_images(one)


def test_a_picture_that_cannot_be_read_is_named_by_its_place_in_the_whole_call(encoder, random_pictures):
    pictures = [*random_pictures(4), np.zeros((4, 4), np.uint8)]  # in the second chunk of three
    with pytest.raises(ImageError, match=r"image 4 is uint8 \[4, 4\]"):
        encoder.encode_images(pictures)


def test_no_images_and_no_texts_are_errors(encoder, random_pictures):
    with pytest.raises(InputError, match="got no images"):
        encoder.encode_images([])
    with pytest.raises(InputError, match="got no texts"):
        encoder.encode_texts([])
    with pytest.raises(InputError, match="got no texts"):
        encoder.itm_scores(encoder.encode_images(random_pictures(1)), [])


@pytest.mark.parametrize("text", ["", "  "])
def test_an_empty_text_is_an_error_that_names_it(encoder, random_pictures, text):
    with pytest.raises(TextError, match=r"text 1 is .*leaves nothing"):
        encoder.encode_texts(["a dog", text])
    with pytest.raises(TextError, match=r"text 0 is .*leaves nothing"):
        encoder.itm_scores(encoder.encode_images(random_pictures(1)), [text])


def test_a_text_that_is_too_long_is_cut_and_that_is_said_once(tiny_bundle):
    encoder = Encoder(Bundle.open(tiny_bundle), "cpu")
    long = "dog " * 30
    with pytest.warns(QpertWarning, match="1 of 2 texts are longer than the limit of 12 tokens"):
        cut = encoder.encode_texts([long, "a dog"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.encode_texts([long])
        np.testing.assert_allclose(cut[:1], encoder.encode_texts(["dog " * 10]), **CLOSE)  # 12 less [CLS] and [SEP]


def test_features_without_masks_are_refused_where_itm_is_perturbed(encoder, stock, random_pictures):
    with pytest.raises(InputError, match="perturbs ITM too, and the features hold no masks"):
        encoder.itm_scores(stock.encode_images(random_pictures(1)), ["a dog"])


@pytest.mark.parametrize(
    "change", [{"threshold": 0.5}, {"stages": "itc"}, {"preserve_norm": True}, {"centre_keys": True}]
)
def test_a_setting_that_lies_in_the_graphs_cannot_be_changed_at_opening(tiny_bundle, change):
    settings = {"stages": "both", "threshold": THRESHOLD} | change
    with pytest.raises(
        InputError, match=rf"perturbation {next(iter(change))} is .*, this bundle's graphs were exported"
    ):
        Encoder(Bundle.open(tiny_bundle), "cpu", Perturbation(**settings))


def test_a_setting_of_the_host_can_be_changed_at_opening(tiny_bundle, encoder, random_pictures):
    (picture,) = random_pictures(1)
    boxes = [some_boxes(picture, 2)]
    weak = Encoder(Bundle.open(tiny_bundle), "cpu", Perturbation(stages="both", threshold=THRESHOLD, alpha=0.0))
    np.testing.assert_allclose(
        weak.encode_images([picture], boxes).query_embeds, encoder.encode_images([picture]).query_embeds, **CLOSE
    )
    assert weak.encode_images([picture], boxes).box_weights.tolist() == [[0, 0]]
    assert encoder.encode_images([picture], boxes).box_weights.tolist() == [[8, 8]]


def test_a_provider_that_is_not_here_is_an_error(tiny_bundle):
    absent = next(name for name in PROVIDERS if name not in available_providers())
    with pytest.raises(UnavailableError, match=f"provider '{absent}' was asked for"):
        Encoder(Bundle.open(tiny_bundle), absent)


def test_half_precision_features_stay_half(half_bundle, random_pictures):
    encoder = Encoder(Bundle.open(half_bundle), "cpu")
    features = encoder.encode_images(random_pictures(4))
    assert (features.image_embeds.dtype, features.query_embeds.dtype) == (np.float16, np.float32)
    scores = encoder.itm_scores(features, ["a dog"])
    assert scores.dtype == np.float32
    assert np.isfinite(scores).all()


@given(st.lists(st.tuples(st.integers(1, 3), st.one_of(st.none(), st.integers(0, 3))), min_size=1, max_size=4))
def test_parts_are_joined_in_order_and_masks_padded_with_nothing(shapes):
    masked = shapes[0][1] is not None
    parts, number = [], 0
    for rows, boxes in shapes:
        boxes = (boxes or 0) if masked else None
        values = np.arange(number, number + rows, dtype=np.float32)[:, None, None]
        number += rows
        masks = None if boxes is None else np.ones((rows, boxes, 5), np.float32) * values
        weights = None if boxes is None else np.ones((rows, boxes), np.float32)
        parts.append(ImageFeatures(values, values * 2, masks, weights))
    whole = concatenated(parts)
    np.testing.assert_array_equal(whole.query_embeds[:, 0, 0], np.arange(number))
    np.testing.assert_array_equal(whole.image_embeds[:, 0, 0], 2 * np.arange(number))
    if not masked:
        assert whole.object_masks is None
        return
    counts = [boxes or 0 for rows, boxes in shapes for _ in range(rows)]
    np.testing.assert_array_equal(whole.box_weights.sum(axis=1), counts)
    np.testing.assert_array_equal(whole.object_masks.sum(axis=(1, 2)), [5 * n * i for i, n in enumerate(counts)])


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=20), most=st.integers(1, 7))
def test_batches_of_texts_hold_every_text_once_the_shortest_first(lengths, most):
    mask = (np.arange(9) < np.array(lengths)[:, None]).astype(np.int64)
    batches = list(by_length(TokenizedTexts(mask, mask), most))
    order = np.concatenate(batches)
    assert sorted(order) == list(range(len(lengths)))
    assert all(len(batch) <= most for batch in batches)
    assert [lengths[i] for i in order] == sorted(lengths)
