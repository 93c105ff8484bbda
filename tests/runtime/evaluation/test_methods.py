"""The methods of `qpert eval --method` against NumPy from the picture file, and what they share with one another."""

import json
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
from evaluation_sets import SIZE, write_set
from numpy_blip2 import NumpyBlip2, masked, projector
from PIL import Image
from tiny_model import THRESHOLD, tiny_state

from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.errors import InputError
from qpert.runtime.evaluation.evaluate import evaluate
from qpert.runtime.evaluation.inputs import open_data
from qpert.runtime.evaluation.methods.choices import Choices, check_methods, parse_methods
from qpert.runtime.evaluation.methods.compare import compare
from qpert.runtime.evaluation.methods.complement import joint_slots
from qpert.runtime.evaluation.work import Binding, open_work
from qpert.runtime.inputs.perturbation import Perturbation
from qpert.runtime.retrieval.encoder import Encoder

CLOSE = 2e-5
"""Cosines. Float32 graphs against float64: sums of up to 600 addends in a dozen layers, 1e-7 each. A box changes them
by 1e-3 and more, so that a wrong reading is fifty times as far off."""
ALL = ("none", "q-pert", "or-q-pert", "oes")
BOXES = {
    "0000.png": [(2, 3, 31, 22)],
    "0001.png": [(0, 0, 18, 40), (10, 5, 55, 30)],
    "0002.png": [(20.5, 1.25, 47, 33.5), (3, 20, 25, 39), (40, 10, 60, 35)],
    "0004.png": [(1, 1, 6, 6)],
    "0005.png": [(0, 0, 60, 40), (30, 20, 37, 29)],
}
"""Of six pictures of 60×40; 0003.png has none."""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = write_set(tmp_path_factory.mktemp("set") / "set")
    lines = [
        json.dumps({"image": name, **dict(zip(("x1", "y1", "x2", "y2"), box, strict=True))})
        for name, boxes in BOXES.items()
        for box in boxes
    ]
    (root / "boxes.jsonl").write_text("\n".join(lines))
    return root


@pytest.fixture(scope="module")
def data(root):
    return open_data(root, boxes=str(root / "boxes.jsonl"), bin_boxes="entities")


@pytest.fixture(scope="module")
def encoder(export_tiny):
    """The tiny model with boxes in ITC alone, as the paper."""
    encoder = Encoder(Bundle.open(export_tiny(perturbation=Perturbation(threshold=THRESHOLD))), "cpu", threads=1)
    yield encoder
    encoder.close()


@pytest.fixture(scope="module")
def both(tiny_bundle):
    """The tiny model with boxes in ITM too."""
    encoder = Encoder(Bundle.open(tiny_bundle), "cpu", threads=1)
    yield encoder
    encoder.close()


