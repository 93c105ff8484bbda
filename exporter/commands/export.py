"""`qpert export FAMILY`: checkpoint to bundle. Each family is a subcommand with its own options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from qpert.exporter.families import family_names, find_family
from qpert.exporter.families.base import CalibratedSettings, FamilyCard
from qpert.runtime.cli.number_types import Integer, Number, strict
from qpert.runtime.cli.options import (
    FLAVORS_HELP,
    KEEP_STOCK_HELP,
    REDUCTION_HELP,
    TARGET_HELP,
    command_line,
    json_option,
    require_export_extra,
)
from qpert.runtime.errors import InputError
from qpert.runtime.inputs.perturbation import WEIGHT_FUNCTIONS, Coverage, Perturbation, Reduction, Semantics
from qpert.runtime.progress import Terminal

if TYPE_CHECKING:
    from qpert.exporter.engines.build import BuildRequest

DETECTOR = "detector"
"""The subcommand that exports no family of retrieval."""


PERTURBATION_OPTIONS = (
    "perturb",
    "threshold",
    "preserve_norm",
    "centre_keys",
    "semantics",
    "alpha",
    "weight",
    "coverage",
    "reduction",
    "keep_stock",
)
"""Options that choose how boxes act, by parameter name."""


class FamilyGroup(click.Group):
    """One subcommand per family, made from its card on request."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*family_names(), DETECTOR]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name == DETECTOR:
            from qpert.exporter.commands.export_detector import command as detector_command

            return detector_command
        if cmd_name not in family_names():
            return None
        return family_command(find_family(cmd_name).card)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] != DETECTOR:
            find_family(args[0])  # its error names the families
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        cards = [find_family(name).card for name in family_names()]
        with formatter.section("Families"):
            formatter.write_dl([(card.name, card.title) for card in cards])
        with formatter.section("Others"):
            formatter.write_dl([(DETECTOR, "an object detector, for `qpert detect` and `qpert index --detector`")])
        for card in cards:
            if card.options:
                with formatter.section(f"Options that only {card.name} has"):
                    formatter.write_dl([(option.flag, option.help) for option in card.options])


@click.group("export", cls=FamilyGroup, short_help="checkpoint to bundle")
def command() -> None:
    """Export a checkpoint to a bundle: `qpert export blip2`. `qpert export FAMILY --help` lists all its options."""


def family_command(card: FamilyCard) -> click.Command:
    """`qpert export FAMILY`."""
    default = f"default: {card.default_checkpoint}" if card.default_checkpoint else "required"
    options: list[click.Parameter] = [
        option("--out", type=click.Path(path_type=Path), help=f"the bundle [default: {default_name(card)}]"),
        option("--checkpoint", help=f"{card.checkpoints} [{default}]"),
        option("--image-size", type=Integer(), help="pixels [default: the checkpoint's]"),
        option("--tokenizer", help="a vocabulary, folder or hub id [default: the checkpoint's own]"),
        option("--precision", type=click.Choice(["fp32", "fp16", "bf16"]), default="fp32", show_default=True),
        *perturbation_options(card),
        *profile_options(),
        *(option(extra.flag, type=strict(extra.type), help=extra.help) for extra in card.options),
        *engine_options(),
        option("--force", is_flag=True, help="replace an existing bundle"),
    ]

    def callback(**values: Any) -> None:
        export(card, values)

    made = click.Command(
        card.name, callback=callback, params=options, help=f"Export {card.title}.\n\n{card.note}", short_help=card.title
    )
    return json_option(made)


def option(flag: str, **settings: Any) -> click.Option:
    return click.Option([flag], **settings)


def default_name(card: FamilyCard) -> str:
    return f"qpert-{card.name}-<checkpoint>-<precision>"


def perturbation_options(card: FamilyCard) -> list[click.Option]:
    """Where and how boxes act; families that take no boxes have only `--perturb none`."""
    perturb = option(
        "--perturb", type=click.Choice(card.stages), help=f"stages that boxes act on [default: {card.stages[0]}]"
    )
    if card.stages == ("none",):
        return [perturb]
    alpha = card.perturbation.get("alpha", Perturbation().alpha)
    weights = click.Choice(list(WEIGHT_FUNCTIONS))
    return [
        perturb,
        option("--threshold", type=Number(), help="contribution ratio of a subspace [default: 0.95]"),
        option("--preserve-norm", is_flag=True, help="keep each query's norm"),
        option(
            "--centre-keys",
            is_flag=True,
            help="build key subspaces from the keys less their mean over the image (beyond the paper)",
        ),
        option(
            "--semantics",
            type=click.Choice(get_args(Semantics)),
            help="follow the paper or the authors' release [default: paper]",
        ),
        option("--alpha", type=Number(), help=f"default strength of the perturbation [default: {alpha:g}]"),
        option("--weight", type=weights, help="default weight of a box by its area S [default: constant]"),
        option(
            "--coverage",
            type=click.Choice(get_args(Coverage)),
            help="how a box covers patches [default: the semantics']",
        ),
        option(
            "--reduction", type=click.Choice(get_args(Reduction)), help=f"{REDUCTION_HELP} [default: the semantics']"
        ),
        option("--keep-stock", is_flag=True, help=KEEP_STOCK_HELP),
    ]


