"""`qpert index`: encode images into a gallery that `qpert search` reads."""

from __future__ import annotations

import json
import time
from contextlib import closing
from pathlib import Path
from typing import Any, get_args

import click

from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.cli.options import PATH, bundle_argument, json_option, provider_option
from qpert.runtime.errors import InputError
from qpert.runtime.gallery.catalogue import has_catalogue, open_catalogue
from qpert.runtime.gallery.entries import ImageEntry, read_entries, with_boxes
from qpert.runtime.gallery.indexing import IndexSummary, index_images
from qpert.runtime.gallery.spec import FEATURE_MODES, FeatureMode
from qpert.runtime.gallery.writer import open_writer
from qpert.runtime.inputs.box_files import XmlCoordinates
from qpert.runtime.progress import Progress, Terminal
from qpert.runtime.retrieval.encoder import Encoder


@click.command("index", short_help="images to a gallery on disk", context_settings={"show_default": True})
@bundle_argument
@click.argument("images", type=PATH, required=False)
@click.option("--out", type=PATH, required=True, help="the gallery's folder; an existing gallery is resumed")
@click.option("--boxes", type=PATH, help="box file, or folder of XML files: JSONL, CSV, COCO JSON, Entities/VOC XML")
@click.option(
    "--xml-coordinates",
    type=click.Choice(get_args(XmlCoordinates)),
    default="one_based_inclusive",
    help="how corners in XML box files are counted",
)
@click.option(
    "--features",
    type=click.Choice(FEATURE_MODES),
    help="keep image features for re-ranking, or encode the shortlist again at each search "
    "[default: what the gallery has, stored for a new one]",
)
@click.option("--replace", is_flag=True, help="encode images again whose file, boxes or captions have changed")
@click.option("--skip-unreadable", is_flag=True, help="leave out images that cannot be read, instead of stopping")
@click.option("--delete", "deleted", multiple=True, metavar="NAME", help="take an image out; may be repeated")
@click.option("--compact", is_flag=True, help="give back the space of deleted and replaced images")
@click.option("--repair", is_flag=True, help="check every hash, and encode again what is damaged")
@provider_option
@json_option
def command(
    bundle: Path,
    images: Path | None,
    out: Path,
    boxes: Path | None,
    xml_coordinates: XmlCoordinates,
    features: FeatureMode | None,
    replace: bool,
    skip_unreadable: bool,
    deleted: tuple[str, ...],
    compact: bool,
    repair: bool,
    provider: str,
    as_json: bool,
) -> None:
    """Encode IMAGES into a gallery: a folder, a .txt list of files, or LAVIS annotation JSON (captions come along).

    Interrupted or killed, the same command resumes where it stopped. Images that are in the gallery already are left
    alone; IMAGES may be left out with --delete and --compact.
    """
    started = time.perf_counter()
    if images is None and (boxes is not None or replace or repair or not (deleted or compact)):
        raise InputError("IMAGES is missing: a folder, a .txt list or annotation JSON; only --delete and --compact "
                         "work without it")  # fmt: skip
    progress = Terminal()
    removed, compacted = change(out, deleted, compact=compact and images is None, repair=repair, progress=progress)
    report: dict[str, object] = {"gallery": str(out), "deleted": removed}
    if images is not None:
        entries = listed(images, boxes, xml_coordinates)
        wanted: dict[str, Any] = {
            "features": features or features_of(out),
            "replace": replace,
            "skip_unreadable": skip_unreadable,
        }
        with closing(Encoder(Bundle.open(bundle), provider)) as encoder:
            summary = index_images(out, encoder, entries, **wanted, progress=progress)
        report |= to_json(summary)
        if compact:
            _, compacted = change(out, (), compact=True, repair=False, progress=progress)
    report |= {"compacted": compacted, "bytes": size_of(out), "seconds": round(time.perf_counter() - started, 3)}
    if as_json:
        click.echo(json.dumps(report))
    else:
        show(report)


def change(out: Path, deleted: tuple[str, ...], *, compact: bool, repair: bool, progress: Progress) -> tuple[int, int]:
    """Delete, repair and compact an existing gallery; returns the images deleted, and the dead ones given back."""
    if not (deleted or compact or repair):
        return 0, 0
    with open_writer(out) as writer:
        writer.delete(deleted)
        damaged = writer.repair() if repair else []
        if damaged:
            progress.say(f"{len(damaged)} images are damaged and will be encoded again, {damaged[0]} for instance")
        return len(deleted), writer.compact() if compact else 0


def listed(images: Path, boxes: Path | None, xml_coordinates: XmlCoordinates) -> list[ImageEntry]:
    entries = read_entries(images)
    return entries if boxes is None else with_boxes(entries, boxes, xml_coordinates=xml_coordinates)


def features_of(out: Path) -> FeatureMode:
    """What an existing gallery keeps; `stored` for a new one."""
    if not out.is_dir() or not has_catalogue(out):
        return "stored"
    with closing(open_catalogue(out)) as catalogue:
        return catalogue.spec.features


def to_json(summary: IndexSummary) -> dict[str, object]:
    skipped = [{"image": name, "reason": reason} for name, reason in summary.skipped]
    return {**vars(summary), "skipped": skipped}


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def show(report: dict[str, object]) -> None:
    counts = [f"{report[key]} {key}" for key in ("added", "replaced", "unchanged", "deleted", "compacted")
              if report.get(key)]  # fmt: skip
    size = f"{int(str(report['bytes'])) / 1e6:.1f} MB"
    holds = f"holds {report['images']} images, {report['texts']} texts, " if "images" in report else ""
    click.echo(f"{report['gallery']} {holds}{size}; {', '.join(counts) or 'nothing changed'}")
    skipped = report.get("skipped")
    for entry in skipped if isinstance(skipped, list) else []:
        click.echo(f"skipped {entry['image']}: {entry['reason']}")
