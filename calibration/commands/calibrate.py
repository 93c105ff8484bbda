"""`qpert calibrate`: perturbation settings by grid search on a validation split."""

from __future__ import annotations

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.bundle.manifest import read_manifest
from qpert.runtime.cli.eval import chosen_data, write_page
from qpert.runtime.cli.options import bundle_argument, command_line, json_option, require_export_extra
from qpert.runtime.errors import InputError, UnavailableError
from qpert.runtime.evaluation.inputs import EvaluationData
from qpert.runtime.evaluation.work import Binding, check_room, open_work
from qpert.runtime.files import cache_folder
from qpert.runtime.inputs.box_files import XmlCoordinates
from qpert.runtime.inputs.perturbation import WEIGHT_FUNCTIONS
from qpert.runtime.progress import Progress, Terminal
from qpert.runtime.retrieval.encoder import Encoder
from qpert.runtime.verification.report import environment

if TYPE_CHECKING:
    from qpert.calibration.perturbation.grid import Grid
    from qpert.calibration.perturbation.result import Calibration

SHOWN = 10


@click.command(
    "calibrate",
    short_help="perturbation settings by search on a validation split",
    context_settings={"show_default": True},
)
@bundle_argument
@click.option("--dataset", required=True, help="a folder in LAVIS's layout, or demo: the generated scenes")
@click.option("--split", default="val", help="train, val or test: take one that nothing is reported on")
@click.option("--boxes", default="entities", help="what perturbs: entities, or a box file")
@click.option(
    "--bin-boxes", help="what sorts into size bins, likewise [default: entities if there are any, else --boxes]"
)
@click.option(
    "--xml-coordinates",
    type=click.Choice(get_args(XmlCoordinates)),
    help="how corners in XML are counted, as in qpert eval",
)
@click.option("--skip-bad-boxes", is_flag=True, help="leave out boxes that are empty, inverted, not finite or outside")
@click.option("--limit", type=click.IntRange(min=1), help="only the first so many images")
@click.option("--alphas", default="2,4,6,8,10", help="strengths, with commas between them")
@click.option("--weights", default=",".join(WEIGHT_FUNCTIONS), help="weight functions of a box's share S of the image")
@click.option("--thresholds", default="0.85,0.9,0.95,0.99", help="contribution ratios of the key subspace")
@click.option("--reduction", type=click.Choice(["sum", "mean", "both"]), default="both", help="over an image's boxes")
@click.option(
    "--rerank",
    type=click.IntRange(min=0),
    default=0,
    help="score ITC + ITM of the best so many; 0 is ITC alone, which is all that a setting changes",
)
@click.option(
    "--score",
    type=click.Choice(["mr1", "r1", "small"]),
    default="mr1",
    help="what chooses: mR@1 as in the paper, R@1, or R@1 of the images with small objects only",
)
@click.option("--direction", type=click.Choice(["t2i", "i2t"]), default="t2i", help="text to image or image to text")
@click.option("--out", type=click.Path(path_type=Path), help="write a bundle with the best setting here")
@click.option("--apply", "in_place", is_flag=True, help="give BUNDLE itself the best setting")
@click.option("--regardless", is_flag=True, help="write it also where no perturbation scores as high")
@click.option("--checkpoint", help="the weights, for a new threshold's reference outputs [default: what was exported]")
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    help="keep features and scores here [default: in the cache until it is finished]",
)
@click.option("--threads", type=click.IntRange(min=0), default=0, help="CPU threads; 0 leaves it to ONNX Runtime")
@click.option("--html", type=click.Path(path_type=Path), help="also write the report page here")
@click.option("--provider", type=click.Choice(["cpu", "cuda"]), default="cpu", help="what runs the graphs")
@json_option
def command(bundle: Path, html: Path | None, as_json: bool, **options: Any) -> int:
    """Search the perturbation settings that score best on a validation split of images with boxes.

    Images and texts are encoded once for all settings, key subspaces once for each threshold. With --rerank the ITM
    pairs on any setting's shortlists are scored once: that is the paper's measure (with 64), and several times the work
    of one evaluation. What is done is kept: after Ctrl-C, a crash or a kill, the same command goes on from there. The
    report is written to BUNDLE/reports.

    Exits 1, and writes no bundle, where --out or --apply asks for one and no setting beats no perturbation.
    """
    require_onnx()
    grid = grid_of(options)
    target = target_of(bundle, options)
    progress = Terminal()
    opened = Bundle.open(bundle)
    found, folder = calibrate(opened, grid, options, progress)
    page = write_report(opened, found, progress)
    if html is not None:
        write_page(html, page)
    written = None
    if target is not None and (found.beaten or options["regardless"]):
        written = write_bundle(opened, found, page, target, options["checkpoint"], progress)
    if as_json:
        click.echo(json.dumps(found.to_dict() | {"bundle": None if written is None else str(written.folder)}))
    else:
        show(found)
        if written is not None:
            click.echo(written.folder)
    if options["work"] is None:  # a folder in the cache that nobody asked for, and by now nothing can be lost
        shutil.rmtree(folder, ignore_errors=True)
    return say_what_next(found, target, written, progress)


