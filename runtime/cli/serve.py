"""`qpert serve`: a bundle and a gallery behind HTTP."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import click

from qpert.runtime.cli.detector_options import detector_options
from qpert.runtime.cli.number_types import IntegerRange, NumberRange
from qpert.runtime.cli.options import PATH, bundle_argument, max_boxes_option, provider_option, require
from qpert.runtime.cli.store_options import features_from_option
from qpert.runtime.detection.choice import DetectorChoice
from qpert.runtime.errors import InputError
from qpert.runtime.files import local_path
from qpert.runtime.inputs.boxes import BoxWarning
from qpert.runtime.serving.settings import Limits, Settings
from qpert.runtime.stores.address import StoreAddress, parse_address

TOKEN_VARIABLE = "QPERT_TOKEN"
DEFAULTS = Limits()
COUNT = IntegerRange(min=1)


@click.command("serve", short_help="a bundle and a gallery behind HTTP", context_settings={"show_default": True})
@bundle_argument
@click.option("--gallery", type=PATH, help="search and change this gallery; made where there is none")
@detector_options
@max_boxes_option
@click.option("--store", help="search and change this store instead: qdrant://…, qdrant-edge:FOLDER or postgresql://…")
@features_from_option
@click.option("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 serves other machines")
@click.option("--port", type=IntegerRange(min=0, max=65535), default=8000, help="0 takes any free one")
@click.option("--token-file", type=PATH, help=f"clients must send the token in this file [default: ${TOKEN_VARIABLE}]")
@click.option("--cors", "origins", multiple=True, metavar="ORIGIN", help="pages that may call; may be repeated")
@click.option("--allow-host", "names", multiple=True, metavar="NAME", help="a proxy's name for it; may be repeated")
@click.option(
    "--allow-url", "hosts", multiple=True, metavar="HOST", help="fetch pictures by URL from here; may be repeated"
)
@click.option(
    "--pictures", type=PATH, help="keep pictures that are sent here [default: GALLERY/pictures; none with a store]"
)
@click.option("--workers", type=IntegerRange(min=0), default=0, help="batches at a time; 0: 2 on a CPU, 1 on a GPU")
@click.option("--threads", type=IntegerRange(min=0), default=0, help="CPU threads a worker; 0: cores / workers")
@click.option("--max-body", type=COUNT, default=DEFAULTS.body_bytes, help="bytes of a request")
@click.option("--max-picture", type=COUNT, default=DEFAULTS.picture_bytes, help="bytes of a picture")
@click.option("--max-pixels", type=COUNT, default=DEFAULTS.pixels, help="pixels of a picture")
@click.option("--max-inputs", type=COUNT, default=DEFAULTS.inputs, help="texts and pictures of a request")
@click.option("--max-queue", type=COUNT, default=DEFAULTS.queue, help="texts and pictures that wait; more are refused")
@click.option("--max-requests", type=COUNT, default=DEFAULTS.requests, help="requests at a time; more are refused")
@click.option(
    "--deadline", type=NumberRange(min=0.1), default=DEFAULTS.seconds, help="seconds until a request is refused"
)
@provider_option
def command(
    bundle: Path,
    gallery: Path | None,
    detector: DetectorChoice,
    max_boxes: int | None,
    store: str | None,
    features_from: Path | None,
    host: str,
    port: int,
    token_file: Path | None,
    origins: tuple[str, ...],
    names: tuple[str, ...],
    hosts: tuple[str, ...],
    pictures: Path | None,
    workers: int,
    threads: int,
    max_body: int,
    max_picture: int,
    max_pixels: int,
    max_inputs: int,
    max_queue: int,
    max_requests: int,
    deadline: float,
    provider: str,
) -> None:
    """Serve BUNDLE over HTTP: embeddings, pair scores, and search in a --gallery or --store. A page to try it is at /.

    /openapi.json describes the requests; /health/ready, /metrics and /v2 (the raw graphs) are for machines. SIGTERM
    answers what has been asked, and ends.
    """
    detector.check(None)
    if max_boxes is not None and detector.folder is None:
        raise InputError(
            "--max-boxes needs --detector: it says how many of the boxes that are found are used; add it, or leave "
            "--max-boxes out",
            code="detector-missing",
        )
    require("qpert serve", ("fastapi", "uvicorn", "prometheus_client", "python_multipart"), "serve")
    limits = Limits(
        body_bytes=max_body,
        picture_bytes=max_picture,
        pixels=max_pixels,
        inputs=max_inputs,
        queue=max_queue,
        requests=max_requests,
        seconds=deadline,
    )
    settings = Settings(
        bundle,
        gallery=gallery,
        store=address_of(store, gallery, features_from),
        features=features_from,
        provider=provider,
        host=host,
        port=port,
        workers=workers,
        threads=threads,
        token=read_token(token_file),
        origins=origins,
        names=names,
        url_hosts=hosts,
        pictures=pictures,
        detector=detector,
        max_boxes=max_boxes,
        limits=limits,
    )
    if not settings.is_loopback and not settings.token:
        click.echo(
            f"warning: {host} can be reached from other machines and no token is set; whoever reaches it may use it "
            "(--token-file)",
            err=True,
        )
    from qpert.runtime.serving.server import serve

    warnings.simplefilter("ignore", BoxWarning)  # strangers' boxes: the log is not theirs to fill

    serve(settings, lambda line: click.echo(f"serving {bundle} on {line}", err=True))


def address_of(store: str | None, gallery: Path | None, features: Path | None) -> StoreAddress | None:
    """Raises InputError for no address of an engine, or options that exclude each other."""
    if store is None:
        if features is not None:
            raise InputError("--features-from needs --store; a gallery has its own features", code="serve-options")
        return None
    address = parse_address(store)
    if gallery is not None or address.kind == "gallery":
        raise InputError(
            f"--store is {address}; expected qdrant://…, qdrant-edge:FOLDER or postgresql://…, and no --gallery too",
            code="serve-options",
        )
    return address


def read_token(path: Path | None) -> str:
    """The token of a file, or of the environment; never of the command line, which other users can read.

    Raises:
        InputError: the file cannot be read, or holds no token.
    """
    if path is None:
        return os.environ.get(TOKEN_VARIABLE, "").strip()
    try:
        token = local_path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--token-file {path} cannot be read: {error}", code="token-file") from error
    if not token or not token.isascii() or any(letter.isspace() for letter in token):
        raise InputError(
            f"--token-file {path} holds no token; expected one line of ASCII characters without spaces",
            code="token-file",
        )
    return token
