"""`qpert index`: encode images into a gallery that `qpert search` reads."""

from __future__ import annotations

import json
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass
from dataclasses import replace as replaced
from pathlib import Path
from typing import Any, get_args

import click

from qpert.runtime.bundle.calibrated import calibration_notice
from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.cli.detector_options import detector_options
from qpert.runtime.cli.number_types import IntegerRange
from qpert.runtime.cli.options import (
    PATH,
    bundle_argument,
    json_option,
    max_boxes_option,
    provider_option,
    require,
    skip_bad_option,
)
from qpert.runtime.cli.store_options import (
    copy_into,
    delete_from,
    index_into,
    recall_of,
    recall_option,
    store_address,
    store_option,
)
from qpert.runtime.detection.choice import DetectorChoice
from qpert.runtime.detection.source import BoxSource
from qpert.runtime.errors import InputError
from qpert.runtime.gallery.entries import Listing, list_images
from qpert.runtime.gallery.entries import with_boxes as entries_with_boxes
from qpert.runtime.gallery.indexing import IndexSummary, index_images
from qpert.runtime.gallery.spec import FEATURE_MODES, FeatureMode
from qpert.runtime.gallery.writer import open_writer
from qpert.runtime.inputs.box_files import XmlCoordinates
from qpert.runtime.progress import Progress, Terminal
from qpert.runtime.retrieval.encoder import Encoder
from qpert.runtime.sessions.workers import thread_count, worker_count
from qpert.runtime.stores.address import StoreAddress
from qpert.runtime.stores.opening import open_store


