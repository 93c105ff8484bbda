"""`qpert verify`: does a bundle compute what PyTorch computes? Exits 1 where it does not."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import click

from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.bundle.samples import Samples
from qpert.runtime.cli import options as shared
from qpert.runtime.cli.number_types import Integer, IntegerRange
from qpert.runtime.errors import InputError
from qpert.runtime.inputs.numbers import parse_float
from qpert.runtime.progress import Progress, Terminal
from qpert.runtime.report.files import environment, write_copy
from qpert.runtime.report.html import to_html
from qpert.runtime.report.markdown import to_markdown
from qpert.runtime.retrieval.encoder import Encoder
from qpert.runtime.verification.live import limits_for, verify_live
from qpert.runtime.verification.reference import live_references
from qpert.runtime.verification.report import keep_report, parity_report
from qpert.runtime.verification.result import Verification
from qpert.runtime.verification.tensors import verify_tensors

LEVELS = ("tensor", "rank", "recall")
REFERENCES = ("recorded", "torch", "hf", "lavis", "open_clip")
IMAGES = {"rank": 50, "recall": 100}
"""Images of the data set without --limit: a minute or two on two cores for the demonstration."""
DATA_OPTIONS = ("dataset", "split", "boxes", "skip_bad_boxes", "limit", "rerank", "allow")


@click.command(
    "verify", short_help="does a bundle compute what PyTorch computes?", context_settings={"show_default": True}
)
@shared.bundle_argument
@click.option(
    "--level",
    type=click.Choice(LEVELS),
    default="tensor",
    help="what to compare: outputs of every graph; rankings; recall with an interval",
)
@click.option(
    "--reference",
    type=click.Choice(REFERENCES),
    help="what to compare with [default: recorded at level tensor, torch at rank and recall]",
)
@click.option("--checkpoint", help="the checkpoint of a live reference [default: the exported one]")
@click.option("--seed", type=Integer(), default=1, help="seed of the fresh inputs for a live reference")
@click.option("--dataset", help="rank, recall: a folder in LAVIS's layout, or demo [default: demo, generated scenes]")
@click.option("--split", help="rank, recall: train, val or test [default: test]")
@click.option("--boxes", help="rank, recall: entities, none, or a box file [default: entities if there are any]")
@click.option("--skip-bad-boxes", is_flag=True, help="rank, recall: leave out boxes that cannot be used")
@click.option("--limit", type=IntegerRange(min=1), help="rank, recall: images to use [default: 50, 100]")
@click.option(
    "--rerank",
    type=IntegerRange(min=1),
    help="rank, recall: length of the shortlists [default: 64; 0 without a pair scorer]",
)
@click.option(
    "--allow",
    multiple=True,
    metavar="NAME=VALUE",
    help="rank, recall: replace a limit of the precision: itc, itm (how far a score may differ), far (percent of "
    "scores that may differ more), first, order, decision (percent that change outside ties), r1 (points)",
)
@shared.html_option
@click.option("--markdown", type=shared.PATH, help="also write the report as Markdown here")
@shared.provider_option
@shared.json_option
def command(
    bundle: Path,
    level: str,
    reference: str | None,
    checkpoint: str | None,
    seed: int,
    html: Path | None,
    markdown: Path | None,
    provider: str,
    as_json: bool,
    **data: Any,
) -> int:
    """Compare BUNDLE with a reference; the report is written to BUNDLE/reports and the verdict to its manifest."""
    progress = Terminal()
    opened = Bundle.open(bundle)
    if level == "tensor":
        check_no_data(data)
        if reference is None:
            progress.say(
                f"comparing with the outputs recorded at export; use --reference {'|'.join(REFERENCES[1:])} for a live "
                "reference"
            )
        found = verify(opened, reference or "recorded", checkpoint, provider=provider, seed=seed, progress=progress)
    else:
        found = verify_order(opened, level, reference or "torch", checkpoint, data, provider, progress)
    verification = found.with_run(environment(opened, provider), shared.command_line())
    report = parity_report(verification)
    keep_report(opened, verification, report, progress)
    write_copy("--html", html, to_html(report))
    write_copy("--markdown", markdown, to_markdown(report))
    shared.print_result(verification.to_dict(), lambda: report, as_json=as_json)
    return 0 if verification.passed else 1


def check_no_data(data: dict[str, Any]) -> None:
    """Raise InputError for an option that level `tensor` would ignore."""
    if given := [name for name in DATA_OPTIONS if data[name]]:
        options = ", ".join("--" + name.replace("_", "-") for name in given)
        raise InputError(f"{options} is for --level rank or recall; level tensor needs no data set", code="data-unused")


def verify(
    bundle: Bundle, reference: str, checkpoint: str | None, *, provider: str, seed: int, progress: Progress
) -> Verification:
    """Level `tensor` against the recorded outputs, or against a live reference on the recorded and on fresh inputs."""
    samples = bundle.samples()
    if reference == "recorded" and checkpoint is not None:
        raise InputError(
            "--checkpoint is for a live reference; add --reference torch, hf, lavis or open_clip",
            code="checkpoint-without-reference",
        )
    with closing(
        Encoder(bundle, provider)
    ) as encoder:  # first: a missing provider is an error before the reference runs
        if reference != "recorded":
            samples = live_samples(bundle, reference, checkpoint, samples, seed)
        return verify_tensors(
            encoder, samples.cases, samples, reference=reference, provider=provider, progress=progress
        )


def live_samples(bundle: Bundle, reference: str, checkpoint: str | None, samples: Samples, seed: int) -> Samples:
    references = live_references(f"a live reference ({reference})")
    return references.live_samples(bundle.manifest, reference, checkpoint, samples, seed=seed)


def verify_order(
    bundle: Bundle,
    level: str,
    reference: str,
    checkpoint: str | None,
    data: dict[str, Any],
    provider: str,
    progress: Progress,
) -> Verification:
    """Levels `rank` and `recall`: both sides score the same data set."""
    if reference == "recorded":
        raise InputError(
            f"--level {level} compares rankings, and a bundle records no scores of pictures and captions; use "
            "--reference torch, hf, lavis or open_clip, or --level tensor",
            code="level-needs-reference",
        )
    references = live_references(f"a live reference ({reference})")
    limits = limits_for(bundle.manifest.precision, allowed(data["allow"]))
    split = opened_data(bundle, level, data, progress)
    samples = bundle.samples()
    with (
        closing(Encoder(bundle, provider)) as encoder,
        references.open_scorer(bundle.manifest, reference, checkpoint) as scorer,
    ):
        settings: dict[str, Any] = {
            "level": level,
            "limits": limits,
            "rerank": data["rerank"],
            "provider": provider,
        }
        return verify_live(encoder, scorer, split, samples, **settings, progress=progress)


def allowed(options: tuple[str, ...]) -> dict[str, float]:
    """Parse `--allow NAME=VALUE` to numbers by name. Raises InputError for any other form."""
    found = {}
    for option in options:
        name, _, value = option.partition("=")
        try:
            found[name] = parse_float(value)
        except ValueError:
            raise InputError(
                f"--allow {option}: expected NAME=VALUE, such as --allow r1=0.3", code="allow-format"
            ) from None
    return found


def opened_data(bundle: Bundle, level: str, data: dict[str, Any], progress: Progress) -> Any:
    """The split to score; reports the defaults it chooses."""
    from qpert.runtime.evaluation.inputs import DEMO, DEMO_SETS, ENTITIES, NO_BOXES
    from qpert.runtime.evaluation.request import DataRequest
    from qpert.runtime.inputs.datasets import has_entities

    dataset = data["dataset"] or DEMO
    boxes = data["boxes"]
    if boxes is None:
        takes = bundle.manifest.query_head.takes_boxes
        boxes = ENTITIES if takes and (dataset in DEMO_SETS or has_entities(Path(dataset))) else NO_BOXES
    limit = data["limit"] or IMAGES[level]
    if data["limit"] is None:
        progress.say(f"using at most {limit:,} images; change this with --limit")
    request = DataRequest(dataset, data["split"] or "test", boxes, skip_bad_boxes=data["skip_bad_boxes"], limit=limit)
    return request.open(bundle, bundle.manifest.perturbation.semantics, progress)
