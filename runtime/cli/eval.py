"""`qpert eval`: recall of a bundle on a data set, both directions, by object size."""

from __future__ import annotations

import shutil
from contextlib import closing
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args

import click

from qpert.runtime.bundle.calibrated import calibration_notice
from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.cli import options as shared
from qpert.runtime.cli.number_types import IntegerRange, Number
from qpert.runtime.errors import InputError
from qpert.runtime.evaluation.evaluate import check_data, evaluate, overridden
from qpert.runtime.evaluation.inputs import ENTITIES, EvaluationData
from qpert.runtime.evaluation.methods.choices import (
    DEFAULT,
    Choices,
    Joins,
    Method,
    Pooling,
    SeveralBoxes,
    Similarity,
    parse_methods,
)
from qpert.runtime.evaluation.methods.compare import check_comparison, compare
from qpert.runtime.evaluation.methods.report import comparison_report
from qpert.runtime.evaluation.report import evaluation_report
from qpert.runtime.evaluation.request import DataRequest
from qpert.runtime.evaluation.work import Binding, check_room, open_work, resumable
from qpert.runtime.inputs.perturbation import Coverage, Perturbation, Reduction, Semantics
from qpert.runtime.progress import Progress, Terminal
from qpert.runtime.report.files import environment, json_text, keep_reports, write_copy
from qpert.runtime.report.html import to_html
from qpert.runtime.report.model import Report
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
@click.option(
    "--method", default=DEFAULT, help="q-pert, or-q-pert, oes, none; several with commas between are compared"
)
@click.option(
    "--or-q-pert-boxes",
    "several_boxes",
    type=click.Choice(get_args(SeveralBoxes)),
    default=Choices.several_boxes,
    help="OrQ-Pert of several boxes: complement of their mean or summed projectors, of their joint span, or of each",
)
@click.option(
    "--oes-pooling",
    "pooling",
    type=click.Choice(get_args(Pooling)),
    default=Choices.pooling,
    help="what the queries see of an object: its mean token, its tokens (needs onnx), or the picture cropped to it",
)
@click.option(
    "--oes-similarity",
    "similarity",
    type=click.Choice(get_args(Similarity)),
    default=Choices.similarity,
    help="of a text with an object's queries",
)
@click.option(
    "--oes-joins",
    "joins",
    type=click.Choice(get_args(Joins)),
    default=Choices.joins,
    help="OEs are added to ITC, so to shortlist and final score, or to the final score alone",
)
@shared.work_option
@shared.threads_option
@shared.html_option
@shared.provider_option
@shared.json_option
def command(bundle: Path, provider: str, work: Path | None, html: Path | None, as_json: bool, **settings: Any) -> None:
    """Recall of BUNDLE on a data set: R@K and, over ten bins of object size, mR@K.

    With --method the paper's baselines, and several methods side by side with intervals of their differences.

    Finished work is kept: after Ctrl-C, a crash or a kill, the same command resumes. The report is written to
    BUNDLE/reports.
    """
    progress = Terminal()
    opened = Bundle.open(bundle)
    methods = parse_methods(settings["method"])
    choices = Choices(**{field.name: settings[field.name] for field in fields(Choices)})
    perturbation = chosen_perturbation(opened, settings)
    asked = DataRequest(**{field.name: settings[field.name] for field in fields(DataRequest)})
    if "oes" in methods:  # also where the graphs take no boxes
        asked = replace(asked, boxes=asked.boxes or ENTITIES)
    data = asked.open(opened, perturbation.semantics, progress)
    with closing(Encoder(opened, provider, perturbation, threads=settings["threads"])) as encoder:
        one = _Run(opened, encoder, data, methods, choices, settings["rerank"], progress)
        one.check()  # before a work folder is made
        binding = Binding.of(encoder, data, provider)
        folder = open_work(work or binding.default_folder(), binding)
        check_room(folder, encoder, len(data.dataset))
        with resumable(folder, progress):
            report, document = one.run(folder)
    page = to_html(report)
    keep_reports(opened, {"eval.html": page, "eval.json": json_text(document)}, progress)
    write_copy("--html", html, page)
    shared.print_result(document, lambda: report, as_json=as_json)
    if work is None:  # in the cache and no longer needed
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class _Run:
    """The perturbation alone, or methods that are compared."""

    bundle: Bundle
    encoder: Encoder
    data: EvaluationData
    methods: tuple[Method, ...]
    choices: Choices
    rerank: int | None
    progress: Progress

    def check(self) -> None:
        """Raise what would stop the run, before hours of work."""
        if self.methods == (DEFAULT,):
            check_data(self.encoder, self.data)
        else:
            check_comparison(self.encoder, self.data, self.methods, self.choices, self.encoder.shortlist(self.rerank))
        if self.notice is not None:
            self.progress.say(self.notice)

    @property
    def notice(self) -> str | None:
        if DEFAULT not in self.methods or not any(map(len, self.data.boxes)):
            return None
        return calibration_notice(self.bundle.manifest, self.encoder.perturbation, self.bundle.folder)

    def run(self, work: Path) -> tuple[Report, dict[str, Any]]:
        """The report and its JSON."""
        facts = environment(self.bundle, self.encoder.provider)
        if self.methods == (DEFAULT,):
            evaluation = evaluate(self.encoder, self.data, rerank=self.rerank, work=work, progress=self.progress)
            evaluation = replace(evaluation, environment=facts, notice=self.notice)
            return evaluation_report(evaluation), evaluation.to_dict()
        asked = (self.encoder, self.data, self.methods, self.choices)
        found = compare(*asked, rerank=self.rerank, work=work, progress=self.progress)
        found = found.described(facts, self.notice)
        return comparison_report(found), found.to_dict()


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
