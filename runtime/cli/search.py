"""`qpert search`: the best images of a gallery for a text, or the best texts for an image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path

import click

from qpert.runtime.bundle.calibrated import calibration_notice
from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.cli.detector_options import detector_options
from qpert.runtime.cli.number_types import Integer
from qpert.runtime.cli.options import (
    PATH,
    RERANK_HELP,
    html_option,
    json_option,
    max_boxes_option,
    print_result,
    provider_option,
)
from qpert.runtime.cli.store_options import features_from_option
from qpert.runtime.detection.choice import DetectorChoice
from qpert.runtime.errors import GalleryError, InputError
from qpert.runtime.files import local_path, portable_name
from qpert.runtime.filters.parsing import parse
from qpert.runtime.filters.tree import Condition
from qpert.runtime.gallery.catalogue import open_catalogue
from qpert.runtime.gallery.hits import Hit, TextHit
from qpert.runtime.gallery.page import hits_report, images_page, texts_page
from qpert.runtime.gallery.reader import StoredGallery
from qpert.runtime.gallery.search import TextGallery
from qpert.runtime.gallery.spec import GallerySpec
from qpert.runtime.inputs.box_files import read_box_file
from qpert.runtime.inputs.boxes import Boxes
from qpert.runtime.inputs.images import image_size, load_image
from qpert.runtime.inputs.lines import text_lines
from qpert.runtime.inputs.perturbation import Perturbation
from qpert.runtime.progress import Terminal
from qpert.runtime.report.files import write_copy
from qpert.runtime.report.html import to_html
from qpert.runtime.report.model import Picture, Report
from qpert.runtime.retrieval.encoder import Encoder
from qpert.runtime.retriever import Retriever
from qpert.runtime.stores.address import parse_address
from qpert.runtime.stores.opening import made_spec, open_store
from qpert.runtime.stores.searching import StoreGallery


@click.command("search", short_help="a gallery, by text or by image", context_settings={"show_default": True})
@click.argument("gallery")
@click.argument("texts", nargs=-1, metavar='["TEXT"]…')
@click.option("--image", type=PATH, help="find texts for this image, instead of images for a text")
@click.option("--boxes", type=PATH, help="with --image: a box file with its boxes")
@click.option(
    "--skip-bad-boxes",
    is_flag=True,
    help="with --boxes: leave out boxes that are empty, inverted, not finite or outside",
)
@detector_options
@max_boxes_option
@click.option(
    "--texts", "texts_file", type=PATH, help="with --image: search these, one per line, instead of the captions"
)
@click.option("-k", "k", type=Integer(), default=10, help="number of results")
@click.option("--rerank", type=Integer(), help=RERANK_HELP)
@click.option(
    "--where", help="search only images of which this is true of the metadata: 'album = \"x\" and year >= 2020'"
)
@click.option("--exact", is_flag=True, help="scan in float32 only, without the 8-bit codes; same results")
@features_from_option
@click.option("--bundle", type=PATH, help="the bundle that made the gallery [default: its original folder]")
@html_option
@provider_option
@json_option
def command(
    gallery: str,
    texts: tuple[str, ...],
    image: Path | None,
    boxes: Path | None,
    skip_bad_boxes: bool,
    detector: DetectorChoice,
    max_boxes: int | None,
    texts_file: Path | None,
    k: int,
    rerank: int | None,
    where: str | None,
    exact: bool,
    features_from: Path | None,
    bundle: Path | None,
    html: Path | None,
    provider: str,
    as_json: bool,
) -> None:
    """Search GALLERY, a folder or store that `qpert index` made: images for each TEXT, or texts for an --image.

    A store is qdrant://HOST:6333/COLLECTION, qdrant-edge:FOLDER or postgresql://USER@HOST/DATABASE.

    The texts are the captions that the gallery was indexed with, or those of --texts. ITC scores every candidate and
    ITM re-ranks the best --rerank; the final score is ITM + ITC, and rank_itc is the rank by ITC alone.
    """
    check_usage(texts, image, boxes, texts_file, detector)
    texts = tuple(map(portable_name, texts))  # under LC_ALL=C, `café` arrives as undecoded bytes
    condition = None if where is None else parse(portable_name(where))
    if condition is not None and texts_file is not None:
        raise InputError("--where is about images and --texts about none; give one of them", code="search-options")
    with opened_gallery(gallery, bundle, provider, features_from) as (retriever, opened):
        found: Sequence[Sequence[Hit | TextHit]]
        encoder = retriever.encoder
        used = boxes is not None or (image is None and opened.has_boxes)
        notice = calibration_notice(encoder.manifest, encoder.perturbation, encoder.bundle.folder) if used else None
        if notice is not None:
            Terminal().say(notice)
        if image is None:
            hits = retriever.search_batch(texts, opened, k=k, rerank=rerank, exact=exact, where=condition)
            page = to_html(image_page(opened, texts, hits, notice)) if html is not None else ""
            queries, found = list(texts), hits
        else:
            given = None if boxes is None else image_boxes(image, boxes, skip_bad_boxes=skip_bad_boxes)
            with detector.open(provider, max_boxes) as source:
                if source is not None:
                    (given,) = source.boxes([load_image(image)])
            if given is not None and max_boxes is not None:
                given = given.best(max_boxes)
            candidates = retriever.text_gallery(lines(texts_file)) if texts_file else captions(opened, condition)
            ranked = retriever.search_texts(image, candidates, boxes=given, k=k, rerank=rerank)
            page = to_html(texts_page(Picture(image, given), ranked, notice)) if html is not None else ""
            queries, found = [str(image)], [ranked]
    write_copy("--html", html, page)
    document = to_json(queries, found)
    print_result(document, lambda: hits_report(opened.title, queries, found), as_json=as_json)


def check_usage(
    texts: Sequence[str], image: Path | None, boxes: Path | None, texts_file: Path | None, detector: DetectorChoice
) -> None:
    detector.check(boxes)
    if bool(texts) == (image is not None):
        raise InputError('give either a text ("a red bus") or --image FILE', code="search-query")
    if image is None and (boxes is not None or texts_file is not None or detector.folder is not None):
        raise InputError(
            "--boxes, --detector and --texts need --image; boxes of the gallery's images are given to `qpert index`",
            code="search-options",
        )


@contextmanager
def opened_gallery(
    text: str, bundle: Path | None, provider: str, features: Path | None
) -> Iterator[tuple[Retriever, StoredGallery | StoreGallery]]:
    """What GALLERY means, open, and the retriever that goes with it."""
    address = parse_address(text)
    if address.kind != "gallery":
        with open_store(address) as store, open_retriever(made_spec(store).gallery, address, bundle, provider) as own:
            yield own, StoreGallery.open(store, own.encoder, features)
        return
    if features is not None:
        raise InputError("--features-from is for stores; a gallery has its own features", code="search-options")
    with closing(open_catalogue(address.folder)) as catalogue:
        spec = catalogue.spec
    with open_retriever(spec, address, bundle, provider) as own, own.open_gallery(address.folder) as opened:
        yield own, opened


def open_retriever(spec: GallerySpec, gallery: object, bundle: Path | None, provider: str) -> Retriever:
    """The gallery's own bundle (or a copy of it elsewhere) with the gallery's perturbation settings."""
    folder = bundle or local_path(spec.bundle)
    if bundle is None and not folder.is_dir():
        raise GalleryError(
            f"the bundle that made the gallery {gallery} is no longer at {folder}; pass its new folder with --bundle",
            code="gallery-bundle-moved",
        )
    opened = Bundle.open(folder)
    spec.require_identity(opened, gallery)  # before the sessions: another bundle may not accept the gallery's settings
    return Retriever(Encoder(opened, provider, Perturbation.from_dict(spec.perturbation)))


def captions(gallery: StoredGallery | StoreGallery, where: Condition | None = None) -> TextGallery:
    """The captions of the gallery's images, of those of which `where` is true."""
    if isinstance(gallery, StoreGallery) or not gallery.texts:
        raise GalleryError(
            f"the gallery {gallery.title} has no texts to search for an image; index annotation JSON with captions, "
            "or pass --texts FILE with one text per line",
            code="gallery-without-texts",
        )
    return gallery.captions(where)


