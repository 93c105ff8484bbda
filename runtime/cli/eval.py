"""`qpert eval`: recall of a bundle on a data set, both directions, by object size."""

from __future__ import annotations

import shutil
from contextlib import closing
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args

import click

from qpert.runtime.bundle.calibrated import calibration_notice
from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.cli import options as shared
from qpert.runtime.cli.number_types import IntegerRange, Number
from qpert.runtime.errors import InputError
from qpert.runtime.evaluation.evaluate import check_data, evaluate, overridden
from qpert.runtime.evaluation.report import evaluation_report
from qpert.runtime.evaluation.request import DataRequest
from qpert.runtime.evaluation.work import Binding, check_room, open_work, resumable
from qpert.runtime.inputs.perturbation import Coverage, Perturbation, Reduction, Semantics
from qpert.runtime.progress import Terminal
from qpert.runtime.report.files import environment, json_text, keep_reports, write_copy
from qpert.runtime.report.html import to_html
from qpert.runtime.retrieval.encoder import Encoder


@click.command("eval", short_help="recall on a data set, by object size too", context_settings={"show_default": True})
@shared.bundle_argument
@shared.dataset_option
@click.option("--split", default="test", help="train, val or test")
@click.option(
    "--boxes", help="boxes that perturb: entities, none, or a box file [default: entities, if the bundle takes boxes]"
)
@shared.bin_boxes_option
@shared.xml_option
@shared.skip_bad_option
@shared.max_boxes_option
@click.option("--rerank", type=IntegerRange(min=0), help=shared.RERANK_HELP)
@shared.limit_option
@click.option(
    "--semantics", type=click.Choice(get_args(Semantics)), help="reading of the method [default: the bundle's]"
)
@click.option("--alpha", type=Number(), help="strength of the perturbation [default: the bundle's, like all of these]")
@click.option("--beta", type=Number(), help="constant part of a box's weight")
@click.option("--gamma", type=Number(), help="part of a box's weight that grows with its area")
@click.option("--reduction", type=click.Choice(get_args(Reduction)), help=shared.REDUCTION_HELP)
@click.option("--keep-stock/--no-keep-stock", default=None, help=shared.KEEP_STOCK_HELP)
@click.option("--coverage", type=click.Choice(get_args(Coverage)), help="how a box covers patches")
@shared.work_option
@shared.threads_option
@shared.html_option
@shared.provider_option
@shared.json_option
def command(bundle: Path, provider: str, work: Path | None, html: Path | None, as_json: bool, **settings: Any) -> None:
    """Recall of BUNDLE on a data set: R@K and, over ten bins of object size, mR@K.

    Finished work is kept: after Ctrl-C, a crash or a kill, the same command resumes. The report is written to
    BUNDLE/reports.
    """
    progress = Terminal()
    opened = Bundle.open(bundle)
    perturbation = chosen_perturbation(opened, settings)
    asked = DataRequest(**{field.name: settings[field.name] for field in fields(DataRequest)})
    data = asked.open(opened, perturbation.semantics, progress)
    with closing(Encoder(opened, provider, perturbation, threads=settings["threads"])) as encoder:
        check_data(encoder, data)  # before a work folder is made
        notice = calibration_notice(opened.manifest, perturbation, bundle) if any(map(len, data.boxes)) else None
        if notice is not None:
            progress.say(notice)
        binding = Binding.of(encoder, data, provider)
        folder = open_work(work or binding.default_folder(), binding)
        check_room(folder, encoder, len(data.dataset))
        with resumable(folder, progress):
            evaluation = evaluate(encoder, data, rerank=settings["rerank"], work=folder, progress=progress)
    evaluation = replace(evaluation, environment=environment(opened, provider), notice=notice)
    report, document = evaluation_report(evaluation), evaluation.to_dict()
    page = to_html(report)
    keep_reports(opened, {"eval.html": page, "eval.json": json_text(document)}, progress)
    write_copy("--html", html, page)
    shared.print_result(document, lambda: report, as_json=as_json)
    if work is None:  # in the cache and no longer needed
        shutil.rmtree(folder, ignore_errors=True)


def chosen_perturbation(bundle: Bundle, settings: dict[str, Any]) -> Perturbation:
    """The bundle's settings, overridden by those of the command line."""
    names = ("semantics", "alpha", "beta", "gamma", "reduction", "keep_stock", "coverage")
    given = {name: settings[name] for name in names if settings[name] is not None}
    exported = bundle.manifest.perturbation
    if given and exported.stages == "none":
        raise InputError(
            f"this bundle was exported with --perturb none, so --{', --'.join(given)} would change nothing; "
            "leave them out, or export it with --perturb itc",
            code="bundle-without-boxes",
        )
    return overridden(exported, **given)
