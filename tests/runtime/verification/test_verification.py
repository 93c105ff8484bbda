"""The gates: what passes, and which gate catches which fault."""

import json
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.bundle.graph_spec import AxisRange, GraphSpec, TensorSpec
from qpert.runtime.bundle.roles import TEXT_TOWER
from qpert.runtime.bundle.samples import Case
from qpert.runtime.cli.verify import verify
from qpert.runtime.errors import BundleError
from qpert.runtime.progress import Silent
from qpert.runtime.retrieval.encoder import Encoder
from qpert.runtime.verification import (
    Gate,
    compare,
    cosine_distance,
    select,
    selections,
    verify_tensors,
)


@pytest.fixture(scope="module")
def samples(tiny_bundle):
    return Bundle.open(tiny_bundle).samples()


@pytest.fixture
def encoder(tiny_bundle):
    found = Encoder(Bundle.open(tiny_bundle), "cpu")
    yield found
    found.close()


@dataclass
class Faulty:
    """A session with a fault: `before` changes the inputs, `after` the outputs (and sees the inputs)."""

    session: Any
    before: Any = None
    after: Any = None

    @property
    def spec(self):
        return self.session.spec

    def run(self, inputs):
        inputs = dict(inputs)
        if self.before:
            inputs |= self.before(inputs)
        (output,) = self.spec.output_names
        result = self.session.run(inputs)[output]
        return {output: self.after(result, inputs) if self.after else result}

    def close(self):
        self.session.close()


def verified(encoder, samples, cases=None):
    chosen = samples.cases if cases is None else cases
    return verify_tensors(encoder, chosen, samples, reference="recorded", provider="cpu")


def failed_gates(verification):
    return [gate.name for gate in verification.gates if not gate.passed]


def with_fault(encoder, samples, graph, **fault):
    encoder.sessions[graph] = Faulty(encoder.sessions[graph], **fault)
    verification = verified(encoder, samples)
    assert verification.verdict == ("fail" if failed_gates(verification) else "pass")
    return verification


# A bundle as it was exported


def test_a_sound_bundle_passes_every_gate_within_the_promised_limits(encoder, samples):
    verification = verified(encoder, samples)
    assert verification.verdict == "pass", failed_gates(verification)
    limits = {gate.name: gate.limit for gate in verification.gates}
    for graph in ("vision", "image_query", "text", "itm"):
        assert limits[f"{graph}: values not finite"] == 0
        assert limits[f"{graph}: rows independent of neighbours"] <= 1e-5
    assert limits["vision: max abs difference"] == 1e-4
    assert limits["image_query: max abs difference"] == limits["text: max abs difference"] == 2e-5
    assert limits["itm: max abs difference"] <= 1e-4
    for graph in ("image_query", "itm"):
        assert limits[f"{graph}: zero weights against no boxes"] == 1e-5
        assert limits[f"{graph}: effect of boxes, relative difference"] <= 1e-2
    assert {"preprocessing: max abs difference", "tokenizer: captions with other ids"} <= limits.keys()


def test_every_graph_is_compared_with_none_one_and_many_boxes_in_every_shape(encoder, samples):
    verification = verified(encoder, samples)
    found = {(row.graph, row.case, row.shape) for row in verification.comparisons}
    shapes = ["smallest", "middle", "largest", "largest, permuted"]
    for case in ("no_boxes", "one_box", "many_boxes", "zero_weights"):
        for shape in shapes:
            assert ("image_query", case, shape) in found
        for shape in [*shapes, "one image, most texts", "most images, one text"]:
            assert ("itm", case, shape) in found
    perturbed = {(row.graph, row.case) for row in verification.comparisons if row.perturbed}
    assert perturbed == {(graph, case) for graph in ("image_query", "itm") for case in ("one_box", "many_boxes")}


def test_recorded_samples_hold_texts_of_every_length_boxes_of_weight_and_pictures_that_differ(samples):
    cases = {(case.graph, case.name): case for case in samples.cases}
    lengths = {cases["text", name].inputs["input_ids"].shape[1] for name in ("longest", "shortest")}
    assert lengths == {12, 2}
    for graph in ("image_query", "itm"):
        assert (cases[graph, "many_boxes"].inputs["box_weights"] != 0).sum() >= 2
        assert cases[graph, "no_boxes"].inputs["object_masks"].shape[1] == 0
        assert not cases[graph, "zero_weights"].inputs["box_weights"].any()
        assert cases[graph, "zero_weights"].inputs["object_masks"].any()
    pixels = cases["vision", "pictures"].inputs["pixel_values"]
    assert np.abs(pixels[0] - pixels[1]).max() > 0.5


