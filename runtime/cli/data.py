"""`qpert data`: about data sets on the disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from qpert.runtime.cli.options import PATH, json_option, print_result
from qpert.runtime.inputs.data_check import CheckedData, check_data_folder
from qpert.runtime.inputs.datasets import SPLITS
from qpert.runtime.inputs.published_data import PUBLISHED
from qpert.runtime.report.model import Report, Section, Table, paragraphs


@click.group("data", short_help="what is there of the paper's data sets, and where the rest is published")
def command() -> None:
    """About data sets on the disk. Nothing is downloaded."""


@command.command("check", short_help="is this the layout that `qpert eval` reads, and what is missing?")
@click.argument("folder", metavar="DIR", type=PATH)
@click.option(
    "--dataset",
    "names",
    multiple=True,
    type=click.Choice([data.name for data in PUBLISHED]),
    help="what to look for [default: what DIR shows, else both]",
)
@click.option("--split", type=click.Choice(SPLITS), default="test", show_default=True, help="the split to be evaluated")
@json_option
def check(folder: Path, names: Sequence[str], split: str, as_json: bool) -> int:
    """Say which pictures, annotations and Entities boxes of Flickr30K and COCO are under DIR.

    DIR is a data set's folder, or the one that holds `flickr30k` and `coco`. For what is missing: where it is
    published, under which terms, and where it belongs. Nothing is downloaded. Exits 1 where something is missing for
    `qpert eval`.
    """
    found = check_data_folder(folder, split, names)
    document = {"complete": all(one.complete for one in found), "datasets": [one.to_dict() for one in found]}
    print_result(document, lambda: data_report(folder, found), as_json=as_json)
    return 0 if document["complete"] else 1


def data_report(folder: Path, found: Sequence[CheckedData]) -> Report:
    return Report("qpert data check", str(folder), tuple(section(one) for one in found))


def section(checked: CheckedData) -> Section:
    """One data set: its parts, then what to get for those that are not there."""
    rows = tuple(
        (part.name, part.state, f"{part.found:,}{'' if part.wanted is None else f' of {part.wanted:,}'}", part.remark)
        for part in checked.parts
    )
    lines = []
    for part in checked.parts:
        if part.state != "there":
            source = part.source
            lines.append(
                f"{part.name}: {source.what}, {source.url.format(split=checked.split)} ({source.terms}); put it at "
                f"{checked.root}/{source.layout.format(split=checked.split)}"
            )
    if checked.problem is not None:
        lines.append(f"`qpert eval` would say: {checked.problem}")
    if checked.complete:
        lines.append(f"complete: qpert eval BUNDLE --dataset {checked.root} --split {checked.split}")
    title = f"{checked.data.title}, {checked.split} split, in {checked.root}"
    return Section(title, (Table(("part", "", "found", ""), rows, words=4), *paragraphs(*lines)))
