"""Levels rank and recall: agreement, ties, intervals; what is wrong in a bundle shows in its ranks."""

import json
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_model import THRESHOLD

from qpert.exporter.families.declare import Limits
from qpert.runtime.cli import run
from qpert.runtime.errors import InputError
from qpert.runtime.evaluation.bootstrap import DRAWS_AT_ONCE
from qpert.runtime.evaluation.metrics import metrics_of_ranks
from qpert.runtime.evaluation.pair_scores import PairScores
from qpert.runtime.evaluation.schedule import Schedule
from qpert.runtime.inputs.perturbation import Perturbation
from qpert.runtime.verification.evidence import SHOWN
from qpert.runtime.verification.live import limits_for
from qpert.runtime.verification.ranks import compare_ranks, inversions, kendall_tau, share_beyond
from qpert.runtime.verification.recall import (
    compare_recall,
    rounding_ties,
)
from qpert.runtime.verification.tolerances import RANK_LIMITS, RankLimits

LIMITS = RankLimits(itc=0.01, itm=0.04, first=0, order=0, decision=0, r1=0)
"""Final scores closer than 0.1 are a tie, ITC scores closer than 0.02."""

# Pieces


@given(st.integers(2, 12).flatmap(lambda n: st.permutations(range(n))))
def test_kendalls_tau_is_scipys(places):
    expected = scipy.stats.kendalltau(np.arange(len(places)), places).statistic
    assert kendall_tau(np.array(places)) == pytest.approx(expected, abs=1e-12)


def test_a_single_candidate_agrees_with_itself():
    assert kendall_tau(np.array([0])) == 1


def test_inversions_count_pairs_that_the_scores_decide():
    scores = np.array([1.0, 0.95, 0.5])
    assert inversions(np.array([0, 1, 2]), scores, 0.1) == 0
    assert inversions(np.array([1, 0, 2]), scores, 0.1) == 0, "0.05 apart is a tie"
    assert inversions(np.array([1, 0, 2]), scores, 0.01) == 1
    assert inversions(np.array([2, 1, 0]), scores, 0.1) == 2


# Two sides


def scored(itc, itm, rerank):
    """PairScores of full matrices [B, T]."""
    itc, itm = np.array(itc, np.float32), np.array(itm, np.float32)
    schedule = Schedule.plan(itc, rerank)
    return PairScores(itc, schedule, itm.ravel()[schedule.keys])


ITC = [[0.50, 0.10], [0.40, 0.30], [0.10, 0.45]]  # three images, two texts
ITM = [[2.0, -1.0], [1.5, 0.5], [-2.0, 0.02]]


def test_a_side_agrees_with_itself_in_everything():
    found = compare_ranks(scored(ITC, ITM, 2), scored(ITC, ITM, 2), LIMITS)
    assert all(gate.value == 0 for gate in found.gates())
    values = found.to_dict()
    for way, queries in (("t2i", 2), ("i2t", 3)):
        assert values[way]["queries"] == queries
        assert values[way]["top1_agreement"] == values[way]["overlap_10"] == values[way]["overlap_64"] == 100
        assert values[way]["kendall_tau"] == values[way]["kendall_tau_least"] == 1
    assert values["tie_widths"] == {"itc": pytest.approx(0.02), "final": pytest.approx(0.1), "decision": 0.04}


def test_a_swap_that_the_reference_decides_is_counted_and_one_within_a_tie_is_not():
    moved = [[1.4, -1.0], [1.5, 0.5], [-2.0, 0.02]]  # text 0 now finds image 0 at 1.90, image 1 at 1.90: still first
    swapped = [[1.3, -1.0], [1.5, 0.5], [-2.0, 0.02]]  # 1.80 against 1.90, where the reference has 2.50 and 1.90
    assert compare_ranks(scored(ITC, ITM, 2), scored(ITC, moved, 2), LIMITS).t2i[0].changed is False
    (first, _) = compare_ranks(scored(ITC, ITM, 2), scored(ITC, swapped, 2), LIMITS).t2i
    assert (first.first, first.tied, first.moved, first.tau) == ((0, 1), False, 1, -1)
    assert first.gap == pytest.approx(0.6)
    wide = RankLimits(itc=0.01, itm=0.3, first=0, order=0, decision=0, r1=0)  # a tie is 0.62 wide
    (first, _) = compare_ranks(scored(ITC, ITM, 2), scored(ITC, swapped, 2), wide).t2i
    assert (first.changed, first.tied, first.moved, first.tau) == (True, True, 0, -1)