def test_a_half_precision_bundle_passes_its_own_limits_and_not_those_of_float32(half_bundle):
    bundle = Bundle.open(half_bundle)
    verification = verify(bundle, "recorded", None, provider="cpu", seed=1, progress=Silent())
    assert verification.verdict == "pass", failed_gates(verification)
    assert verification.precision == "fp16"
    worst = max(row.max_abs for row in verification.comparisons)
    assert worst > 1e-4, "numbers this close were not computed in half precision"


# Faults, and the gate that catches each


def test_swapped_query_rows_are_caught_by_the_difference(encoder, samples):
    def swap(output, _):
        return output[:, [1, 0, *range(2, output.shape[1])]]

    verification = with_fault(encoder, samples, "image_query", after=swap)
    assert "image_query: max abs difference" in failed_gates(verification)
    assert "image_query: 1 - cosine" in failed_gates(verification)
    assert all(name.startswith("image_query") for name in failed_gates(verification))


@pytest.mark.parametrize("graph", ["image_query", "itm"])
def test_ignored_box_weights_are_caught_by_the_difference(encoder, samples, graph):
    def ignore(inputs):
        return {"box_weights": np.zeros_like(inputs["box_weights"])}

    verification = with_fault(encoder, samples, graph, before=ignore)
    assert f"{graph}: max abs difference" in failed_gates(verification)
    if graph == "image_query":
        assert f"{graph}: 1 - cosine, with boxes" in failed_gates(verification)
        assert f"{graph}: 1 - cosine" not in failed_gates(verification)


@pytest.mark.parametrize("graph", ["image_query", "itm"])
def test_masks_shifted_by_one_patch_are_caught_by_the_difference(encoder, samples, graph):
    def shift(inputs):
        masks = inputs["object_masks"].copy()
        masks[:, :, 1:] = np.roll(masks[:, :, 1:], 1, axis=-1)
        return {"object_masks": masks}

    verification = with_fault(encoder, samples, graph, before=shift)
    assert f"{graph}: max abs difference" in failed_gates(verification)


def test_a_mask_that_counts_cls_as_a_patch_is_caught_by_the_difference(encoder, samples):
    def roll(inputs):
        return {"object_masks": np.roll(inputs["object_masks"], -1, axis=-1)}

    assert "image_query: max abs difference" in failed_gates(with_fault(encoder, samples, "image_query", before=roll))


def test_boxes_given_to_the_neighbouring_image_are_caught_by_the_difference(encoder, samples):
    def neighbour(inputs):
        return {name: np.roll(inputs[name], 1, axis=0) for name in ("object_masks", "box_weights")}

    verification = with_fault(encoder, samples, "image_query", before=neighbour)
    assert "image_query: max abs difference" in failed_gates(verification)
    assert "image_query: rows independent of neighbours" in failed_gates(verification)


@pytest.mark.parametrize("graph", ["vision", "image_query", "text", "itm"])
def test_a_row_that_differs_in_company_is_caught_even_within_the_tolerance(encoder, samples, graph):
    def lean(output, _):
        return output + np.float32(1.5e-5 if len(output) > 1 else 0)

    assert failed_gates(with_fault(encoder, samples, graph, after=lean)) == [f"{graph}: rows independent of neighbours"]


def test_a_fault_of_one_batch_width_alone_is_caught(encoder, samples):
    def wide(output, _):
        return output * (1 if output.shape[0] < 3 else 1.01)

    assert "vision: max abs difference" in failed_gates(with_fault(encoder, samples, "vision", after=wide))


