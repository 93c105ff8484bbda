"""`qpert build`: TensorRT engines for an existing bundle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qpert.runtime.cli.options import (
    FLAVORS_HELP,
    TARGET_HELP,
    bundle_argument,
    check_graphs,
    command_line,
    json_option,
    print_result,
)
from qpert.runtime.detection.opening import open_bundle
from qpert.runtime.errors import InputError
from qpert.runtime.inputs.numbers import parse_int
from qpert.runtime.progress import Terminal
from qpert.runtime.report.model import Report, Section, Table

if TYPE_CHECKING:
    from qpert.exporter.engines.build import BuildReport

SIZES = {"K": 10, "M": 20, "G": 30}


@click.command("build", short_help="TensorRT engines for a bundle", context_settings={"show_default": True})
@bundle_argument
@click.option("--flavor", type=click.Choice(["auto", "classic", "rtx"]), default="auto", help=FLAVORS_HELP)
@click.option("--target", default="auto", help=TARGET_HELP)
@click.option("--graph", "graphs", multiple=True, help="build only this graph; may be repeated")
@click.option("--workspace", help="most GPU scratch memory per layer, such as 2G or 512M [default: the library's]")
@click.option("--force", is_flag=True, help="rebuild engines that exist")
@click.option(
    "--print-trtexec",
    "prints",
    is_flag=True,
    help="build nothing; print the commands that build the engines with TensorRT's own trtexec, on another device",
)
@json_option
def command(
    bundle: Path,
    flavor: str,
    target: str,
    graphs: tuple[str, ...],
    workspace: str | None,
    force: bool,
    prints: bool,
    as_json: bool,
) -> None:
    """Compile TensorRT engines for BUNDLE, or a detector, into its folder `engines`. Engines that exist are kept."""
    limit = None if workspace is None else parse_size(workspace)
    if prints:
        require_trtexec(flavor, target, force)
        print_trtexec(bundle, graphs, limit, as_json=as_json)
        return
    from qpert.exporter.detectors.engines import require_buildable
    from qpert.exporter.engines.build import BuildRequest, build_engines

    request = BuildRequest(
        flavor=flavor,
        target=target,
        graphs=graphs,
        workspace=limit,
        force=force,
        command=command_line(),
    )
    opened = open_bundle(bundle)
    check_graphs("--graph", graphs, opened)
    plan = request.plan(opened.manifest.precision)
    require_buildable(opened, plan)
    built = build_engines(opened, request, plan, Terminal())
    print_result(built.to_dict(), lambda: engines_report(built, bundle), as_json=as_json)


def require_trtexec(flavor: str, target: str, force: bool) -> None:
    """Raises InputError for options that `trtexec` cannot follow."""
    if flavor == "rtx" or target not in ("auto", "current") or force:
        raise InputError(
            "--print-trtexec builds nothing, and trtexec is classic TensorRT's tool, which builds for the GPU that it "
            f"runs on; got --flavor {flavor} --target {target}{' --force' * force}: leave these out, or build ahead of "
            "time with `qpert build --flavor rtx`",
            code="trtexec-options",
        )


def print_trtexec(bundle: Path, graphs: tuple[str, ...], workspace: int | None, *, as_json: bool) -> None:
    """The commands on stdout: a shell script, or one JSON document. Needs neither TensorRT nor PyTorch."""
    from qpert.exporter.engines.trtexec import trtexec_script

    opened = open_bundle(bundle)
    check_graphs("--graph", graphs, opened)
    script = trtexec_script(opened, graphs, workspace)
    click.echo(json.dumps(script.to_dict()) if as_json else script.to_shell(), nl=as_json)


def parse_size(text: str) -> int:
    """Bytes of `512M`, `2G` or a plain number of bytes."""
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].upper() in SIZES else (text, "")
    try:
        count = parse_int(number)
    except ValueError:
        count = 0
    if count < 1:
        raise InputError(f"got size {text!r}, expected for example 512M or 2G", code="memory-size")
    return count << SIZES.get(unit, 0)


def engines_report(built: BuildReport, bundle: Path) -> Report:
    """The engines of each target, with their sizes and build times."""
    sections = []
    for target in built.targets:
        engines = [engine for engine in built.engines if engine.target == target]
        rows = tuple((one.graph, f"{one.bytes:,}", "kept" if one.kept else f"{one.seconds:.1f}") for one in engines)
        title = str(Path(engines[0].file).parent)
        sections.append(Section(title, (Table(("graph", "bytes", "seconds"), rows),)))
    return Report("qpert build", f"Engines of {bundle}", tuple(sections))