def test_leaving_the_shortlist_counts_unless_itc_was_a_tie_at_its_edge():
    pushed = [[0.50, 0.10], [0.05, 0.30], [0.10, 0.45]]  # image 1 leaves the two best of text 0, image 2 comes in
    (first, _) = compare_ranks(scored(ITC, ITM, 2), scored(pushed, ITM, 2), LIMITS).t2i
    assert first.moved == 0, "it was the last of the list: nothing shows that its place was decided"
    other = [[0.05, 0.10], [0.40, 0.30], [0.10, 0.45]]  # image 0, which the reference had first and by far
    (first, _) = compare_ranks(scored(ITC, ITM, 2), scored(other, ITM, 2), LIMITS).t2i
    assert (first.first, first.tied) == ((0, 1), False)
    assert first.moved == 1


def test_decisions_flip_where_a_logit_changes_its_sign_and_count_beyond_what_it_may_move():
    flipped = [[2.0, -1.0], [1.5, -0.5], [-2.0, -0.02]]
    found = compare_ranks(scored(ITC, ITM, 3), scored(ITC, flipped, 3), LIMITS)
    assert (found.flipped, found.flipped_outside, len(found.keys)) == (2, 1, 6)
    gates = {gate.name: gate for gate in found.gates()}
    assert gates["itm: other decision outside ties, %"].value == pytest.approx(100 / 6)
    assert gates["itm: largest difference of a score"].value == pytest.approx(1)
    assert gates["itc: largest difference of a score"].value == 0


def test_where_some_scores_may_lie_far_off_their_share_is_judged():
    """One of six ITM scores moves by 1: more than the limit of 0.04, and 16.7 % of them."""
    moved = scored(ITC, [[ITM[0][0] + 1, *ITM[0][1:]], *ITM[1:]], 3)
    for far, passed in ((10, False), (20, True)):
        compared = compare_ranks(scored(ITC, ITM, 3), moved, replace(LIMITS, far=far))
        found = {gate.name: gate for gate in compared.gates()}
        assert "itm: largest difference of a score" not in found
        assert found["itm: scores farther off than 0.04, %"].value == pytest.approx(100 / 6)
        assert found["itm: scores farther off than 0.04, %"].passed is passed
        assert found["itc: scores farther off than 0.01, %"].value == 0
    assert share_beyond(np.array([np.nan, 0.0], np.float32), 1.0) == 50, "NaN is never near"


def test_limits_are_those_of_the_precision_until_others_are_allowed():
    assert limits_for("fp32", {}) == RANK_LIMITS["fp32"]
    assert (RANK_LIMITS["fp32"].r1, RANK_LIMITS["fp16"].r1, RANK_LIMITS["int8"].r1) == (0, 0.2, 0.5)
    assert limits_for("int8", {"r1": 0.1}).r1 == 0.1
    refused = (({"r2": 1.0}, "allow-unknown"), ({"r1": -1.0}, "allow-negative"), ({"r1": np.nan}, "allow-negative"))
    for allowed, code in refused:
        with pytest.raises(InputError) as caught:
            limits_for("fp32", allowed)
        assert caught.value.code == code


# Recall


def recall_case(seed=0, images=60):
    """Ranks of both sides, captions' owners and areas: three captions an image, sizes over all bins."""
    rng = np.random.default_rng(seed)
    owners = np.repeat(np.arange(images), 3)
    sides = [(rng.geometric(p, 3 * images) - 1, rng.geometric(p, images) - 1) for p in (0.5, 0.45)]
    none = np.zeros(3 * images, bool), np.zeros(images, bool)
    return sides[0], sides[1], none, owners, np.arange(images) % 10 / 10 + 0.05


def test_recall_of_both_sides_is_that_of_an_evaluation():
    reference, deployed, none, owners, areas = recall_case()
    found = compare_recall(reference, deployed, none, image_of_text=owners, largest_areas=areas, resamples=50)
    for side, ranks in (("reference", reference), ("deployed", deployed)):
        metrics = metrics_of_ranks(*ranks, image_of_text=owners, largest_areas=areas)
        for way, changes in (("t2i", found.t2i), ("i2t", found.i2t)):
            expected = getattr(metrics, way)
            for cut in (1, 5, 10):
                assert getattr(changes[f"r{cut}"], side) == pytest.approx(expected.recall[cut])
                assert getattr(changes[f"mr{cut}"], side) == pytest.approx(expected.mean_recall[cut])
                assert getattr(changes[f"small_r{cut}"], side) == pytest.approx(expected.bins[0].recall[cut])