class Oracle:
    """ITC scores of the six pictures by NumPy, from the files."""

    def __init__(self, data, text_embeds):
        self.model = NumpyBlip2(tiny_state(), size=56, patch=14, vision_heads=2, heads=2)
        self.texts = text_embeds.astype(np.float64)
        self.files = data.dataset.images
        self.tokens = [self.model.tokens(file) for file in self.files]
        self.boxes = [BOXES.get(file.name, []) for file in self.files]
        self.margins = []

    def masks(self, image):
        return [masked(box, SIZE, 4) for box in self.boxes[image]]

    def scores(self, queries_of, reduce=np.max):
        """[B, T]: of each picture's sets of queries the best."""
        rows = []
        for image in range(len(self.files)):
            sets = [reduce(queries @ self.texts.T, axis=0) for queries in queries_of(image)]
            rows.append(np.max(sets, axis=0))
        return np.array(rows)

    def projector(self, image, masks, layer, head):
        """Of the masked keys of all `masks` together."""
        keys = self.model.keys(self.tokens[image], layer, head)
        found, margin = projector(np.vstack([mask[:, None] * keys for mask in masks]), THRESHOLD)
        self.margins.append(margin)
        return found

    def stock(self, image):
        return [self.model.queries(self.tokens[image])]

    def complement(self, image, several):
        masks, tokens = self.masks(image), self.tokens[image]

        def without(groups, share):
            def query_map(layer, head):
                return np.eye(16) - share * sum(self.projector(image, group, layer, head) for group in groups)

            return self.model.queries(tokens, query_map)

        if not masks:
            return self.stock(image)
        single = [[mask] for mask in masks]
        if several == "each":
            return [without([group], 1) for group in single]
        groups, share = {"mean": (single, 1 / len(masks)), "sum": (single, 1), "span": ([masks], 1)}[several]
        return [without(groups, share)]

    def objects(self, image, pooling):
        tokens, masks = self.tokens[image], self.masks(image)
        if not masks:
            return self.stock(image)
        if pooling == "crop":
            picture = np.asarray(Image.open(self.files[image]).convert("RGB"))
            corners = [(int(x1), int(y1), -int(-x2 // 1), -int(-y2 // 1)) for x1, y1, x2, y2 in self.boxes[image]]
            seen = [self.model.tokens(picture[y1:y2, x1:x2]) for x1, y1, x2, y2 in corners]
        elif pooling == "mean":
            seen = [(mask / mask.sum() @ tokens)[None] for mask in masks]  # one token
        else:
            first = [0] if pooling == "tokens-and-cls" else []
            seen = [tokens[[*first, *np.flatnonzero(mask)]] for mask in masks]
        return [self.model.queries(one) for one in seen]


@pytest.fixture(scope="module")
def oracle(data, encoder):
    return Oracle(data, encoder.encode_texts(data.dataset.captions))


def itc_of(encoder, data, method, **choices):
    return compare(encoder, data, (method,), Choices(**choices), rerank=0).evaluations[0].scores.itc


# The definitions


@pytest.mark.parametrize("several", ["mean", "sum", "span", "each"])
def test_or_q_pert_removes_the_boxes_key_subspaces(encoder, data, oracle, several):
    oracle.margins.clear()
    expected = oracle.scores(lambda image: oracle.complement(image, several))
    assert min(oracle.margins) > 2e-5, "the graph decides ranks to 1e-5 of the threshold; closer ones compare nothing"
    found = itc_of(encoder, data, "or-q-pert", several_boxes=several)
    np.testing.assert_allclose(found, expected, rtol=0, atol=CLOSE)
    stock = oracle.scores(oracle.stock)
    assert np.abs(expected - stock)[[0, 1, 2, 4, 5]].max(axis=1).min() > 20 * CLOSE, "each box has to matter"
    np.testing.assert_allclose(found[3], stock[3], rtol=0, atol=CLOSE)  # without boxes


def test_readings_of_several_boxes_agree_on_one_box_and_differ_on_more(encoder, data):
    found = [itc_of(encoder, data, "or-q-pert", several_boxes=name) for name in ("mean", "sum", "span", "each")]
    for one in found[1:]:
        np.testing.assert_allclose(one[[0, 3, 4]], found[0][[0, 3, 4]], rtol=0, atol=CLOSE)
        assert np.abs(one - found[0])[[1, 2, 5]].max(axis=1).min() > 20 * CLOSE


@pytest.mark.parametrize("pooling", ["mean", "tokens", "tokens-and-cls", "crop"])
@pytest.mark.parametrize("similarity", ["max", "mean"])
def test_object_embeddings_are_what_the_queries_see_of_the_object(encoder, data, oracle, pooling, similarity):
    reduce = {"max": np.max, "mean": np.mean}[similarity]
    objects = oracle.scores(lambda image: oracle.objects(image, pooling), reduce)
    found = itc_of(encoder, data, "oes", pooling=pooling, similarity=similarity)
    np.testing.assert_allclose(found, oracle.scores(oracle.stock) + objects, rtol=0, atol=2 * CLOSE)


def test_poolings_differ(encoder, data):
    found = [itc_of(encoder, data, "oes", pooling=name) for name in ("mean", "tokens", "tokens-and-cls", "crop")]
    for one in range(4):
        for other in range(one):
            assert np.abs(found[one] - found[other]).max() > 1e-2


def test_the_joint_subspace_is_that_of_one_mask():
    rng = np.random.default_rng(1)
    keys, masks = rng.normal(size=(9, 5)), rng.uniform(0, 1, (3, 9))
    (joint,) = joint_slots(masks[None].astype(np.float32))["object_masks"][0].astype(np.float64)
    stacked = np.vstack([mask[:, None] * keys for mask in masks])
    # Masks are float32, 6e-8 relative, and the sums of 27 products at most 10.
    np.testing.assert_allclose(keys.T @ np.diag(joint**2) @ keys, stacked.T @ stacked, rtol=0, atol=1e-5)


def test_boxes_that_cover_no_token_leave_the_picture_its_own_object(encoder, data, oracle):
    """What a crop of the picture cuts away covers nothing; here coverage is emptied by hand."""
    from qpert.runtime.evaluation.methods.objects import ObjectEncoder

    objects = ObjectEncoder(encoder, Choices())
    objects._masks = lambda boxes: np.zeros((0, 17), np.float32)
    tokens = oracle.tokens[0][None].astype(np.float32)
    found = objects.of_image(tokens, data.boxes[0], data.dataset.images[0])
    np.testing.assert_allclose(found[0], oracle.stock(0)[0], rtol=0, atol=CLOSE)


# Together and alone


@pytest.fixture(scope="module")
def together(encoder, data):
    return compare(encoder, data, ALL, rerank=3)


def test_the_perturbation_among_others_is_the_evaluation_of_today_bit_for_bit(encoder, data, together):
    alone, among = evaluate(encoder, data, rerank=3), together.evaluation("q-pert")
    np.testing.assert_array_equal(among.scores.itc, alone.scores.itc)
    np.testing.assert_array_equal(among.scores.schedule.keys, alone.scores.schedule.keys)
    np.testing.assert_allclose(among.scores.itm, alone.scores.itm, rtol=0, atol=1e-6)  # calls hold other texts
    assert among.metrics == alone.metrics


def test_no_boxes_is_an_evaluation_without_boxes(encoder, data, root, together):
    plain = open_data(root, boxes="none", bin_boxes="entities")
    alone, among = evaluate(encoder, plain, rerank=3), together.evaluation("none")
    np.testing.assert_array_equal(among.scores.itc, alone.scores.itc)
    assert among.metrics == alone.metrics
    assert among.data.boxes_from == "no boxes"


@pytest.mark.parametrize("method", ALL)
def test_a_method_alone_is_what_it_is_among_others(encoder, data, together, method):
    (alone,) = compare(encoder, data, (method,), rerank=3).evaluations
    among = together.evaluation(method)
    np.testing.assert_array_equal(alone.scores.itc, among.scores.itc)
    np.testing.assert_allclose(alone.scores.itm, among.scores.itm, rtol=0, atol=1e-6)
    assert alone.metrics == among.metrics


def test_pairs_that_methods_share_are_matched_once(encoder, data, monkeypatch):
    seen = []
    monkeypatch.setattr(Encoder, "itm_scores", recorder(Encoder.itm_scores, seen))
    found = compare(encoder, data, ALL, rerank=2)
    keys = {key for one in found.evaluations for key in one.scores.schedule.keys.tolist()}
    assert sum(seen) == len(keys) < sum(one.itm_pairs for one in found.evaluations)


def recorder(method, seen):
    def itm_scores(self, features, texts):
        seen.append(len(features) * len(texts))
        return method(self, features, texts)

    return itm_scores


def test_a_pair_scorer_that_takes_boxes_sees_those_of_its_method(both, data):
    found = compare(both, data, ALL, rerank=12)
    itm = {one.method: one.scores.itm for one in found.evaluations}  # every pair of 6 pictures and 12 texts
    np.testing.assert_allclose(itm["q-pert"], evaluate(both, data, rerank=12).scores.itm, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(itm["none"], itm["oes"])
    stronger = Encoder(both.bundle, "cpu", replace(both.perturbation, alpha=-1.0, reduction="mean"), threads=1)
    np.testing.assert_allclose(itm["or-q-pert"], evaluate(stronger, data, rerank=12).scores.itm, rtol=0, atol=1e-6)
    stronger.close()
    assert np.abs(itm["or-q-pert"] - itm["none"]).max() > 1e-3


def test_objects_join_shortlist_and_final_score_or_the_final_score_alone(encoder, data, together):
    none, joined = together.evaluation("none").scores, together.evaluation("oes").scores
    objects = joined.itc - none.itc
    late = compare(encoder, data, ("oes",), Choices(joins="final"), rerank=3).evaluations[0]
    np.testing.assert_array_equal(late.scores.itc, none.itc)
    np.testing.assert_array_equal(late.scores.schedule.by_text, none.schedule.by_text)
    assert late.itc == together.evaluation("none").itc
    texts = np.arange(12)[:, None]
    expected = none.t2i_scores + objects[none.schedule.by_text, texts]
    np.testing.assert_allclose(late.scores.t2i_scores, expected, rtol=0, atol=1e-5)
    itm = joined.itm[joined.schedule.places(joined.schedule.by_text, texts)]
    np.testing.assert_allclose(joined.t2i_scores, itm + joined.itc[joined.schedule.by_text, texts], rtol=0, atol=1e-6)


# Interruption


class Stopping(Encoder):
    """An encoder that is interrupted after so many images of the pair stage."""

    def __init__(self, encoder, after):
        vars(self).update(vars(encoder))
        self.after, self.calls = after, 0

    def itm_scores(self, features, texts):
        self.calls += 1
        if self.calls > self.after:
            raise KeyboardInterrupt
        return super().itm_scores(features, texts)


def test_an_interrupted_comparison_goes_on_and_computes_nothing_twice(encoder, data, together, tmp_path):
    work = open_work(tmp_path / "work", Binding.of(encoder, data, "cpu"))
    with pytest.raises(KeyboardInterrupt):
        compare(Stopping(encoder, 4), data, ALL, rerank=3, work=work)
    second = Stopping(encoder, 99)
    found = compare(second, data, ALL, rerank=3, work=work)
    assert second.calls == 2
    resumed = found.evaluations[0].resumed
    assert {name: resumed[name] for name in ("images", "texts", "images q-pert", "images or-q-pert", "images oes")} == {
        "images": 6,
        "texts": 12,
        "images q-pert": 6,
        "images or-q-pert": 6,
        "images oes": 6,
    }
    for method in ALL:
        np.testing.assert_array_equal(found.evaluation(method).scores.itm, together.evaluation(method).scores.itm)
        assert found.evaluation(method).metrics == together.evaluation(method).metrics


def test_another_choice_in_the_same_work_folder_is_computed_and_not_taken_over(encoder, data, tmp_path):
    work = open_work(tmp_path / "work", Binding.of(encoder, data, "cpu"))
    for several in ("mean", "sum", "mean"):
        found = compare(encoder, data, ("or-q-pert",), Choices(several_boxes=several), rerank=0, work=work)
        np.testing.assert_array_equal(
            found.evaluations[0].scores.itc, itc_of(encoder, data, "or-q-pert", several_boxes=several)
        )


# What cannot be


def test_methods_are_named_once_and_known():
    assert parse_methods(" oes, none") == ("oes", "none")
    for text, code in (
        ("q-part", "method-name"),
        ("", "method-name"),
        (",", "method-name"),
        ("oes,oes", "method-twice"),
    ):
        with pytest.raises(InputError) as caught:
            parse_methods(text)
        assert caught.value.code == code
    with pytest.raises(InputError) as caught:
        Choices(pooling="roi")
    assert caught.value.code == "method-choice"


def test_a_bundle_without_box_inputs_says_which_methods_it_allows(stock_export, data):
    with opened(stock_export.folder) as encoder:
        for methods, choices in ((("q-pert", "none"), {}), (("or-q-pert",), {}), (("oes",), {"pooling": "tokens"})):
            with pytest.raises(InputError) as caught:
                compare(encoder, data, methods, Choices(**choices))
            assert caught.value.code == "method-without-boxes"
        check_methods(encoder.manifest, ("none", "oes"), Choices())
        found = compare(encoder, data, ("none", "oes"), rerank=0)
    assert np.abs(found.evaluation("oes").scores.itc - found.evaluation("none").scores.itc).max() > 0.1


def test_without_export_inputs_object_embeddings_are_those_of_the_perturbed_bundle(stock_export, encoder, data):
    with opened(stock_export.folder) as stock:
        for pooling in ("mean", "crop"):
            found = itc_of(stock, data, "oes", pooling=pooling)
            np.testing.assert_allclose(found, itc_of(encoder, data, "oes", pooling=pooling), rtol=0, atol=CLOSE)


def test_what_would_compare_nothing_is_refused(encoder, both, data, root):
    plain = open_data(root, boxes="none", bin_boxes="entities")
    cases = [
        (encoder, plain, ("none", "oes"), {}, 0, "method-needs-boxes"),
        (encoder, data, ("oes",), {"joins": "final"}, 0, "method-without-reranking"),
        (both, data, ("or-q-pert",), {"several_boxes": "each"}, 0, "perturbation-each-itm"),
    ]
    for one, given, methods, choices, rerank, code in cases:
        with pytest.raises(InputError) as caught:
            compare(one, given, methods, Choices(**choices), rerank=rerank)
        assert caught.value.code == code


def test_selecting_tokens_without_onnx_says_what_to_install(encoder, data, monkeypatch):
    import importlib.util

    from qpert.runtime.errors import UnavailableError

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnx" else find(name))
    with pytest.raises(UnavailableError, match=r"needs onnx.*qpert\[export\].*mean"):
        compare(encoder, data, ("oes",), Choices(pooling="tokens"), rerank=0)


def opened(folder):
    """An encoder that is closed afterwards."""
    return closing(Encoder(Bundle.open(folder), "cpu", threads=1))