def calibrate(bundle: Bundle, grid: Grid, options: dict[str, Any], progress: Progress) -> tuple[Calibration, Path]:
    """Search and judge; also the work folder."""
    from qpert.calibration.perturbation.result import Calibration, check_score
    from qpert.calibration.perturbation.search import check_searchable, search

    given: dict[str, Any] = {
        name: options[name] for name in ("split", "boxes", "bin_boxes", "xml_coordinates", "skip_bad_boxes", "limit")
    }
    data = chosen_data(bundle, options["dataset"], bundle.manifest.perturbation, given, progress)
    provider, rerank = options["provider"], options["rerank"]
    encoder = Encoder(bundle, provider, threads=options["threads"])
    try:
        check_searchable(encoder, data, rerank)
        check_score(data, options["score"])
        folder = opened_work(encoder, data, provider, options["work"])
        try:
            result = search(
                encoder,
                data,
                grid,
                work=folder,
                rerank=rerank,
                provider=provider,
                threads=options["threads"],
                progress=progress,
            )
        except KeyboardInterrupt:
            progress.say(f"what is done is kept in {folder}; the same command goes on from there")
            raise
    finally:
        encoder.close()
    found = Calibration.judge(
        result,
        data,
        grid,
        bundle.manifest.perturbation,
        score=options["score"],
        direction=options["direction"],
        rerank=rerank,
    )
    return replace(found, environment=environment(bundle, provider)), folder


def grid_of(options: dict[str, Any]) -> Grid:
    from qpert.calibration.perturbation.grid import REDUCTIONS, Grid, parse_names, parse_numbers

    return Grid(
        parse_numbers(options["alphas"], "--alphas"),
        parse_names(options["weights"]),
        parse_numbers(options["thresholds"], "--thresholds"),
        REDUCTIONS if options["reduction"] == "both" else (options["reduction"],),
    )


def target_of(bundle: Path, options: dict[str, Any]) -> Path | None:
    """Where a bundle is to be written, if at all; refused before hours of work where it cannot be."""
    out: Path | None = options["out"]
    if out is not None and options["in_place"]:
        raise InputError("got --out and --apply; --out leaves BUNDLE as it is, --apply changes it: give one of them")
    if options["in_place"]:
        require_export_extra("changing a bundle's settings")
        return bundle
    if out is not None:
        require_export_extra("writing a calibrated bundle")
        from qpert.runtime.bundle.staging import check_target

        check_target(out, force=False)
    return out


def opened_work(encoder: Encoder, data: EvaluationData, provider: str, asked: Path | None) -> Path:
    """The work folder, bound to bundle and data; the settings of the grid may differ from run to run."""
    settings = encoder.manifest.perturbation
    fixed = {"search": True, "coverage": settings.coverage, "preserve_norm": settings.preserve_norm}
    binding = replace(Binding.of(encoder, data, provider), perturbation=fixed)
    folder = open_work(asked or cache_folder() / "calibrations" / binding.digest[:16], binding)
    check_room(folder, encoder, len(data.dataset))
    return folder


def require_onnx() -> None:
    """Raises UnavailableError where what cuts graphs is missing."""
    if importlib.util.find_spec("onnx") is None:
        raise UnavailableError("calibrating needs onnx, not installed here; pip install 'qpert[export]'")


def write_report(bundle: Bundle, found: Calibration, progress: Progress) -> str:
    """Write `reports/calibrate.{json,html}`; returns the page. A read-only bundle is searched all the same."""
    from qpert.calibration.perturbation.page import render

    page = render(found)
    try:
        now = Bundle(bundle.folder, read_manifest(bundle.folder))  # others may have written reports in these hours
        written = now.with_report("calibrate.html", page)
        written.with_report("calibrate.json", json.dumps(found.to_dict(), indent=1) + "\n")
    except OSError as error:
        progress.say(f"the report is not kept: {bundle.folder} cannot be written ({error})")
    return page


def write_bundle(
    bundle: Bundle, found: Calibration, page: str, target: Path, checkpoint: str | None, progress: Progress
) -> Bundle:
    """The bundle with the best setting, and the search that it comes from."""
    from qpert.calibration.perturbation.apply import apply_settings

    reports = {"calibrate.html": page, "calibrate.json": json.dumps(found.to_dict(), indent=1) + "\n"}
    return apply_settings(
        bundle,
        found.best_perturbation,
        target,
        provenance={"command": command_line(), "when": found.environment["when"]} | found.provenance(),
        reports=reports,
        checkpoint=checkpoint,
        progress=progress,
    )


def say_what_next(found: Calibration, target: Path | None, written: Bundle | None, progress: Progress) -> int:
    """The exit code: 1 where a bundle was asked for and no setting deserves one."""
    if written is not None:
        progress.say(f"wrote {written.folder} with {found.best}; next: qpert verify {written.folder}")
    elif target is not None:
        progress.say(
            "no bundle was written: no setting beats no perturbation on this split. Leave boxes out when you search, "
            "or pass --regardless to write the best setting all the same"
        )
        return 1
    return 0


def show(found: Calibration) -> None:
    """The verdict first, then the best settings."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from qpert.calibration.perturbation.summary import HEAD, headline, ranking_rows, reduction_lines, verdict

    console = Console(highlight=False)
    style = "bold green" if found.beaten and not found.none_within_noise else "bold yellow"
    console.print(headline(found), style=style if found.beaten else "bold red", markup=False, soft_wrap=True)
    for line in [*verdict(found), *reduction_lines(found)]:
        console.print(line, markup=False, soft_wrap=True)
    table = Table(box=SIMPLE_HEAD)
    for place, name in enumerate(HEAD):
        table.add_column(name.replace(" ", "\n"), justify="right" if place else "left")
    for row in ranking_rows(found, SHOWN):
        table.add_row(*map(escape, row))
    console.print(table)