def lines(path: Path) -> list[str]:
    """The texts of a file, one per line, stripped."""
    found = [line.strip() for line in text_lines(path, f"--texts {path}") if line.strip()]
    if not found:
        raise InputError(f"--texts {path} holds no text; expected one per line", code="no-texts")
    return found


def image_boxes(image: Path, box_file: Path, *, skip_bad_boxes: bool = False) -> Boxes:
    """The boxes of one image. A file without boxes for it is an error: it would silently have no effect."""
    found = read_box_file(box_file, skip_bad_boxes=skip_bad_boxes).for_image(str(image), image_size(image))
    if not len(found):
        raise InputError(f"--boxes {box_file} has no boxes for {image}; its image names must match", code="boxes-none")
    return found


def to_json(queries: Sequence[str], found: Sequence[Sequence[Hit | TextHit]]) -> dict[str, object]:
    """One query's document, or those of several queries under `searches`."""
    each: list[dict[str, object]] = [
        {"query": query, "hits": [asdict(hit) for hit in hits]} for query, hits in zip(queries, found, strict=True)
    ]
    return each[0] if len(each) == 1 else {"searches": each}


def image_page(
    gallery: StoredGallery | StoreGallery, texts: Sequence[str], found: Sequence[Sequence[Hit]], notice: str | None
) -> Report:
    def picture(name: str) -> Picture:
        return Picture(*gallery.picture_of(name))

    return images_page(gallery.title, len(gallery), texts, found, picture, notice)
