"""`qpert eval`: recall of a bundle on a data set, both directions, by object size."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import click

from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.bundle.manifest import read_manifest
from qpert.runtime.cli.options import RERANK_HELP, bundle_argument, json_option, provider_option
from qpert.runtime.errors import InputError
from qpert.runtime.evaluation.evaluate import check_data, evaluate, overridden
from qpert.runtime.evaluation.inputs import ENTITIES, NO_BOXES, EvaluationData, open_data
from qpert.runtime.evaluation.page import render
from qpert.runtime.evaluation.result import Evaluation
from qpert.runtime.evaluation.tables import Table, bin_table, notes, published_table, recall_table
from qpert.runtime.evaluation.work import Binding, check_room, open_work
from qpert.runtime.inputs.box_files import XmlCoordinates
from qpert.runtime.inputs.perturbation import Coverage, Perturbation, Reduction, Semantics
from qpert.runtime.progress import Progress, Terminal
from qpert.runtime.retrieval.encoder import Encoder
from qpert.runtime.verification.report import environment

DEFAULT_COORDINATES: dict[Semantics, XmlCoordinates] = {
    "paper": "one_based_inclusive",
    "release": "one_based_shift_all",
}


@click.command("eval", short_help="recall on a data set, by object size too", context_settings={"show_default": True})
@bundle_argument
@click.option("--dataset", required=True, help="a folder in LAVIS's layout, or demo: the generated scenes")
@click.option("--split", default="test", help="train, val or test")
@click.option(
    "--boxes", help="what perturbs: entities, none, or a box file [default: entities, if the bundle takes any]"
)
@click.option(
    "--bin-boxes", help="what sorts into size bins, likewise [default: entities if there are any, else --boxes]"
)
@click.option(
    "--xml-coordinates",
    type=click.Choice(get_args(XmlCoordinates)),
    help="how corners in XML are counted [default: one_based_inclusive; one_based_shift_all with --semantics release]",
)
@click.option("--skip-bad-boxes", is_flag=True, help="leave out boxes that are empty, inverted, not finite or outside")
@click.option("--rerank", type=click.IntRange(min=0), help=RERANK_HELP)
@click.option("--limit", type=click.IntRange(min=1), help="only the first so many images")
@click.option(
    "--semantics", type=click.Choice(get_args(Semantics)), help="reading of the method [default: the bundle's]"
)
@click.option("--alpha", type=float, help="strength of the perturbation [default: the bundle's, like all of these]")
@click.option("--beta", type=float, help="constant part of a box's weight")
@click.option("--gamma", type=float, help="part of a box's weight that grows with its area")
@click.option("--reduction", type=click.Choice(get_args(Reduction)), help="over the boxes of an image")
@click.option("--coverage", type=click.Choice(get_args(Coverage)), help="how a box covers patches")
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    help="keep features and scores here [default: in the cache until it is finished]",
)
@click.option("--threads", type=click.IntRange(min=0), default=0, help="CPU threads; 0 leaves it to ONNX Runtime")
@click.option("--html", type=click.Path(path_type=Path), help="also write the report page here")
@provider_option
@json_option
def command(
    bundle: Path,
    dataset: str,
    provider: str,
    work: Path | None,
    html: Path | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Recall of BUNDLE on a data set: R@K and, over ten bins of object size, mR@K.

    What is done is kept: after Ctrl-C, a crash or a kill, the same command goes on from there. The report is written to
    BUNDLE/reports.
    """
    progress = Terminal()
    opened = Bundle.open(bundle)
    perturbation = chosen_perturbation(opened, settings)
    data = chosen_data(opened, dataset, perturbation, settings, progress)
    encoder = Encoder(opened, provider, perturbation, threads=settings["threads"])
    try:
        check_data(encoder, data)  # before there is a work folder
        binding = Binding.of(encoder, data, provider)
        folder = open_work(work or binding.default_folder(), binding)
        evaluation = resumably(encoder, data, settings["rerank"], folder, progress)
    finally:
        encoder.close()
    evaluation = replace(evaluation, environment=environment(opened, provider))
    page = write_report(opened, evaluation, progress)
    if html is not None:
        write_page(html, page)
    if as_json:
        click.echo(json.dumps(evaluation.to_dict()))
    else:
        show(evaluation)
    if work is None:  # a folder in the cache that nobody asked for, and by now nothing can be lost
        shutil.rmtree(folder, ignore_errors=True)


