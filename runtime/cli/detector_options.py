"""`--detector` and the options that go with it, for commands that otherwise take `--boxes`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import click

from qpert.runtime.cli.options import PATH, detection_options
from qpert.runtime.detection.detector import Detector, parse_classes
from qpert.runtime.errors import InputError

PREFIX = "detector-"
OPTIONS = ("threshold", "classes", "suppress")


@dataclass(frozen=True)
class DetectorChoice:
    """The detector that `--detector` names, None without it, and the options of it that were given."""

    folder: Path | None
    threshold: float | None
    classes: str | None
    suppress: float | None

    def check(self, boxes: Path | None) -> None:
        """Raises InputError for options of a detector without one, or both a detector and a box file."""
        if self.folder is not None and boxes is not None:
            raise InputError(
                "--boxes and --detector exclude each other: boxes are read from a file, or found; give one of them",
                code="boxes-and-detector",
            )
        given = [name for name in OPTIONS if getattr(self, name) is not None]
        if self.folder is None and given:
            raise InputError(
                f"--{PREFIX}{given[0].replace('_', '-')} needs --detector; add it", code="detector-missing"
            )

    @contextmanager
    def open(self, provider: str, max_boxes: int | None) -> Iterator[Detector | None]:
        """The detector, on the provider of the command and with its `--max-boxes`."""
        if self.folder is None:
            yield None
            return
        with Detector.open(
            self.folder,
            provider,
            threshold=self.threshold,
            max_boxes=max_boxes,
            classes=parse_classes(self.classes),
            suppression=self.suppress,
        ) as detector:
            yield detector


def detector_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--detector` and `--detector-…`, which reach the command as one `detector`."""

    @wraps(command)
    def collected(**values: Any) -> Any:
        choice = DetectorChoice(
            values.pop("detector_folder"), **{name: values.pop(f"detector_{name}") for name in OPTIONS}
        )
        return command(**values, detector=choice)

    wrapped = detection_options(PREFIX, most=False)(collected)
    option = click.option(
        "--detector",
        "detector_folder",
        type=PATH,
        help="find the boxes with this detector, which `qpert export detector` made",
    )
    made: Callable[..., Any] = option(wrapped)
    return made