@click.command("index", short_help="images to a gallery on disk", context_settings={"show_default": True})
@bundle_argument
@click.argument("images", type=PATH, required=False)
@click.option(
    "--from", "vectors", type=PATH, metavar="PARQUET", help="images already encoded by qpert.runtime.batch, no IMAGES"
)
@click.option("--out", type=PATH, help="the gallery's folder; an existing gallery is resumed")
@store_option
@click.option("--boxes", type=PATH, help="box file, or folder of XML files: JSONL, CSV, COCO JSON, Entities/VOC XML")
@click.option(
    "--xml-coordinates",
    type=click.Choice(get_args(XmlCoordinates)),
    default="one_based_inclusive",
    help="how corners in XML box files are counted",
)
@detector_options
@click.option(
    "--features",
    type=click.Choice(FEATURE_MODES),
    help="keep image features for re-ranking, or re-encode the shortlist at each search "
    "[default: as in the gallery; for a new one stored, or none if the bundle has no pair scorer]",
)
@click.option(
    "--replace",
    is_flag=True,
    help="re-encode images whose file, boxes or captions have changed, and take over changed metadata",
)
@skip_bad_option
@max_boxes_option
@click.option("--skip-unreadable", is_flag=True, help="skip images that cannot be read, instead of stopping")
@click.option("--delete", "deleted", multiple=True, metavar="NAME", help="remove an image; may be repeated")
@recall_option
@click.option("--compact", is_flag=True, help="reclaim the space of deleted and replaced images")
@click.option("--repair", is_flag=True, help="check every hash and re-encode damaged images")
@click.option(
    "--workers",
    type=IntegerRange(min=0),
    default=0,
    help="batches read and encoded at a time, which share the cores; 0: 2 on a CPU, 1 on a GPU",
)
@provider_option
@json_option
def command(
    bundle: Path,
    images: Path | None,
    vectors: Path | None,
    out: Path | None,
    store: str | None,
    boxes: Path | None,
    xml_coordinates: XmlCoordinates,
    skip_bad_boxes: bool,
    detector: DetectorChoice,
    max_boxes: int | None,
    features: FeatureMode | None,
    replace: bool,
    skip_unreadable: bool,
    deleted: tuple[str, ...],
    recall_queries: int,
    compact: bool,
    repair: bool,
    workers: int,
    provider: str,
    as_json: bool,
) -> None:
    """Encode IMAGES into a gallery: a folder, a .txt or .jsonl list of files, or LAVIS annotation JSON (captions come
    along). The keys of a .jsonl list, besides image and captions, are metadata for `qpert search --where`.

    If interrupted or killed, run the same command again to resume. Images already in the gallery are not encoded again;
    IMAGES may be omitted with --delete and --compact. With --store, the vectors go to Qdrant or PostgreSQL; --from
    takes them from Parquet.
    """
    started = time.perf_counter()
    progress = Terminal()
    if vectors is not None:
        other = images is not None or boxes is not None or detector.folder is not None or deleted or compact or repair
        require_vectors_alone(other=bool(other or store))
        if out is None:
            raise InputError("--from needs --out FOLDER, the gallery that takes the vectors", code="index-target")
        wanted: dict[str, Any] = {"features": features, "replace": replace, "skip_unreadable": skip_unreadable}
        report: dict[str, object] = {"gallery": str(out)} | index_from(vectors, bundle, out, provider, wanted, progress)
        report |= {"bytes": size_of(out), "seconds": round(time.perf_counter() - started, 3)}
        show_index(report, as_json=as_json)
        return
    if images is None and (
        boxes is not None or detector.folder is not None or replace or repair or not (deleted or compact)
    ):
        raise InputError(
            "IMAGES is missing: a folder, a .txt or .jsonl list, or annotation JSON; only --delete and --compact work "
            "without it",
            code="images-missing",
        )
    detector.check(boxes)
    address = store_address(store, out, features, keeps=compact or repair)
    removed = compacted = 0
    if out is not None:
        removed, compacted = change(out, deleted, compact=compact and images is None, repair=repair, progress=progress)
    elif deleted and address is not None:
        removed = delete_from(address, deleted)
    report = {"gallery": str(out or address), "deleted": removed}
    left_out: list[str] = []
    if images is not None:
        listing = listed(images, boxes, xml_coordinates, skip_bad_boxes=skip_bad_boxes, max_boxes=max_boxes)
        wanted = {"features": features, "replace": replace, "skip_unreadable": skip_unreadable}
        wanted["workers"] = count = worker_count(provider, workers)
        threads = thread_count(count)
        opened = Encoder(Bundle.open(bundle), provider, threads=threads, spin=count == 1)
        with closing(opened) as encoder, detector.open(provider, max_boxes, threads=threads) as source:
            place = Place(out, address, recall_queries)
            report |= encode_into(place, encoder, listing, source, bundle, progress, wanted)
        left_out = listing.left_out_lines()
        if compact and out is not None:
            _, compacted = change(out, (), compact=True, repair=False, progress=progress)
    report |= {"compacted": compacted, "bytes": None if out is None else size_of(out)}
    report |= {"seconds": round(time.perf_counter() - started, 3)}
    show_index(report, as_json=as_json)
    for line in left_out:
        progress.say(line)


@dataclass(frozen=True)
class Place:
    """Where vectors go: a gallery, a store, or both."""

    out: Path | None
    address: StoreAddress | None
    recall_queries: int


def encode_into(
    place: Place,
    encoder: Encoder,
    listing: Listing,
    source: BoxSource | None,
    bundle: Path,
    progress: Progress,
    wanted: dict[str, Any],
) -> dict[str, object]:
    """Encode the images of a list; what was done, for the report. `wanted` as in `index_images`."""
    given = any(entry.boxes is not None and len(entry.boxes) for entry in listing.entries)
    with_boxes = given or source is not None
    notice = calibration_notice(encoder.manifest, encoder.perturbation, bundle) if with_boxes else None
    if notice is not None:
        progress.say(notice)
    with ExitStack() as stack:  # an engine that does not answer is said before hours of encoding
        engine = None if place.address is None else stack.enter_context(open_store(place.address))
        if place.out is not None:
            summary = index_images(place.out, encoder, listing.entries, boxes=source, **wanted, progress=progress)
        else:
            assert engine is not None
            choices = {name: value for name, value in wanted.items() if name != "features"}
            summary = index_into(engine, encoder, listing, source, progress, **choices)
        report = summary_json(summary, listing)
        if engine is not None:
            report |= {"store": str(place.address)}
            report |= {} if place.out is None else {"copied": copy_into(engine, place.out, encoder, progress)}
            report |= {"recall": recall_of(engine, place.recall_queries, place.out, encoder)}
    return report


