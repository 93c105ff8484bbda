"""`qpert calibrate`: perturbation settings by grid search on a validation split."""

from __future__ import annotations

import shutil
from contextlib import closing
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.cli import options as shared
from qpert.runtime.cli.number_types import IntegerRange
from qpert.runtime.errors import InputError
from qpert.runtime.evaluation.inputs import EvaluationData
from qpert.runtime.evaluation.request import DataRequest
from qpert.runtime.evaluation.work import Binding, check_room, open_work, resumable
from qpert.runtime.files import cache_folder
from qpert.runtime.inputs.perturbation import WEIGHT_FUNCTIONS, Perturbation
from qpert.runtime.progress import Progress, Terminal
from qpert.runtime.report.files import environment, json_text, keep_reports, write_copy
from qpert.runtime.report.html import to_html
from qpert.runtime.retrieval.encoder import Encoder

if TYPE_CHECKING:
    from qpert.calibration.perturbation.grid import Grid
    from qpert.calibration.perturbation.result import Calibration


@click.command(
    "calibrate",
    short_help="perturbation settings by search on a validation split",
    context_settings={"show_default": True},
)
@shared.bundle_argument
@shared.dataset_option
@click.option("--split", default="val", help="train, val or test: use one that you report no results on")
@click.option("--boxes", default="entities", help="boxes that perturb: entities, or a box file")
@shared.bin_boxes_option
@shared.xml_option
@shared.skip_bad_option
@shared.max_boxes_option
@shared.limit_option
@click.option(
    "--alphas",
    help="strengths, comma-separated [default: the paper's 2,4,6,8,10, or its 0.2,0.4,0.6,0.8,1 for a bundle whose own "
    "α is at most 1]",
)
@click.option("--weights", default=",".join(WEIGHT_FUNCTIONS), help="weight functions of a box's share S of the image")
@click.option("--thresholds", default="0.85,0.9,0.95,0.99", help="contribution ratios of the key subspace")
@click.option(
    "--reductions",
    help="over an image's boxes: sum, mean, each (a query set for each box), each+stock "
    "[default: all; sum,mean if the bundle perturbs ITM]",
)
@click.option(
    "--rerank",
    type=IntegerRange(min=0),
    default=0,
    help="re-rank this many candidates by ITC + ITM; 0 is ITC alone, the only score that a setting changes",
)
@click.option(
    "--score",
    type=click.Choice(["mr1", "r1", "small"]),
    default="mr1",
    help="what to maximise: mR@1 as in the paper, R@1, or R@1 of the images with small objects only",
)
@click.option(
    "--direction",
    type=click.Choice(["t2i", "i2t", "both"]),
    default="t2i",
    help="text to image, image to text, or the mean of both",
)
@click.option("--out", type=shared.PATH, help="write a bundle with the best setting here")
@click.option("--apply", "in_place", is_flag=True, help="write the best setting into BUNDLE itself")
@click.option("--regardless", is_flag=True, help="write it even if it does not beat no perturbation")
@click.option(
    "--checkpoint", help="the weights, for a new threshold's reference outputs [default: the exported checkpoint]"
)
@shared.work_option
@shared.threads_option
@shared.html_option
@click.option("--provider", type=click.Choice(["cpu", "cuda", "openvino"]), default="cpu", help="what runs the graphs")
@shared.json_option
def command(bundle: Path, html: Path | None, as_json: bool, **options: Any) -> int:
    """Search the perturbation settings that score best on a validation split of images with boxes.

    Images and texts are encoded once for all settings, key subspaces once per threshold. With --rerank the ITM pairs on
    any setting's shortlists are scored once: that is the paper's measure (with 64), and several times the work of one
    evaluation. Finished work is kept: after Ctrl-C, a crash or a kill, the same command resumes. The report is written
    to BUNDLE/reports.

    Exits 1, and writes no bundle, if --out or --apply asks for one and no setting beats no perturbation.
    """
    shared.require("calibrating", ("onnx",), "export")
    from qpert.calibration.perturbation.report import calibration_report

    opened = Bundle.open(bundle)
    grid = grid_of(options, opened.manifest.perturbation)
    target = target_of(bundle, options)
    progress = Terminal()
    found, folder = calibrate(opened, grid, options, progress)
    report, document = calibration_report(found), found.to_dict()
    reports = {"calibrate.html": to_html(report), "calibrate.json": json_text(document)}
    keep_reports(opened, reports, progress)
    write_copy("--html", html, reports["calibrate.html"])
    written = None
    if target is not None and (found.improves or options["regardless"]):
        written = write_bundle(opened, found, reports, target, options["checkpoint"], progress)
    document["bundle"] = None if written is None else str(written.folder)
    shared.print_result(document, lambda: report, as_json=as_json)
    if written is not None and not as_json:
        click.echo(written.folder)
    if options["work"] is None:  # in the cache and no longer needed
        shutil.rmtree(folder, ignore_errors=True)
    return report_next_step(found, target, written, progress)


