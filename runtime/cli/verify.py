"""`qpert verify`: does a bundle compute what PyTorch computes? Exits 1 where it does not."""

from __future__ import annotations

import json
from pathlib import Path

import click

from qpert.runtime.bundle import Bundle
from qpert.runtime.cli.options import bundle_argument, json_option, provider_option, require_export_extra
from qpert.runtime.encoder import Encoder
from qpert.runtime.errors import InputError
from qpert.runtime.progress import Progress, Terminal
from qpert.runtime.report import environment, write_report
from qpert.runtime.samples import Case, Samples
from qpert.runtime.verification import Verification, verify_tensors

LEVELS = ("tensor",)
REFERENCES = ("recorded", "torch", "hf", "lavis")


@click.command("verify", context_settings={"show_default": True})
@bundle_argument
@click.option(
    "--reference", type=click.Choice(REFERENCES), default=None, help="what to compare with [default: recorded]"
)
@click.option("--checkpoint", help="the checkpoint for a live reference [default: the one that was exported]")
@click.option("--level", type=click.Choice(LEVELS), default="tensor", help="what is compared")
@click.option("--seed", type=int, default=1, help="of the fresh inputs that a live reference is tried with")
@click.option("--html", type=click.Path(path_type=Path), help="also write the report page here")
@provider_option
@json_option
def command(
    bundle: Path,
    reference: str | None,
    checkpoint: str | None,
    level: str,
    seed: int,
    html: Path | None,
    provider: str,
    as_json: bool,
) -> int:
    """Compare BUNDLE with a reference; the report is written to BUNDLE/reports and the verdict to its manifest."""
    progress = Terminal()
    opened = Bundle.open(bundle)
    if reference is None:
        progress.say("comparing with the outputs recorded at export; --reference torch|hf|lavis runs a live one")
    verification = verify(opened, reference or "recorded", checkpoint, provider=provider, seed=seed, progress=progress)
    page = write_report(opened, verification, progress)
    if html is not None:
        write_page(html, page)
    if as_json:
        click.echo(json.dumps(verification.to_dict()))
    else:
        show(verification)
    return 0 if verification.passed else 1


def write_page(path: Path, page: str) -> None:
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise InputError(f"--html {path} cannot be written ({error.strerror}); the report is in the bundle") from error


def verify(
    bundle: Bundle, reference: str, checkpoint: str | None, *, provider: str, seed: int, progress: Progress
) -> Verification:
    """Level `tensor` against the recorded outputs, or against a live reference on the recorded and on fresh inputs."""
    samples = Samples.load(bundle.path(bundle.manifest.samples))
    if reference == "recorded" and checkpoint is not None:
        raise InputError("--checkpoint is for a live reference; add --reference torch, hf or lavis")
    encoder = Encoder(bundle, provider)  # first: a missing provider should be said before the reference has run
    try:
        cases = samples.cases
        if reference != "recorded":
            cases = tuple(live_cases(bundle, reference, checkpoint, samples, seed))
        verification = verify_tensors(
            encoder, cases, samples, reference=reference, provider=provider, progress=progress
        )
    finally:
        encoder.close()
    return verification.with_environment(environment(bundle, provider))


def live_cases(bundle: Bundle, reference: str, checkpoint: str | None, samples: Samples, seed: int) -> list[Case]:
    require_export_extra(f"a live reference ({reference})")
    from qpert.exporter.references import live_cases as cases_of

    return cases_of(bundle.manifest, reference, checkpoint, samples, seed=seed)


def show(verification: Verification) -> None:
    """The verdict first, then the gates."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    colour = "green" if verification.passed else "red"
    console.print(
        f"[bold {colour}]{verification.verdict.upper()}[/] {verification.level} level, {verification.precision}, "
        f"{verification.provider} against {verification.reference}, {len(verification.comparisons)} comparisons"
    )
    table = Table("gate", "value", "limit", "")
    for gate in verification.gates:
        mark = "pass" if gate.passed else "[bold red]FAIL[/]"
        table.add_row(gate.name, f"{gate.value:.3g}", f"{gate.limit:.3g}", mark)
    console.print(table)
