"""`qpert export blip2`: checkpoint to bundle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from qpert.runtime.cli.options import FLAVORS_HELP, TARGET_HELP, command_line, json_option, require_export_extra
from qpert.runtime.errors import InputError
from qpert.runtime.inputs.perturbation import WEIGHT_FUNCTIONS, Coverage, Perturbation, Reduction, Semantics
from qpert.runtime.progress import Terminal

if TYPE_CHECKING:
    from qpert.exporter.engines.build import BuildRequest


@click.command("export", short_help="checkpoint to bundle", context_settings={"show_default": True})
@click.argument("architecture")
@click.option(
    "--out", type=click.Path(path_type=Path), help="the bundle's folder [default: qpert-blip2-<checkpoint>-<precision>]"
)
@click.option(
    "--checkpoint",
    default=None,
    help="demo, coco, pretrain, pretrain_vitL, a .pth, a folder, or a hub id [default: demo]",
)
@click.option("--image-size", type=int, help="pixels [default: the checkpoint's]")
@click.option("--tokenizer", help="vocab.txt, tokenizer.json, a folder, or a hub id [default: beside the checkpoint]")
@click.option("--precision", type=click.Choice(["fp32", "fp16", "bf16"]), default="fp32")
@click.option(
    "--perturb",
    type=click.Choice(["itc", "both", "none"]),
    default=None,
    help="stages that boxes act on [default: itc]",
)
@click.option("--threshold", type=float, default=0.95, help="contribution-ratio threshold of the key subspace")
@click.option("--preserve-norm", is_flag=True, help="keep each query's norm")
@click.option(
    "--semantics", type=click.Choice(get_args(Semantics)), default="paper", help="whose reading of the method"
)
@click.option("--alpha", type=float, help="default strength of the perturbation [default: 8]")
@click.option(
    "--weight",
    type=click.Choice(list(WEIGHT_FUNCTIONS)),
    default="constant",
    help="default weight of a box by its area S",
)
@click.option(
    "--coverage", type=click.Choice(get_args(Coverage)), help="how a box covers patches [default: the semantics']"
)
@click.option("--reduction", type=click.Choice(get_args(Reduction)), help="over boxes [default: the semantics']")
@click.option("--max-batch", type=int, default=8, help="most images of one call")
@click.option("--max-boxes", type=int, default=32, help="most boxes of one image")
@click.option("--max-text", type=int, default=64, help="most texts of one call")
@click.option("--max-length", type=int, default=35, help="most tokens of one text; longer ones are cut")
@click.option("--samples", type=int, default=2, help="pictures whose PyTorch outputs are recorded for `qpert verify`")
@click.option(
    "--vision-checkpoint",
    type=click.Path(path_type=Path),
    help="the vision tower's own .pth, where the checkpoint lacks it",
)
@click.option("--vision-heads", type=int, help="attention heads of the vision tower, where nothing else tells")
@click.option("--vision-layers", type=int, help="blocks used of --vision-checkpoint [default: the published width's]")
@click.option("--vision-eps", type=float, help="LayerNorm epsilon of the vision tower, where nothing else tells")
@click.option("--ln-vision-eps", type=float, help="LayerNorm epsilon of ln_vision, where nothing else tells")
@click.option("--qformer-eps", type=float, help="LayerNorm epsilon of the Q-Former, where nothing else tells")
@click.option("--qformer-heads", type=int, help="attention heads of the Q-Former, where nothing else tells")
@click.option("--trt", is_flag=True, help="compile TensorRT engines too, as `qpert build` does")
@click.option("--trt-flavor", type=click.Choice(["auto", "classic", "rtx"]), help=f"{FLAVORS_HELP} [default: auto]")
@click.option("--target", help=f"{TARGET_HELP} [default: auto]")
@click.option("--force", is_flag=True, help="replace an existing bundle")
@json_option
def command(**options: Any) -> None:
    """Export a BLIP-2 retrieval checkpoint to a bundle: `qpert export blip2`.

    Without --checkpoint the built-in demonstration model is exported.
    """
    if options["architecture"] != "blip2":
        raise InputError(f"unknown architecture {options['architecture']!r}, expected blip2")
    require_export_extra("exporting")
    from qpert.exporter.export import ExportRequest, export_bundle
    from qpert.exporter.families.blip2.architecture import ArchitectureOptions
    from qpert.exporter.families.blip2.graph_specs import Limits

    engines = engines_request(options)
    plan = engines.plan(options["precision"]) if engines else None  # refused now, not after the export
    progress = Terminal()
    if options["checkpoint"] is None:
        progress.say("no --checkpoint given: exporting the built-in DEMONSTRATION model, which is not BLIP-2's weights")
    request = ExportRequest(
        checkpoint=options["checkpoint"] or "demo",
        out=options["out"],
        image_size=options["image_size"],
        tokenizer=options["tokenizer"],
        precision=options["precision"],
        perturbation=perturbation_of(options),
        limits=Limits(options["max_batch"], options["max_boxes"], options["max_text"], options["max_length"]),
        options=ArchitectureOptions(
            vision_heads=options["vision_heads"],
            qformer_heads=options["qformer_heads"],
            vision_eps=options["vision_eps"],
            ln_vision_eps=options["ln_vision_eps"],
            qformer_eps=options["qformer_eps"],
            vision_layers=options["vision_layers"],
            vision_checkpoint=options["vision_checkpoint"],
        ),
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


def engines_request(options: dict[str, Any]) -> BuildRequest | None:
    """What --trt and its two companions ask for; None without --trt."""
    from qpert.exporter.engines.build import BuildRequest

    chosen = {"--trt-flavor": options["trt_flavor"], "--target": options["target"]}
    if options["trt"]:
        return BuildRequest(options["trt_flavor"] or "auto", options["target"] or "auto", command=command_line())
    if given := [name for name, value in chosen.items() if value is not None]:
        raise InputError(f"{given[0]} says how engines are compiled, which --trt asks for; add --trt")
    return None


def perturbation_of(options: dict[str, Any]) -> Perturbation:
    """The settings that the options describe; what is not given follows the semantics."""
    beta, gamma = WEIGHT_FUNCTIONS[options["weight"]]
    chosen = {name: options[name] for name in ("alpha", "coverage", "reduction") if options[name] is not None}
    chosen |= {
        "beta": beta,
        "gamma": gamma,
        "threshold": options["threshold"],
        "preserve_norm": options["preserve_norm"],
    }
    if options["perturb"] is not None:
        chosen["stages"] = options["perturb"]
    make = {"paper": Perturbation.paper, "release": Perturbation.release}[options["semantics"]]
    return make(**chosen)
