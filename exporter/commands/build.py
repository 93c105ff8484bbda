"""`qpert build`: TensorRT engines for an existing bundle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.cli.options import (
    FLAVORS_HELP,
    TARGET_HELP,
    bundle_argument,
    check_graphs,
    command_line,
    json_option,
)
from qpert.runtime.errors import InputError
from qpert.runtime.progress import Terminal

if TYPE_CHECKING:
    from qpert.exporter.engines.build import BuildReport

SIZES = {"K": 10, "M": 20, "G": 30}


@click.command("build", short_help="TensorRT engines for a bundle", context_settings={"show_default": True})
@bundle_argument
@click.option("--flavor", type=click.Choice(["auto", "classic", "rtx"]), default="auto", help=FLAVORS_HELP)
@click.option("--target", default="auto", help=TARGET_HELP)
@click.option("--graph", "graphs", multiple=True, help="build only this one, by name; may be repeated")
@click.option("--workspace", help="most GPU memory of one layer's scratch space, 2G or 512M [default: the library's]")
@click.option("--force", is_flag=True, help="build again what is there")
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
    """Compile TensorRT engines for BUNDLE into its folder `engines`. What is there already is not built again."""
    from qpert.exporter.engines.build import BuildRequest, build_engines

    request = BuildRequest(
        flavor=flavor,
        target=target,
        graphs=graphs,
        workspace=None if workspace is None else parse_size(workspace),
        force=force,
        command=command_line(),
    )
    opened = Bundle.open(bundle)
    check_graphs("--graph", graphs, opened)
    report = build_engines(opened, request, request.plan(opened.manifest.precision), Terminal())
    if as_json:
        click.echo(json.dumps(report.to_dict()))
    else:
        show(report)


def parse_size(text: str) -> int:
    """Bytes of `512M`, `2G` or a plain number of bytes."""
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].upper() in SIZES else (text, "")
    if not number.isdigit() or int(number) < 1:
        raise InputError(f"got a size of {text!r}, expected such as 512M or 2G")
    return int(number) << SIZES.get(unit, 0)


def show(report: BuildReport) -> None:
    """The engines of each target, with bytes and seconds."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    for target in report.targets:
        engines = [engine for engine in report.engines if engine.target == target]
        table = Table("graph", "bytes", "seconds", title=str(Path(engines[0].file).parent), title_justify="left")
        for engine in engines:
            seconds = "there already" if engine.kept else f"{engine.seconds:.1f}"
            table.add_row(engine.graph, f"{engine.bytes:,}", seconds)
        console.print(table)
