"""Figures against goals: what passes, what fails, and that nothing that was not shown passes."""

from __future__ import annotations

import math
from functools import partial

import pytest
from documentation import check_options
from gpu_acceptance import goals, judge
from gpu_acceptance.document import document, exit_code
from gpu_acceptance.lines import Line, Result
from gpu_acceptance.page import report
from gpu_acceptance.plan import PARITY, PREPARATION, Plan
from gpu_acceptance.scale import ACCEPTANCE, DRY_RUN

from qpert.runtime.report.html import to_html

ENVIRONMENT = {
    "gpu": {"name": "NVIDIA L4", "driver": "550.54.15", "capability": "8.9", "memory": "23034 MiB", "cuda": "12.4"},
    "commit": "c0ffee",
    "code": "0" * 64,
    "packages": {"torch": "2.13.0"},
    "machine": {"cpu": "a CPU", "cores": 8, "system": "Linux", "python": "3.11", "when": "2026-11-27"},
}


@pytest.mark.parametrize("scale", [ACCEPTANCE, DRY_RUN], ids=["acceptance", "dry run"])
def test_a_line_has_its_own_name_needs_earlier_ones_and_runs_commands_that_exist(scale, tmp_path):
    seen: list[str] = []
    for line in Plan(scale, tmp_path).lines():
        assert line.name not in seen
        assert set(line.needs) <= set(seen), line.name
        if line.command[1:3] == ("-m", "qpert.runtime.cli"):
            check_options(["qpert", *line.command[3:]])
        seen.append(line.name)


def test_an_acceptance_covers_every_provider_level_precision_and_graph(tmp_path):
    names = {line.name for line in Plan(ACCEPTANCE, tmp_path).lines()}
    for provider in ("cuda", "tensorrt", "rtx"):
        for model in ("demo", "full"):
            for precision in ("fp32", "fp16"):
                assert {
                    f"verify-{model}-{precision}-{provider}-{level}" for level in ("tensor", "rank", "recall")
                } <= names
                assert (f"engines-{model}-{precision}-{provider}" in names) == (provider != "cuda")
        assert {f"speed-{provider}-{graph}" for graph in ("vision", "image_query", "text", "itm")} <= names
        assert {f"{kind}-{provider}" for kind in ("share", "memory", "evaluation")} <= names


def test_every_goal_that_is_stated_says_what_it_is_held_against():
    assert goals.share_goal(8).limit == 2
    assert goals.share_goal(1).limit == 2
    assert goals.share_goal(32).limit == 8
    assert not goals.SPEED.holds(math.nan)
    assert not goals.SHARE.holds(math.nan)
    assert goals.SPEED.holds(1.0)
    assert not goals.SPEED.holds(0.99)
    assert goals.SHARE.text() == "at most 2 %"


def gate(value, limit):
    return {
        "name": "vision: max abs difference",
        "value": value,
        "limit": limit,
        "pass": value is not None and value <= limit,
    }


def test_verify_passes_if_every_gate_does_and_fails_with_the_gate_that_does_not():
    good = judge.verified({"verdict": "pass", "gates": [gate(1e-6, 1e-4), gate(0, 0)]}, {})
    assert good.status == "passed"
    assert good.figures["nearest_to_its_limit"]["value"] == 1e-6
    bad = judge.verified({"verdict": "fail", "gates": [gate(1e-6, 1e-4), gate(2e-4, 1e-4), gate(None, 1)]}, {})
    assert bad.status == "failed"
    assert "0.0002" in bad.checks[0].reason
    assert bad.figures["failed"] == 2


@pytest.mark.parametrize("made", [{"verdict": "pass", "gates": []}, {"verdict": "fail", "gates": [gate(0, 1)]}])
def test_verify_without_gates_or_with_a_verdict_that_contradicts_them_fails(made):
    assert judge.verified(made, {}).status == "failed"