def test_boxes_of_weight_zero_that_still_act_are_caught_even_within_the_tolerance(encoder, samples):
    def leak(output, inputs):
        return output + np.float32(1.5e-5 if inputs["object_masks"].shape[1] else 0)

    found = failed_gates(with_fault(encoder, samples, "image_query", after=leak))
    # The second by the same leak: padded with boxes of weight 0, rows differ from the rows computed without them.
    assert set(found) == {
        "image_query: zero weights against no boxes",
        "image_query: rows independent of neighbours",
    }


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_value_that_is_not_finite_fails_and_the_json_stays_json(encoder, samples, value):
    def spoil(output, _):
        output = output.copy()
        output.flat[0] = value
        return output

    verification = with_fault(encoder, samples, "text", after=spoil)
    assert "text: values not finite" in failed_gates(verification)
    assert "text: max abs difference" in failed_gates(verification)

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    loaded = json.loads(json.dumps(verification.to_dict()), parse_constant=refuse)
    gates = {gate["name"]: gate for gate in loaded["gates"]}
    assert gates["text: max abs difference"] == {
        "name": "text: max abs difference",
        "value": None,
        "limit": 2e-5,
        "pass": False,
    }


def test_a_value_that_is_not_finite_in_rows_alone_only_fails(encoder, samples):
    """`largest` comes after `smallest`: a later finite distance must not wash the NaN away."""

    def spoil(output, inputs):
        last = (
            inputs["pixel_values"].shape[0] == 1
            and (inputs["pixel_values"] == samples.cases[0].inputs["pixel_values"][1]).all()
        )
        return output * np.float32(np.nan) if last else output

    assert failed_gates(with_fault(encoder, samples, "vision", after=spoil)) == [
        "vision: rows independent of neighbours"
    ]


def test_an_output_of_another_shape_fails_and_does_not_crash():
    spec = GraphSpec(
        "text",
        "text_tower",
        "t",
        (TensorSpec("input_ids", "token_ids", "int64", ("T",)),),
        (TensorSpec("y", "text_vectors", "float32", ("T", 2)),),
        {},
    )
    case = Case("text", "x", {"input_ids": np.zeros(2, np.int64)}, {"y": np.ones((2, 2), np.float32)})
    (found,) = compare(case, spec, "all", {"y": np.ones((2, 1), np.float32)}, {"T": np.arange(2)})
    assert found.max_abs == found.cosine_distance == np.inf


@pytest.mark.parametrize("graph", ["vision", "image_query", "text", "itm"])
def test_a_graph_without_a_case_is_an_error_and_not_a_pass(encoder, samples, graph):
    cases = [case for case in samples.cases if case.graph != graph]
    with pytest.raises(BundleError, match=f"graph '{graph}'") as caught:
        verified(encoder, samples, cases)
    assert caught.value.code == "case-missing"


def test_a_perturbation_that_no_box_would_show_is_an_error_and_not_a_pass(encoder, samples):
    def stripped(case):
        if "box_weights" not in case.inputs:
            return case
        return replace(case, inputs=case.inputs | {"box_weights": np.zeros_like(case.inputs["box_weights"])})

    with pytest.raises(BundleError, match="graph 'image_query'") as caught:
        verified(encoder, samples, [stripped(case) for case in samples.cases])
    assert caught.value.code == "case-without-boxes"


# The profile


@pytest.mark.parametrize("limits", [{"B": 1, "I": 1, "T": 1}, {"B": 1, "I": 1}, {"T": 1}, {"T": 2}])
def test_a_bundle_for_one_image_or_one_text_can_be_verified(tiny_bundle, copy_of, edit_manifest, limits):
    """The recorded cases have more rows than such a profile takes."""
    folder = copy_of(tiny_bundle)

    def narrow(values):
        for graph in values["graphs"].values():
            for axis, most in limits.items():
                if axis in graph["ranges"]:
                    graph["ranges"][axis]["max"] = most

    edit_manifest(folder, narrow)
    assert verify(Bundle.open(folder), "recorded", None, provider="cpu", seed=1, progress=Silent()).passed


# Pieces