def show_index(report: dict[str, object], *, as_json: bool) -> None:
    """What was done, on stdout."""
    if as_json:
        click.echo(json.dumps(report))
    else:
        show(report)


def require_vectors_alone(*, other: bool) -> None:
    """Raises InputError for --from together with what only images need."""
    require("qpert index --from", ("pyarrow",), "parquet")
    if other:
        raise InputError(
            "--from takes images that are already encoded; leave out IMAGES, --boxes and --detector, and use --delete, "
            "--compact and --repair in a call of their own",
            code="vectors-and-images",
        )


def index_from(
    vectors: Path, bundle: Path, out: Path, provider: str, wanted: dict[str, Any], progress: Progress
) -> dict[str, object]:
    """The gallery of what `qpert.runtime.batch` encoded; `wanted` as in `index_vectors`."""
    from qpert.runtime.batch.importing import index_vectors

    with closing(Encoder(Bundle.open(bundle), provider)) as encoder:
        summary = index_vectors(out, encoder, vectors, **wanted, progress=progress)
    return summary_json(summary, Listing(()))


def change(out: Path, deleted: tuple[str, ...], *, compact: bool, repair: bool, progress: Progress) -> tuple[int, int]:
    """Delete, repair and compact an existing gallery; returns how many images were deleted, and how many reclaimed."""
    if not (deleted or compact or repair):
        return 0, 0
    with open_writer(out) as writer:
        writer.delete(deleted)
        damaged = writer.repair() if repair else []
        if damaged:
            progress.say(f"{len(damaged)} images are damaged and will be encoded again, such as {damaged[0]}")
        return len(deleted), writer.compact() if compact else 0


def listed(images: Path, boxes: Path | None, xml_coordinates: XmlCoordinates, **choices: Any) -> Listing:
    """The images of IMAGES with their boxes from --boxes; `choices` as in `entries.with_boxes`."""
    listing = list_images(images)
    if boxes is None:
        return listing
    entries = entries_with_boxes(listing.entries, boxes, xml_coordinates=xml_coordinates, **choices)
    return replaced(listing, entries=tuple(entries))


def summary_json(summary: IndexSummary, listing: Listing) -> dict[str, object]:
    """`skipped`: images that could not be read; `left_out`: entries of IMAGES that are not images."""
    skipped = [{"image": name, "reason": reason} for name, reason in summary.skipped]
    left_out = [{"name": name, "reason": reason} for name, reason in listing.left_out]
    return {**vars(summary), "skipped": skipped, "left_out": left_out}


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def show(report: dict[str, object]) -> None:
    counts = [f"{report[key]} {key}" for key in ("added", "replaced", "relabelled", "unchanged", "deleted", "compacted")
              if report.get(key)]  # fmt: skip
    size = "its vectors" if report["bytes"] is None else f"{int(str(report['bytes'])) / 1e6:.1f} MB"
    holds = f"holds {report['images']} images, {report['texts']} texts, " if "images" in report else ""
    click.echo(f"{report['gallery']} {holds}{size}; {', '.join(counts) or 'nothing changed'}")
    if report.get("without_boxes"):
        click.echo(f"the detector found nothing in {report['without_boxes']} of them: indexed without boxes")
    recall = report.get("recall")
    if isinstance(recall, dict):
        shares = {depth: recall[key] for depth, key in ((10, "r10"), (64, "r64")) if recall[key] is not None}
        words = ", ".join(f"R@{depth} {share:.3f}" for depth, share in shares.items()) or "fewer than 10 images"
        click.echo(f"{report['store']} against exact search, {recall['queries']} queries: {words}")
    skipped = report.get("skipped")
    for entry in skipped if isinstance(skipped, list) else []:
        click.echo(f"skipped {entry['image']}: {entry['reason']}")
