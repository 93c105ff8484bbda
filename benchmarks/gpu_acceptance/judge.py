"""From what a line's process printed to its checks."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from gpu_acceptance import goals
from gpu_acceptance.lines import Check, Document, Judge, Judged, Result, broken, check, skipped

COMPILED = "torch-compile"
Results = Mapping[str, Result]


def ended_well(document: Document, earlier: Results) -> Judged:
    """A command that did what it was asked for; its document is kept as figures where it is short."""
    short = {key: value for key, value in document.items() if isinstance(value, int | float | str)}
    return Judged((check(goals.ENDS_WELL, 0),), short)


def inspected(document: Document, earlier: Results) -> Judged:
    """`qpert inspect --json`."""
    ok = document.get("files_ok") is True
    return Judged((check(goals.FILES_WHOLE, 0 if ok else 1),), {"precision": document.get("precision")})


def started(document: Document, earlier: Results) -> Judged:
    """`measure.provider`."""
    found = f"{document['found']} {document['advice']}".strip()
    if document["usable"]:
        return Judged((check(goals.STARTS, 1),), {"found": found})
    return Judged((broken(goals.STARTS, found),), {"found": found})


def engines(document: Document, earlier: Results) -> Judged:
    """`measure.engines`: every graph has an engine that is not empty."""
    missing, built = document["missing"], document["engines"]
    figures = {
        "library": f"{document['flavor']} {document['version']}",
        "targets": ", ".join(document["targets"]),
        "megabytes": round(sum(engine["bytes"] for engine in built) / 1e6, 1),
        "build_seconds": {engine["graph"]: engine["seconds"] for engine in built},
    }
    return Judged((check(goals.BUILT, len(missing)),), figures | {"missing": missing})


def verified(document: Document, earlier: Results) -> Judged:
    """`qpert verify --json`: no gate fails. The figure nearest to its limit says how close it was."""
    gates = document["gates"]
    failed = [gate for gate in gates if not gate["pass"]]
    reason = "; ".join(f"{gate['name']} is {gate['value']}, limit {gate['limit']}" for gate in failed[:3])
    bad = max(len(failed), int(document["verdict"] != "pass"), int(not gates))
    found = broken(goals.GATES, reason or "no gates") if bad else check(goals.GATES, 0)
    near = max(gates, key=share_of_limit, default=None)
    figures = {
        "gates": len(gates),
        "failed": len(failed),
        "nearest_to_its_limit": near and {key: near[key] for key in ("name", "value", "limit")},
    }
    return Judged((found,), figures)


def share_of_limit(gate: Mapping[str, Any]) -> float:
    value, limit = gate["value"], gate["limit"]
    if value is None:
        return float("inf")
    return value / limit if limit else (float("inf") if value > 0 else 0.0)


def tested(document: Document, earlier: Results) -> Judged:
    """`measure.tests`: none fails, and one at least ran."""
    failed, passed, skips = document["failed"], document["passed"], document["skips"]
    figures = {"passed": passed, "failed": failed[:20], "skipped": skips}
    if failed:
        return Judged((broken(goals.TESTS, f"{len(failed)} failed, the first: {failed[0]}"),), figures)
    if document["exit_code"] not in (0, 5):  # 5: all were skipped while they were collected
        return Judged((broken(goals.TESTS, f"pytest ended with {document['exit_code']}"),), figures)
    if not passed:
        reasons = "; ".join(skips) or "no test is marked gpu"
        return Judged((skipped(goals.TESTS, f"all {sum(skips.values())} were skipped: {reasons}"),), figures)
    others = (skipped(goals.TESTS, reason, what=f"{count} tests") for reason, count in skips.items())
    return Judged((check(goals.TESTS, 0, what=f"{passed} tests, of which fail"), *others), figures)


def speed_judge(*, judged: bool, compiles: bool, peak: bool) -> Judge:
    """Of `measure.speed`. compiles: torch.compile is compared too. peak: the largest size has a share of the peak."""
    return partial(speed, judged=judged, names=("torch-sdpa", COMPILED) if compiles else ("torch-sdpa",), peak=peak)


def speed(document: Document, earlier: Results, *, judged: bool, names: tuple[str, ...], peak: bool) -> Judged:
    checks: list[Check] = []
    graph, rows = document["graph"], document["rows"]
    for row in rows:
        size = f"{graph}, batch {row['batch']}" + (f", {boxes_of(row)}" if row["boxes"] else "")
        if "error" in row:
            checks.append(broken(goals.SPEED, row["error"], what=size))
            continue
        for name in names:
            what = f"{size}, against {name}"
            if name in row["left_out"]:
                checks.append(skipped(goals.SPEED, row["left_out"][name], what=what))
            else:
                checks.append(check(goals.SPEED, row["baselines"][name]["ratio"], what=what, judged=judged))
    if peak and rows:
        share = rows[-1].get("share_of_peak")
        what = f"{graph}, batch {rows[-1]['batch']}: {goals.HALF_OF_PEAK.what}"
        checks.append(check(goals.HALF_OF_PEAK, share, what=what, judged=judged))
    return Judged(tuple(checks), {"rows": rows, "peak_tflops": document["peak_tflops"], "load": document["load"]})


def boxes_of(row: Mapping[str, Any]) -> str:
    return "1 box" if row["boxes"] == 1 else f"{row['boxes']} boxes"


def shares(document: Document, earlier: Results, *, judged: bool) -> Judged:
    """`measure.share`."""
    checks = []
    for row in document["rows"]:
        if not row["boxes"]:
            continue
        goal = goals.share_goal(row["boxes"])
        what = f"{boxes_of(row)}, batch {row['batch']}: {goal.what}"
        if "error" in row:
            checks.append(broken(goal, row["error"], what=what))
        else:
            checks.append(check(goal, row["percent"], what=what, judged=judged))
    return Judged(tuple(checks), {"rows": document["rows"]})


def memory(document: Document, earlier: Results, *, baseline: str, judged: bool) -> Judged:
    """`measure.memory`, against the line that measured PyTorch, if that has a figure of the same thing."""
    figures = {"megabytes": document["megabytes"], "of": document["of"]}
    before = earlier.get(baseline)
    theirs = before.figures if before and before.status == "passed" else {}
    if not theirs:
        return Judged((skipped(goals.MEMORY, f"{baseline} gave no figure to compare with"),), figures)
    if theirs["of"] != document["of"]:
        reason = f"measured differently: of {document['of']}, and of {theirs['of']}"
        return Judged((skipped(goals.MEMORY, reason),), figures)
    ratio = document["megabytes"] / theirs["megabytes"]
    return Judged((check(goals.MEMORY, ratio, judged=judged),), figures | {"torch_megabytes": theirs["megabytes"]})


def evaluation(document: Document, earlier: Results, *, judged: bool) -> Judged:
    """`measure.evaluation`: each data set against its FLOPs at half the peak."""
    checks = []
    half = document["peak_tflops"] * 1e12 * (goals.HALF_OF_PEAK.limit or 1.0)
    for name, figures in document["data_sets"].items():
        limit = figures["pflop"] * 1e15 / half
        what = f"{name}: {goals.EVALUATION.what}"
        checks.append(check(goals.EVALUATION, figures["seconds"], what=what, limit=limit, judged=judged))
    return Judged(tuple(checks), dict(document))