def speed_row(ratios, left_out=None, **more):
    baselines = {name: {"ratio": ratio, "median_ms": ratio, "max_abs": 0.0} for name, ratio in ratios.items()}
    made = {"batch": 8, "boxes": 0, "median_ms": 1.0, "p95_ms": 1.0, "per_second": 8e3, "share_of_peak": 0.6}
    return made | {"baselines": baselines, "left_out": left_out or {}} | more


def judged_speed(rows, **options):
    made = {"graph": "vision", "rows": rows, "peak_tflops": 700.0, "load": 0.1}
    return judge.speed_judge(**({"judged": True, "compiles": True, "peak": True} | options))(made, {})


def test_speed_is_held_against_both_baselines_and_the_peak():
    assert judged_speed([speed_row({"torch-sdpa": 1.2, "torch-compile": 1.0})]).status == "passed"
    slow = judged_speed([speed_row({"torch-sdpa": 1.2, "torch-compile": 0.9})])
    assert [check.status for check in slow.checks] == ["passed", "failed", "passed"]
    far = judged_speed([speed_row({"torch-sdpa": 1.2, "torch-compile": 1.0}, share_of_peak=0.4)])
    assert [check.status for check in far.checks] == ["passed", "passed", "failed"]


def test_a_baseline_that_does_not_run_is_skipped_and_one_that_is_missing_is_not_passed():
    without = judged_speed([speed_row({"torch-sdpa": 1.2}, {"torch-compile": "no compiler"})])
    assert [check.status for check in without.checks] == ["passed", "skipped", "passed"]
    assert without.checks[1].reason == "no compiler"
    with pytest.raises(KeyError):  # which the runner makes a failure of
        judged_speed([speed_row({"torch-sdpa": 1.2})])


def test_memory_that_ran_out_at_one_size_fails_and_keeps_the_other_sizes():
    rows = [
        speed_row({"torch-sdpa": 2.0, "torch-compile": 2.0}),
        {"batch": 64, "boxes": 0, "error": "GPU memory is too small"},
    ]
    found = judged_speed(rows)
    assert found.status == "failed"
    assert [check.status for check in found.checks] == ["passed", "passed", "failed", "failed"]
    assert found.checks[2].reason == "GPU memory is too small"


def test_a_dry_run_judges_no_speed():
    found = judged_speed([speed_row({"torch-sdpa": 0.01, "torch-compile": 0.01})], judged=False)
    assert {check.status for check in found.checks} == {"not judged"}


def test_boxes_are_held_against_the_stated_share():
    rows = [{"batch": 1, "boxes": 0, "vision_ms": 1.0}, {"batch": 1, "boxes": 8, "percent": 2.1, "ms": 1.0}]
    rows += [{"batch": 1, "boxes": 32, "percent": 7.9, "ms": 1.0}]
    found = judge.shares({"rows": rows}, {}, judged=True)
    assert [check.status for check in found.checks] == ["failed", "passed"]


def test_memory_is_held_against_pytorchs_of_the_same_kind():
    judged = partial(judge.memory, baseline="memory-torch", judged=True)
    torch = Result("memory-torch", "passed", figures={"megabytes": 1000.0, "of": "the process"})
    ours = {"megabytes": 1400.0, "of": "the process"}
    assert judged(ours, {"memory-torch": torch}).status == "passed"
    assert judged(ours | {"megabytes": 1600.0}, {"memory-torch": torch}).status == "failed"
    assert judged(ours | {"of": "the whole GPU"}, {"memory-torch": torch}).status == "skipped"
    assert judged(ours, {}).status == "skipped"


def test_evaluation_is_held_against_its_flops_at_half_of_the_peak():
    """1 PFLOP at half of 500 TFLOP/s is 4 seconds."""
    made = {
        "peak_tflops": 500.0,
        "data_sets": {"A": {"seconds": 3.9, "pflop": 1.0}, "B": {"seconds": 4.1, "pflop": 1.0}},
    }
    assert [check.status for check in judge.evaluation(made, {}, judged=True).checks] == ["passed", "failed"]


def test_a_provider_that_is_installed_and_does_not_start_fails():
    made = {"usable": False, "found": "there, does not start", "advice": "libcudart.so.13 is missing"}
    found = judge.started(made, {})
    assert found.status == "failed"
    assert "libcudart.so.13" in found.checks[0].reason