def chosen_perturbation(bundle: Bundle, settings: dict[str, Any]) -> Perturbation:
    """The bundle's settings with the command line's in their place."""
    names = ("semantics", "alpha", "beta", "gamma", "reduction", "coverage")
    given = {name: settings[name] for name in names if settings[name] is not None}
    exported = bundle.manifest.perturbation
    if given and exported.stages == "none":
        raise InputError(
            f"this bundle was exported with --perturb none, so --{', --'.join(given)} would change nothing; "
            "leave them out, or export it with --perturb itc"
        )
    return overridden(exported, **given)


def chosen_data(
    bundle: Bundle, dataset: str, perturbation: Perturbation, settings: dict[str, Any], progress: Progress
) -> EvaluationData:
    """The split and its boxes; what was chosen for the user is said."""
    boxes = settings["boxes"]
    if boxes is None:
        boxes = ENTITIES if bundle.manifest.query_head.takes_boxes else NO_BOXES
    coordinates: XmlCoordinates = settings["xml_coordinates"] or DEFAULT_COORDINATES[perturbation.semantics]
    data = open_data(
        dataset,
        settings["split"],
        boxes=boxes,
        bin_boxes=settings["bin_boxes"],
        xml_coordinates=coordinates,
        skip_bad_boxes=settings["skip_bad_boxes"],
        limit=settings["limit"],
        progress=progress,
    )
    progress.say(f"{len(data.dataset):,} images, {len(data.dataset.captions):,} texts of {data.dataset.root}")
    progress.say(f"boxes that perturb: {data.boxes_from}; boxes that sort by size: {data.bins_from}")
    return data


def resumably(
    encoder: Encoder, data: EvaluationData, rerank: int | None, folder: Path, progress: Progress
) -> Evaluation:
    """Evaluate in a work folder, and say where it is if the user stops it."""
    check_room(folder, encoder, len(data.dataset))
    try:
        return evaluate(encoder, data, rerank=rerank, work=folder, progress=progress)
    except KeyboardInterrupt:
        progress.say(f"what is done is kept in {folder}; the same command goes on from there")
        raise


def write_report(bundle: Bundle, evaluation: Evaluation, progress: Progress) -> str:
    """Write `reports/eval.{json,html}`; returns the page. A bundle that cannot be written is evaluated all the same."""
    page = render(evaluation)
    try:
        now = Bundle(bundle.folder, read_manifest(bundle.folder))  # others may have written reports in these hours
        written = now.with_report("eval.html", page)
        written.with_report("eval.json", json.dumps(evaluation.to_dict(), indent=1) + "\n")
    except OSError as error:
        progress.say(f"the report is not kept: {bundle.folder} cannot be written ({error})")
    return page


def write_page(path: Path, page: str) -> None:
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise InputError(f"--html {path} cannot be written ({error.strerror}); the report is in the bundle") from error


def show(evaluation: Evaluation) -> None:
    """The tables on the terminal, then what has to be known beside them."""
    from rich.console import Console

    console = Console(highlight=False)
    tables = [recall_table(evaluation), bin_table(evaluation), published_table(evaluation)]
    for table in tables:
        if table is not None:
            console.print(table.title, style="bold", markup=False, soft_wrap=True)
            console.print(rich_table(table))
            for line in table.legend:
                console.print(line, markup=False, soft_wrap=True)
    for note in notes(evaluation):
        console.print(f"note: {note}", markup=False, soft_wrap=True)


def rich_table(table: Table) -> Any:
    from rich.markup import escape
    from rich.table import Table as RichTable

    made = RichTable()
    for place, name in enumerate(table.head):
        made.add_column(escape(name), justify="left" if place < table.words else "right")
    for row in table.rows:
        made.add_row(*map(escape, row))
    return made
