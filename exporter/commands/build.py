"""`qpert build`: TensorRT engines for an existing bundle."""

from __future__ import annotations

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
@json_option
def command(
    bundle: Path,
    flavor: str,
    target: str,
    graphs: tuple[str, ...],
    workspace: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Compile TensorRT engines for BUNDLE, or a detector, into its folder `engines`. Engines that exist are kept."""
    from qpert.exporter.detectors.engines import require_buildable
    from qpert.exporter.engines.build import BuildRequest, build_engines

    request = BuildRequest(
        flavor=flavor,
        target=target,
        graphs=graphs,
        workspace=None if workspace is None else parse_size(workspace),
        force=force,
        command=command_line(),
    )
    opened = open_bundle(bundle)
    check_graphs("--graph", graphs, opened)
    plan = request.plan(opened.manifest.precision)
    require_buildable(opened, plan)
    built = build_engines(opened, request, plan, Terminal())
    print_result(built.to_dict(), lambda: engines_report(built, bundle), as_json=as_json)


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
