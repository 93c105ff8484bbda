"""What `--detector` and the options that go with it say, for every command that has them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from qpert.runtime.detection.detector import Detector, parse_classes
from qpert.runtime.errors import InputError

PREFIX = "detector-"
OPTIONS = ("threshold", "classes", "suppress")


@dataclass(frozen=True)
class DetectorChoice:
    """The detector that `--detector` names, None without it, and the options of it that were given."""

    folder: Path | None = None
    threshold: float | None = None
    classes: str | None = None
    suppress: float | None = None

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
    def open(self, provider: str, max_boxes: int | None = None, *, threads: int = 0) -> Iterator[Detector | None]:
        """The detector, on the provider of the command and with its `--max-boxes`; None without `--detector`."""
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
            threads=threads,
        ) as detector:
            yield detector
