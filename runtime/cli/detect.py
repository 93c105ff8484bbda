"""`qpert detect`: the boxes of pictures, as a box file."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path

import click

from qpert.runtime.cli.options import PATH, detection_options, html_option, json_option, print_result, provider_option
from qpert.runtime.detection.detector import Detector, parse_classes
from qpert.runtime.detection.page import detections_page, detections_report
from qpert.runtime.detection.run import check_out, detect_images
from qpert.runtime.files import portable_name
from qpert.runtime.gallery.entries import list_images
from qpert.runtime.inputs.box_files import read_box_file
from qpert.runtime.inputs.boxes import Boxes
from qpert.runtime.inputs.images import image_size
from qpert.runtime.progress import Terminal
from qpert.runtime.report.files import write_copy
from qpert.runtime.report.html import to_html


@click.command("detect", short_help="boxes of pictures, with a detector", context_settings={"show_default": True})
@click.argument("detector", type=PATH)
@click.argument("images", type=PATH)
@click.option("--out", type=PATH, required=True, help="the box file (.jsonl), a line a box")
@detection_options()
@click.option("--skip-unreadable", is_flag=True, help="skip images that cannot be read, instead of stopping")
@click.option("--force", is_flag=True, help="replace a box file that exists")
@html_option
@provider_option
@json_option
def command(
    detector: Path,
    images: Path,
    out: Path,
    threshold: float | None,
    max_boxes: int | None,
    classes: str | None,
    suppress: float | None,
    skip_unreadable: bool,
    force: bool,
    html: Path | None,
    provider: str,
    as_json: bool,
) -> None:
    """Find objects in IMAGES (as for `qpert index`) with DETECTOR, which `qpert export detector` made.

    The box file is what `qpert index --boxes` takes. If interrupted or killed, run the same command again to resume.
    """
    started = time.perf_counter()
    check_out(out, force=force)
    listing = list_images(images)
    progress = Terminal()
    with Detector.open(
        detector,
        provider,
        threshold=threshold,
        max_boxes=max_boxes,
        classes=parse_classes(classes),
        suppression=suppress,
    ) as opened:
        found = detect_images(
            opened, listing.entries, out, force=force, skip_unreadable=skip_unreadable, progress=progress
        )
        options = opened.options.to_dict()
    if html is not None:
        skipped = {name for name, _ in found.skipped}
        names = [portable_name(entry.name) for entry in listing.entries]
        boxes = read_box_file(out).require(names) if found.boxes else None  # equal names alone match from here on
        pictures = []
        for entry, name in zip(listing.entries, names, strict=True):
            if entry.name not in skipped:
                size = image_size(entry.path)
                pictures.append((entry, boxes.for_image(name, size) if boxes else Boxes.empty(size)))
        write_copy("--html", html, to_html(detections_page(detector.name, found, pictures)))
    document = {
        "out": str(out),
        "detector": str(detector),
        "options": options,
        **asdict(found),
        "skipped": [{"image": name, "reason": reason} for name, reason in found.skipped],
        "left_out": [{"name": name, "reason": reason} for name, reason in listing.left_out],
        "seconds": round(time.perf_counter() - started, 3),
    }
    print_result(document, lambda: detections_report(out, found), as_json=as_json)
    for line in listing.left_out_lines():
        progress.say(line)