def test_the_interval_is_scipys_paired_bootstrap():
    reference, deployed, none, owners, areas = recall_case(images=200)
    found = compare_recall(reference, deployed, none, image_of_text=owners, largest_areas=areas)
    change = 100 * ((deployed[1] < 1).astype(float) - (reference[1] < 1))
    stock = scipy.stats.bootstrap((change,), np.mean, method="percentile", n_resamples=5000, rng=1)
    got = found.i2t["r1"]
    assert got.difference == pytest.approx(change.mean())
    # Two draws of 2,000 and 5,000 resamples: an end of the interval has a standard error of some 2 % of its width.
    width = stock.confidence_interval.high - stock.confidence_interval.low
    assert got.low == pytest.approx(stock.confidence_interval.low, abs=0.1 * width)
    assert got.high == pytest.approx(stock.confidence_interval.high, abs=0.1 * width)


def test_captions_of_one_image_are_drawn_together():
    """Three captions that always agree are one observation: the interval is that of images, not of captions."""
    reference, deployed, none, owners, areas = recall_case(images=200)
    tripled = [(np.repeat(side[1], 3), side[1]) for side in (reference, deployed)]
    found = compare_recall(*tripled, none, image_of_text=owners, largest_areas=areas, resamples=2 * DRAWS_AT_ONCE)
    assert found.t2i["r1"].low == pytest.approx(found.i2t["r1"].low)
    assert found.t2i["r1"].high == pytest.approx(found.i2t["r1"].high)


def test_what_is_undefined_is_none_with_a_reason():
    reference, deployed, none, owners, _ = recall_case()
    areas = np.full(60, 0.55)
    found = compare_recall(reference, deployed, none, image_of_text=owners, largest_areas=areas, resamples=20)
    assert found.t2i["mr1"].difference is found.t2i["small_r1"].difference is None
    assert "bin" in found.t2i["mr1"].reason
    assert "small" in found.t2i["small_r1"].reason
    assert found.t2i["r1"].reason is None


def test_a_change_between_equal_scores_counts_for_nothing():
    """Text 0 scores both images alike in the reference; here rounding turns them round."""
    itc, itm = [[0.4, 0.1], [0.4, 0.5]], [[1.0, 0.0], [1.0, 2.0]]
    turned = [[1.0, 0.0], [np.float32(1.00001), 2.0]]
    sides = scored(itc, itm, 2), scored(itc, turned, 2)
    ranks = compare_ranks(*sides, RANK_LIMITS["fp32"])
    assert ranks.t2i[0].changed
    assert ranks.t2i[0].tied
    owners, areas = np.array([0, 1]), np.array([0.5, 0.5])
    both = [(side.t2i_ranks(owners), side.i2t_ranks(owners)) for side in sides]
    ties = rounding_ties(ranks.t2i), rounding_ties(ranks.i2t)
    found = compare_recall(*both, ties, image_of_text=owners, largest_areas=areas, resamples=20)
    assert found.t2i["r1"].difference == -50
    assert found.decided_r1 == {"t2i": 0, "i2t": 0}
    counted = compare_recall(
        *both, (~ties[0] & False, ties[1]), image_of_text=owners, largest_areas=areas, resamples=20
    )
    assert counted.decided_r1["t2i"] == 50


# The command, on crops of photographs


@pytest.fixture(scope="module")
def dataset(photos, tmp_path_factory):
    """Twelve crops with three captions and one box each, in LAVIS's layout; `boxes.jsonl` beside them."""
    root = tmp_path_factory.mktemp("crops")
    (root / "images").mkdir()
    (root / "annotations").mkdir()
    captions = ("a man in an orange suit", "a cat with green eyes", "a cup on a table", "a rocket on its pad")
    entries, boxes = [], []
    for number in range(12):
        photo = Image.open(photos[number % 4]).convert("RGB")
        name = f"images/{number}.png"
        photo.crop((7 * number, 5 * number, photo.width - 9 * number, photo.height)).resize((90, 70)).save(root / name)
        texts = [f"{captions[number % 4]} {words}" for words in (str(number), f"and {number} dogs", "in a picture")]
        entries.append({"image": name, "caption": texts})
        boxes.append({"image": name, "x1": 5 + number, "y1": 6, "x2": 40 + number, "y2": 45})
    (root / "annotations" / "test.json").write_text(json.dumps(entries))
    (root / "boxes.jsonl").write_text("\n".join(map(json.dumps, boxes)))
    return root


@pytest.fixture
def verify(dataset, tiny_weights, capsys):
    """Runs a level on the crops: the exit code and the JSON."""

    def run_level(folder, level, *options):
        arguments = ["verify", str(folder), "--level", level, "--checkpoint", str(tiny_weights), "--json"]
        arguments += ["--dataset", str(dataset), "--boxes", str(dataset / "boxes.jsonl"), "--rerank", "6", *options]
        code = run(arguments)
        out, err = capsys.readouterr()
        return code, json.loads(out) if out else err

    return run_level