@given(
    most=st.fixed_dictionaries({"I": st.integers(1, 9), "T": st.integers(1, 70)}),
    rows=st.fixed_dictionaries({"I": st.integers(1, 4), "T": st.integers(1, 5)}),
)
def test_a_case_is_run_at_the_smallest_a_middle_and_the_largest_batch_with_every_row_repeated_in_turn(most, rows):
    inputs = (
        TensorSpec("image_embeds", "image_tokens", "float32", ("I", 2)),
        TensorSpec("input_ids", "token_ids", "int64", ("I", "T", "L")),
    )
    ranges = {axis: AxisRange(1, length) for axis, length in most.items()} | {"L": AxisRange(2, 5)}
    spec = GraphSpec(
        "itm",
        "pair_scorer",
        "itm.onnx",
        inputs,
        (TensorSpec("itm_scores", "pair_scores", "float32", ("I", "T")),),
        ranges,
    )
    case = Case(
        "itm",
        "x",
        {"image_embeds": np.zeros((rows["I"], 2)), "input_ids": np.zeros((rows["I"], rows["T"], 3))},
        {},
    )
    found = dict(selections(spec, case))
    assert list(found) == [
        "smallest",
        "middle",
        "largest",
        "largest, permuted",
        "one image, most texts",
        "most images, one text",
    ]
    lengths = {label: tuple(len(selection[axis]) for axis in ("I", "T")) for label, selection in found.items()}
    assert lengths["smallest"] == (1, 1)
    assert lengths["middle"] == ((1 + most["I"]) // 2, (1 + most["T"]) // 2)
    assert lengths["largest"] == lengths["largest, permuted"] == (most["I"], most["T"])
    assert lengths["one image, most texts"] == (1, most["T"])
    assert lengths["most images, one text"] == (most["I"], 1)
    for axis in ("I", "T"):
        np.testing.assert_array_equal(found["largest"][axis], np.arange(most[axis]) % rows[axis])
        assert sorted(found["largest, permuted"][axis]) == sorted(found["largest"][axis])


def test_a_permuted_batch_is_permuted_and_holds_duplicates(encoder, samples):
    case = next(case for case in samples.cases if (case.graph, case.name) == ("itm", "many_boxes"))
    found = dict(selections(encoder.sessions["itm"].spec, case))
    for axis, size in (("I", 3), ("T", 6)):
        permuted = found["largest, permuted"][axis]
        assert len(set(permuted.tolist())) < len(permuted) == size
    assert any(not np.array_equal(found["largest"][axis], found["largest, permuted"][axis]) for axis in ("I", "T"))


def test_rows_are_selected_along_every_named_axis():
    array = np.arange(24, dtype=np.float64).reshape(2, 3, 4)
    spec = TensorSpec("x", "token_ids", "float32", ("I", "T", 4))
    found = select(array, spec, {"I": np.array([1, 0, 1]), "T": np.array([2, 2])})
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found[:, 0], array[[1, 0, 1], 2])
    np.testing.assert_array_equal(found[:, 0], found[:, 1])


def test_cosine_distance_is_the_worst_row():
    got = np.array([[1.0, 0.0], [1.0, 1.0], [2.0, 0.0]])
    expected = np.array([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    assert cosine_distance(got, expected) == pytest.approx(1 - np.sqrt(0.5))
    assert cosine_distance(got[[0, 2]], expected[[0, 2]]) == pytest.approx(0)
    assert cosine_distance(-got[:1], expected[:1]) == pytest.approx(2)
    assert cosine_distance(np.zeros((1, 2)), expected[:1]) == 1


@pytest.mark.parametrize(
    ("value", "passed"), [(0.0, True), (1.0, True), (np.nextafter(1.0, 2), False), (np.nan, False), (np.inf, False)]
)
def test_a_gate_passes_up_to_its_limit_and_never_for_nan(value, passed):
    assert Gate("x", float(value), 1.0).passed is passed


def test_padding_that_is_attended_to_fails_where_texts_are_padded_to_the_profiles_end(encoder, samples):
    """Whatever the mask says, this graph reads all tokens of a text that is shorter than the longest."""

    def all_ones(inputs):
        longest = inputs["input_ids"].shape[-1] == encoder.limit(TEXT_TOWER, "L")
        return {"attention_mask": np.ones_like(inputs["attention_mask"])} if longest else {}

    mine = [case for case in samples.cases if case.graph == "text" and case.inputs["attention_mask"].all()]
    assert mine, "no recorded case has texts without padding of their own"
    assert any(case.inputs["input_ids"].shape[-1] < encoder.limit(TEXT_TOWER, "L") for case in mine)
    others = [case for case in samples.cases if case.graph != "text"]
    encoder.sessions["text"] = Faulty(encoder.sessions["text"], before=all_ones)
    verification = verified(encoder, samples, [*others, *mine])
    padded = [
        row.max_abs for row in verification.comparisons if row.shape == "longest texts, padded" and row.graph == "text"
    ]
    assert max(padded) > 1e-3
    assert "text: max abs difference" in failed_gates(verification)
