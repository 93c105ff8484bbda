"""`qpert inspect`: what is in a bundle, with every hash checked."""

from __future__ import annotations

import json
from pathlib import Path

import click

from qpert.runtime.bundle import Bundle, FileState
from qpert.runtime.cli.options import bundle_argument, json_option
from qpert.runtime.manifest import Manifest, read_manifest


@click.command("inspect")
@bundle_argument
@json_option
def command(bundle: Path, as_json: bool) -> int:
    """Show what BUNDLE holds and check the hash of every file. Exits 1 where one differs."""
    opened = Bundle(bundle, read_manifest(bundle))
    states = opened.check_files()
    files_ok = all(state.ok for state in states)
    if as_json:
        click.echo(json.dumps(opened.manifest.to_dict() | {"files_ok": files_ok}))
    else:
        show(opened, states)
    return 0 if files_ok else 1


def show(bundle: Bundle, states: list[FileState]) -> None:
    """The manifest and the files for a person to read."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    for line in summary(bundle.manifest):
        console.print(line, markup=False)
    graphs = Table("graph", "inputs", "outputs", "lengths")
    for graph in bundle.manifest.graphs.values():
        graphs.add_row(
            graph.name,
            "\n".join(f"{tensor.name} {tensor.dtype} {list(tensor.shape)}" for tensor in graph.inputs),
            "\n".join(f"{tensor.name} {tensor.dtype} {list(tensor.shape)}" for tensor in graph.outputs),
            "\n".join(f"{axis} {length.min}–{length.max}" for axis, length in graph.ranges.items()),
        )
    console.print(graphs)
    files = Table("file", "bytes", "SHA-256")
    for state in states:
        path = bundle.path(state.path)
        verdict = "ok" if state.ok else "missing" if state.found is None else f"ALTERED: {state.found}"
        files.add_row(state.path, f"{path.stat().st_size:,}" if path.is_file() else "–", verdict)
    console.print(files)


def summary(manifest: Manifest) -> list[str]:
    checkpoint, verification = manifest.checkpoint, manifest.verification
    verdict = f"{verification['verdict']} against {verification['reference']}" if verification else "not verified yet"
    return [
        f"checkpoint   {checkpoint.name} ({checkpoint.family}), {checkpoint.source}, licence {checkpoint.license}",
        f"             sha256 {checkpoint.sha256}",
        f"precision    {manifest.precision}, images {manifest.preprocessing.size} px",
        f"perturbation {json.dumps(manifest.perturbation.to_dict())}",
        f"exported     {manifest.created} by: {manifest.command}",
        f"verification {verdict}",
        *(f"note         {note}" for note in manifest.notes),
    ]