def calibrate(bundle: Bundle, grid: Grid, options: dict[str, Any], progress: Progress) -> tuple[Calibration, Path]:
    """Search and judge; also the work folder."""
    from qpert.calibration.perturbation.result import Calibration, check_score
    from qpert.calibration.perturbation.search import check_searchable, search

    asked = DataRequest(**{field.name: options[field.name] for field in fields(DataRequest)})
    data = asked.open(bundle, bundle.manifest.perturbation.semantics, progress)
    provider, rerank, threads = options["provider"], options["rerank"], options["threads"]
    with closing(Encoder(bundle, provider, threads=threads)) as encoder:
        check_searchable(encoder, data, rerank)
        check_score(data, options["score"])
        folder = opened_work(encoder, data, provider, options["work"])
        settings = {"rerank": rerank, "provider": provider, "threads": threads, "progress": progress}
        with resumable(folder, progress):
            result = search(encoder, data, grid, work=folder, **settings)
    exported, chosen = bundle.manifest.perturbation, {name: options[name] for name in ("score", "direction", "rerank")}
    found = Calibration.judge(result, data, grid, exported, **chosen)
    return replace(found, environment=environment(bundle, provider)), folder


def grid_of(options: dict[str, Any], exported: Perturbation) -> Grid:
    """Raises InputError for values that no grid takes, or a reduction that the bundle's graphs cannot follow."""
    from qpert.calibration.perturbation.grid import Grid, GridReduction, alphas_around

    asked = options["reductions"] or ("sum,mean" if exported.stages == "both" else "sum,mean,each,each+stock")
    alphas = options["alphas"]
    grid = Grid(
        shared.parse_numbers(alphas, "--alphas", "2,4,6") if alphas else alphas_around(exported.alpha),
        shared.parse_names(options["weights"]),
        shared.parse_numbers(options["thresholds"], "--thresholds", "0.9,0.95"),
        cast(tuple[GridReduction, ...], shared.parse_names(asked)),  # Grid checks them
    )
    for setting in grid.at(grid.thresholds[0]):
        setting.perturbation(exported)
    return grid


def target_of(bundle: Path, options: dict[str, Any]) -> Path | None:
    """The folder to write a bundle to, if any; a folder that cannot be used is refused before hours of work."""
    out: Path | None = options["out"]
    if out is not None and options["in_place"]:
        raise InputError(
            "got --out and --apply; --out leaves BUNDLE unchanged, --apply changes it: give one of them",
            code="out-and-apply",
        )
    if options["in_place"]:
        shared.require_export_extra("changing a bundle's settings")
        return bundle
    if out is not None:
        shared.require_export_extra("writing a calibrated bundle")
        from qpert.runtime.bundle.staging import check_target

        check_target(out, force=False)
    return out


def opened_work(encoder: Encoder, data: EvaluationData, provider: str, asked: Path | None) -> Path:
    """The work folder, bound to bundle and data; the grid may differ between runs."""
    settings = encoder.manifest.perturbation
    fixed = {"search": True} | {name: getattr(settings, name) for name in ("coverage", "preserve_norm", "centre_keys")}
    binding = replace(Binding.of(encoder, data, provider), perturbation=fixed)
    folder = open_work(asked or cache_folder() / "calibrations" / binding.digest[:16], binding)
    check_room(folder, encoder, len(data.dataset))
    return folder


def write_bundle(
    bundle: Bundle,
    found: Calibration,
    reports: dict[str, str],
    target: Path,
    checkpoint: str | None,
    progress: Progress,
) -> Bundle:
    """Write the bundle with the best setting and a record of the search."""
    from qpert.calibration.perturbation.apply import apply_settings

    return apply_settings(
        bundle,
        found.best_perturbation,
        target,
        provenance={"command": shared.command_line(), "when": found.environment["when"]} | found.provenance(),
        reports=reports,
        checkpoint=checkpoint,
        progress=progress,
    )


def report_next_step(found: Calibration, target: Path | None, written: Bundle | None, progress: Progress) -> int:
    """The exit code: 1 if a bundle was asked for and no setting beats no perturbation."""
    if written is not None:
        progress.say(f"wrote {written.folder} with {found.best}; next: qpert verify {written.folder}")
    elif target is not None:
        progress.say(
            "no bundle was written: no setting beats no perturbation on this split. Leave boxes out when you search, "
            "or pass --regardless to write the best setting anyway"
        )
        return 1
    return 0