def test_a_sound_bundle_has_the_references_ranks_and_recall_and_leaves_a_report(tiny_bundle, copy_of, verify, tmp_path):
    folder = copy_of(tiny_bundle)
    code, document = verify(folder, "recall", "--markdown", str(tmp_path / "verify.md"), "--limit", "9")
    assert (code, document["verdict"], document["level"], document["reference"]) == (0, "pass", "recall", "torch")
    gates = {gate["name"]: gate for gate in document["gates"]}
    for way in ("t2i", "i2t"):
        assert gates[f"{way}: change of R@1, points"]["value"] == 0
        assert document["ranks"][way]["first_changed_outside_ties"] == 0
        assert document["recall"][way]["r1"]["difference"] == 0
    assert document["data"]["images"] == 9
    assert 0 < gates["itm: largest difference of a score"]["value"] < 2e-5
    assert "preprocessing: max abs difference" in gates
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["verification"]["verdict"], manifest["verification"]["level"]) == ("pass", "recall")
    page = (folder / "reports" / "verify.html").read_text()
    assert "None: every query has the same first result on both sides." in page
    assert "--rerank 6" in page, "the exact command"
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "")
    markdown = (folder / "reports" / "verify.md").read_text()
    assert markdown == (tmp_path / "verify.md").read_text()
    assert markdown.startswith("## Parity with PyTorch: PASS")
    assert "| t2i: change of R@1, points | 0 | 0 | pass |" in markdown


def test_a_wrong_resize_filter_is_caught_since_the_reference_opens_pictures_itself(
    tiny_bundle, copy_of, edit_manifest, verify
):
    folder = copy_of(tiny_bundle)
    edit_manifest(folder, lambda values: values["preprocessing"].update({"resample": "bilinear"}))
    code, document = verify(folder, "rank")
    failed = {gate["name"] for gate in document["gates"] if not gate["pass"]}
    assert code == 1
    assert {"itc: largest difference of a score", "preprocessing: max abs difference"} <= failed
    page = (folder / "reports" / "verify.html").read_text()
    shown = sum(min(SHOWN, document["ranks"][way]["first_changed"]) for way in ("t2i", "i2t"))
    assert page.count("<b>first here</b>") == shown
    assert ("data:image/jpeg;base64," in page) == (shown > 0)


def test_a_query_set_for_each_box_scores_as_the_references_boxes_one_by_one(export_tiny, verify, dataset, tmp_path):
    """On two boxes a picture, one of them small; the reference sees one box a call and takes the maximum itself."""
    boxes = [json.loads(line) for line in (dataset / "boxes.jsonl").read_text().splitlines()]
    more = [*boxes, *({**box, "x1": 60, "x2": 72, "y1": 50, "y2": 60} for box in boxes)]
    (tmp_path / "boxes.jsonl").write_text("\n".join(map(json.dumps, more)))
    settings = Perturbation(reduction="each", keep_stock=True, threshold=THRESHOLD)
    folder = export_tiny(perturbation=settings, limits=Limits(4, 4, 8, 12))
    code, document = verify(folder, "rank", "--boxes", str(tmp_path / "boxes.jsonl"))
    assert (code, document["verdict"]) == (0, "pass"), document["gates"]
    assert document["ranks"]["t2i"]["first_changed"] == 0


def test_another_limit_can_be_allowed_or_asked_for(tiny_bundle, copy_of, verify):
    code, document = verify(copy_of(tiny_bundle), "rank", "--allow", "itm=0", "--allow", "itc=1")
    failed = [gate["name"] for gate in document["gates"] if not gate["pass"]]
    assert (code, failed) == (1, ["itm: largest difference of a score"]), "rounding does not meet a limit of 0"
    assert {gate["limit"] for gate in document["gates"] if gate["name"].startswith("itc: ")} == {1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--level", "rank", "--reference", "recorded"], "a bundle records no scores"),
        (["--level", "rank", "--allow", "r1"], "expected NAME=VALUE"),
        (["--level", "rank", "--allow", "r9=1"], "r9=1 is not a limit"),
        (["--level", "tensor", "--limit", "5"], "--limit is for --level rank or recall"),
        (["--level", "recall", "--dataset", "nowhere"], "does not exist"),
    ],
)
def test_options_that_do_not_go_together_are_an_error_in_words(tiny_bundle, capsys, options, message):
    assert run(["verify", str(tiny_bundle), *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
