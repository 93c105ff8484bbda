"""`qpert package`: a bundle in the layout of another server."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.cli.number_types import IntegerRange
from qpert.runtime.cli.options import PATH, bundle_argument, json_option
from qpert.runtime.triton.repository import BACKENDS, Backend, write_repository


@click.command("package", short_help="a bundle as a Triton model repository", context_settings={"show_default": True})
@bundle_argument
@click.option("--for", "server", type=click.Choice(["triton"]), required=True, help="whose layout")
@click.option("--out", type=PATH, required=True, help="the repository's folder, which may not exist")
@click.option(
    "--backend",
    type=click.Choice(BACKENDS),
    default="onnxruntime",
    help="what runs the graphs: onnxruntime and tensorrt (engines of `qpert build`) of NVIDIA's image, or python",
)
@click.option("--gpu", is_flag=True, help="run the graphs on GPUs; tensorrt always does")
@click.option("--threads", type=IntegerRange(min=0), default=1, help="CPU threads of an operator; 0 takes all cores")
@json_option
def command(bundle: Path, server: str, out: Path, backend: Backend, gpu: bool, threads: int, as_json: bool) -> None:
    """Write BUNDLE as a model repository: its graphs, tokenising and preprocessing, and ensembles of them.

    encode_texts takes texts, encode_images pictures and boxes, match_texts a picture and texts. Whatever the backend
    is, Triton's Python needs `pip install 'qpert[cpu]'` for tokenising and preprocessing.
    """
    written = write_repository(Bundle.open(bundle), out, backend=backend, gpu=gpu, threads=threads)
    if as_json:
        click.echo(json.dumps(asdict(written) | {"folder": str(out)}))
        return
    saved = f", {written.linked_bytes / 1e6:.1f} MB more are hard links" if written.linked_bytes else ""
    click.echo(f"{out} for {server}, backend {backend}: {written.bytes / 1e6:.1f} MB{saved}")
    click.echo(f"models: {', '.join(written.models)}")