def profile_options() -> list[click.Option]:
    return [
        option("--max-batch", type=Integer(), default=8, show_default=True, help="most images per call"),
        option("--max-boxes", type=Integer(), default=32, show_default=True, help="most boxes per image"),
        option("--max-text", type=Integer(), default=64, show_default=True, help="most texts per call"),
        option(
            "--max-length",
            type=Integer(),
            help="most tokens per text; longer ones are truncated [default: the family's]",
        ),
        option("--samples", type=Integer(), default=2, show_default=True, help="images recorded for `qpert verify`"),
    ]


def engine_options() -> list[click.Option]:
    flavors = click.Choice(["auto", "classic", "rtx"])
    return [
        option("--trt", is_flag=True, help="also compile TensorRT engines, as `qpert build` does"),
        option("--trt-flavor", type=flavors, help=f"{FLAVORS_HELP} [default: auto]"),
        option("--target", help=f"{TARGET_HELP} [default: auto]"),
    ]


def export(card: FamilyCard, options: dict[str, Any]) -> None:
    """Run one family's export command."""
    require_export_extra("exporting")
    from qpert.exporter.export import ExportRequest, export_bundle
    from qpert.exporter.families.declare import Limits

    engines = engines_request(options)
    plan = engines.plan(options["precision"]) if engines else None  # fails before the export, not after it
    progress = Terminal()
    checkpoint = checkpoint_of(card, options["checkpoint"], progress)
    settings = perturbation_of(card, checkpoint, options)
    request = ExportRequest(
        family=card.name,
        checkpoint=checkpoint,
        out=options["out"],
        image_size=options["image_size"],
        tokenizer=options["tokenizer"],
        precision=options["precision"],
        perturbation=settings.perturbation,
        calibration=settings.calibration,
        limits=Limits(options["max_batch"], options["max_boxes"], options["max_text"], options["max_length"]),
        options={extra.name: options[extra.name] for extra in card.options if options[extra.name] is not None},
        samples=options["samples"],
        force=options["force"],
        command=command_line(),
    )
    bundle = export_bundle(request, progress)
    progress.say(f"wrote {bundle.folder}; next: qpert verify {bundle.folder}")
    report = None
    if engines and plan:
        from qpert.exporter.engines.build import build_engines

        report = build_engines(bundle, engines, plan, progress).to_dict()
    if options["as_json"]:
        built = {"engines": report["engines"]} if report else {}
        click.echo(json.dumps({"bundle": str(bundle.folder)} | bundle.manifest.to_dict() | built))
    else:
        click.echo(bundle.folder)


def checkpoint_of(card: FamilyCard, asked: str | None, progress: Terminal) -> str:
    """`--checkpoint`, or the family's default, with a message.

    Raises:
        InputError: none was given and the family has no default.
    """
    if asked is not None:
        return asked
    if card.default_checkpoint is None:
        raise InputError(
            f"no --checkpoint given, and {card.name} has no built-in one; expected {card.checkpoints}",
            code="checkpoint-required",
        )
    progress.say(
        "no --checkpoint given: exporting the built-in DEMONSTRATION model, which does not have the published weights"
    )
    return card.default_checkpoint


def engines_request(options: dict[str, Any]) -> BuildRequest | None:
    """The request of --trt, --trt-flavor and --target; None without --trt."""
    from qpert.exporter.engines.build import BuildRequest

    chosen = {"--trt-flavor": options["trt_flavor"], "--target": options["target"]}
    if options["trt"]:
        return BuildRequest(options["trt_flavor"] or "auto", options["target"] or "auto", command=command_line())
    if given := [name for name, value in chosen.items() if value is not None]:
        raise InputError(f"{given[0]} only applies to engines, which --trt compiles; add --trt", code="trt-missing")
    return None


def perturbation_of(card: FamilyCard, checkpoint: str, options: dict[str, Any]) -> CalibratedSettings:
    """The settings of the options, with where they come from.

    Without any option about boxes, those of a checkpoint that ships calibrated; else what is not given follows the
    family, then the semantics.
    """
    if card.stages == ("none",):
        return CalibratedSettings(Perturbation.paper(stages="none"))
    given = {
        name: options[name] for name in PERTURBATION_OPTIONS if options[name] is not None and options[name] is not False
    }
    if not given and checkpoint in card.calibrated:
        return CalibratedSettings.read(card.calibrated[checkpoint])
    beta, gamma = WEIGHT_FUNCTIONS[given.pop("weight", "constant")]
    chosen = {**card.perturbation, "beta": beta, "gamma": gamma}
    if "perturb" in given:
        chosen["stages"] = given.pop("perturb")
    make = {"paper": Perturbation.paper, "release": Perturbation.release}[given.pop("semantics", "paper")]
    return CalibratedSettings(make(**chosen | given))