def test_a_graph_without_an_engine_fails():
    made = {"flavor": "rtx", "version": "1.7", "targets": ["sm89"], "engines": [], "missing": ["itm"]}
    assert judge.engines(made, {}).status == "failed"


@pytest.mark.parametrize(
    ("made", "status"),
    [
        ({"passed": 3, "failed": [], "skips": {}, "exit_code": 0}, "passed"),
        ({"passed": 3, "failed": ["test_x: boom"], "skips": {}, "exit_code": 1}, "failed"),
        ({"passed": 0, "failed": [], "skips": {"no GPU": 9}, "exit_code": 0}, "skipped"),
        ({"passed": 3, "failed": [], "skips": {}, "exit_code": 2}, "failed"),
    ],
)
def test_tests_pass_only_if_one_ran_and_none_failed(made, status):
    assert judge.tested(made, {}).status == status


def test_tests_that_were_skipped_beside_others_are_named():
    made = {"passed": 3, "failed": [], "skips": {"provider rtx: not installed": 46}, "exit_code": 0}
    assert [(check.status, check.reason) for check in judge.tested(made, {}).checks] == [
        ("passed", ""),
        ("skipped", "provider rtx: not installed"),
    ]


def line(name, section=PARITY):
    return Line(name, section, f"title of {name}", ("true",), judge.ended_well, goals.ENDS_WELL)


def made_of(*results, dry_run=False, section=PARITY):
    lines = [line(result.name, section) for result in results]
    return document(lines, results, ENVIRONMENT, dry_run=dry_run)


@pytest.mark.parametrize(
    ("statuses", "section", "verdict", "code"),
    [
        (("passed", "passed"), PARITY, "passed", 0),
        (("passed", "skipped"), PARITY, "passed", 0),
        (("passed", "failed"), PARITY, "failed", 1),
        (("passed", "not run"), PARITY, "incomplete", 1),
        (("skipped", "skipped"), PARITY, "nothing shown", 3),
        (("passed", "passed"), PREPARATION, "nothing shown", 3),
    ],
)
def test_the_verdict_needs_a_bundle_that_ran_on_a_provider(statuses, section, verdict, code):
    results = [Result(str(number), status, reason="why") for number, status in enumerate(statuses)]
    made = made_of(*results, section=section)
    assert (made["verdict"], exit_code(made)) == (verdict, code)
    assert len(made["skipped"]) == statuses.count("skipped")


def test_a_figure_that_was_skipped_in_a_line_that_passed_is_named_and_counted():
    checks = (judge.check(goals.SPEED, 2.0), judge.skipped(goals.SPEED, "no compiler", what="vision, torch-compile"))
    made = made_of(Result("a", "passed", checks))
    assert made["skipped_figures"] == {"a": ["vision, torch-compile: no compiler"]}
    page = to_html(report(made))
    assert "1 passed; of the others 1 figures were skipped" in page
    assert "vision, torch-compile: no compiler" in page


def test_a_page_names_what_failed_and_was_skipped_and_a_dry_run_cannot_pass_for_an_acceptance():
    results = (
        Result("a", "failed", (judge.broken(goals.GATES, "out of memory: 80 GB"),), reason="out of memory: 80 GB"),
        Result("b", "skipped", reason="TensorRT-RTX is not installed"),
    )
    page = to_html(report(made_of(*results)))
    assert '<span class="badge bad">FAIL</span>' in page
    assert "out of memory: 80 GB" in page
    assert "TensorRT-RTX is not installed" in page
    assert "DRY RUN" not in page
    assert "NVIDIA L4" in page
    assert not {"http:", "https:", "<script"} & set(page.split('"'))
    dry = made_of(Result("a", "passed"), dry_run=True)
    assert dry["dry_run"] is True
    assert dry["verdict"] == "dry run passed"
    assert '<h1><span class="badge bad">DRY RUN</span> NO GPU: THIS IS NOT AN ACCEPTANCE</h1>' in to_html(report(dry))
