"""The report: verdict first, then what failed and what was skipped, every figure beside its goal, and the machine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qpert.runtime.report.model import (
    UNDEFINED,
    Badge,
    Bullets,
    Paragraph,
    Report,
    Section,
    Table,
    Text,
    number,
    pairs,
    paragraphs,
    verdict_badge,
)

BADGES = {
    "passed": verdict_badge(True),
    "failed": verdict_badge(False),
    "skipped": Badge("skipped", "quiet"),
    "not judged": Badge("not judged", "quiet"),
    "not run": Badge("not run", "unsure"),
}
DRY_RUN = (Badge("DRY RUN", "bad"), " NO GPU: THIS IS NOT AN ACCEPTANCE")
LOUD = {"passed": Badge("PASSED", "good"), "failed": Badge("FAILED", "bad")}
SPEED_HEAD = ("graph", "batch", "boxes", "ms", "p95", "per second", "of peak", "× SDPA", "× compile", "compiled in")


def report(made: dict[str, Any]) -> Report:
    """From the document to the page."""
    blocks = [*head(made), *sections(made), *speeds(made), *rates(made), goals(made), machine(made["environment"])]
    if made["dry_run"]:
        return Report("qpert GPU acceptance: DRY RUN", DRY_RUN, tuple(blocks))
    gpu = made["environment"]["gpu"]["name"]
    heading = (f"GPU acceptance on {gpu} ", LOUD.get(made["verdict"], Badge(made["verdict"].upper(), "unsure")))
    return Report(f"qpert GPU acceptance: {gpu}", heading, tuple(blocks))


def head(made: dict[str, Any]) -> Iterator[Any]:
    """The verdict in a sentence, what failed, what was skipped."""
    counts = made["counts"]
    told = ", ".join(f"{counts[status]} {status}" for status in BADGES if counts.get(status))
    if made["dry_run"]:
        yield from paragraphs(
            "The lines below ran on the CPU, with a small model, to test this script. They say nothing about any GPU; "
            "figures of speed and memory are not held against their goals.",
            tone="bad",
        )
    tone = {"passed": "good", "failed": "bad", "dry run failed": "bad"}.get(made["verdict"], "unsure")
    figures = sum(map(len, made["skipped_figures"].values()))
    told += f"; of the others {figures} figures were skipped" if figures else ""
    yield Paragraph(f"{made['verdict'].capitalize()}. {len(made['lines'])} lines: {told}.", tone)  # type: ignore[arg-type]
    if made["failed"]:
        yield Section("Failed", (named(made["failed"], made),))
    if made["skipped"] or figures:
        note = Paragraph("What was skipped has shown nothing.")
        single = {name: "; ".join(reasons) for name, reasons in made["skipped_figures"].items()}
        yield Section("Skipped", (note, named(made["skipped"] | single, made)))


def named(reasons: dict[str, str], made: dict[str, Any]) -> Bullets:
    titles = {row["name"]: f"{row['section']}: {row['title']}" for row in made["lines"]}
    return Bullets(tuple(f"{titles[name]} ({name}): {reason}" for name, reason in reasons.items()))


def sections(made: dict[str, Any]) -> Iterator[Section]:
    """A table of each section: a row for each figure."""
    for title in dict.fromkeys(row["section"] for row in made["lines"]):
        rows = [cells for row in made["lines"] if row["section"] == title for cells in checks(row)]
        yield Section(title, (Table(("", "what", "figure", "goal"), tuple(rows), words=2),))


def checks(row: dict[str, Any]) -> Iterator[tuple[Text, ...]]:
    """The rows of one line; one without figures where it was not run."""
    if not row["checks"]:
        yield BADGES[row["status"]], row["title"], UNDEFINED, UNDEFINED
    for check in row["checks"]:
        unit = f" {check['unit']}" if check["unit"] else ""
        shown = number(check["value"], ".4g") + (unit if check["value"] is not None else "")
        goal = check["goal"]
        yield BADGES[check["status"]], f"{row['title']} · {check['what']}", shown, goal


def speeds(made: dict[str, Any]) -> Iterator[Section]:
    """Milliseconds and ratios behind the checks of speed."""
    found = []
    for row in made["lines"]:
        if not row["name"].startswith("speed-"):
            continue
        for one in row["figures"].get("rows", ()):
            if "error" not in one:
                found.append(speed_cells(row, one))
    if found:
        head_cells = (
            "graph",
            "batch",
            "boxes",
            "ms",
            "p95",
            "per second",
            "of peak",
            "× SDPA",
            "× compile",
            "compiled in",
        )
        yield Section("Speed in figures", (Table(head_cells, tuple(found)),))


def speed_cells(row: dict[str, Any], one: dict[str, Any]) -> tuple[str, ...]:
    sdpa, compiled = (one["baselines"].get(name, {}) for name in ("torch-sdpa", "torch-compile"))
    return (
        row["name"].removeprefix("speed-"),
        str(one["batch"]),
        str(one["boxes"] or ""),
        number(one["median_ms"], ".3g"),
        number(one["p95_ms"], ".3g"),
        number(one["per_second"], ",.0f"),
        number(100 * one["share_of_peak"], ".0f") + " %",
        number(sdpa.get("ratio"), ".2f"),
        number(compiled.get("ratio"), ".2f"),
        "" if "compile_seconds" not in compiled else f"{compiled['compile_seconds']:.1f} s",
    )


def rates(made: dict[str, Any]) -> Iterator[Section]:
    """What was measured of an evaluation, and what it comes to for each data set."""
    rows = []
    for row in made["lines"]:
        figures = row["figures"]
        if "per_second" not in figures or "data_sets" not in figures:
            continue
        per = figures["per_second"]
        cells = [row["title"], *(number(per[name], ",.1f") for name in ("images", "texts", "pairs"))]
        rows.append((*cells, *(f"{one['seconds']:,.1f} s" for one in figures["data_sets"].values())))
        names = tuple(figures["data_sets"])
    if rows:
        legend = (
            "Per second, from image files to ranks, in a second run; the times of the data sets are extrapolated from "
            "their numbers of images, texts and pairs.",
        )
        table = Table(("bundle", "images", "texts", "pairs", *names), tuple(rows), legend=legend)
        yield Section("Evaluation in figures", (table,))


def goals(made: dict[str, Any]) -> Section:
    """Every goal with its source or reason."""
    found = {
        (check["why"], check["goal"]): (check["what"].rsplit(": ", 1)[-1], check["goal"], check["why"])
        for row in made["lines"]
        for check in row["checks"]
    }
    distinct = {why: (what, goal, why) for what, goal, why in found.values()}
    return Section("Goals, and where they come from", (Table(("", "goal", "why"), tuple(distinct.values()), words=3),))


def machine(environment: dict[str, Any]) -> Section:
    gpu = environment["gpu"] or {"name": "none"}
    facts = {f"GPU: {name}": value for name, value in gpu.items()}
    facts |= {"commit": environment["commit"] or "unknown", "code": environment["code"][:16]}
    facts |= {name: str(environment["machine"][name]) for name in ("cpu", "cores", "system", "python", "when")}
    return Section("Machine", (pairs(facts), Section("Packages", (pairs(environment["packages"]),))))
