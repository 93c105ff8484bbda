"""What the exporter needs of a detector, whatever it was read from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from qpert.runtime.bundle.graph_spec import AxisRange, GraphSpec, TensorSpec
from qpert.runtime.bundle.manifest import CheckpointRecord
from qpert.runtime.bundle.roles import BOX_CORNERS, DETECTOR, IMAGE_SIZES, LABEL_IDS, PIXELS, SCORES
from qpert.runtime.detection.geometry import DetectorGeometry

if TYPE_CHECKING:
    from PIL.Image import Image

GRAPH_NAME = "detector"
GRAPH_FILE = "onnx/detector.onnx"
INPUTS = ("pixel_values", "image_sizes")
OUTPUTS = ("boxes", "scores", "labels")


@dataclass(frozen=True)
class Detections:
    """Detections of one picture: boxes float32 [K,4] (x1, y1, x2, y2 in pixels), scores [K], label ids [K]."""

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class OpenedDetector(ABC):
    """A detector that can be exported.

    architecture, record, labels, preprocessing, decoding: as in the manifest. detections: K, the detections that the
    graph gives of a picture. notes: what was assumed. reference_name: what `reference` runs, for people.
    """

    reference_name: ClassVar[str]

    architecture: str
    record: CheckpointRecord
    labels: tuple[str, ...]
    preprocessing: DetectorGeometry
    decoding: dict[str, Any]
    detections: int
    notes: tuple[str, ...]

    @abstractmethod
    def write(self, path: Path) -> bool:
        """Write the graph; returns whether it takes any batch, instead of one picture a call."""

    @abstractmethod
    def reference(self, images: Sequence[Image]) -> list[Detections]:
        """What the stock implementation finds, with its own preprocessing: all K detections of each RGB picture."""


def graph_spec(geometry: DetectorGeometry, detections: int, max_batch: int | None) -> GraphSpec:
    """The declaration of a detector's graph; None where the network fixes its batch at 1."""
    rows: str | int = 1 if max_batch is None else "B"
    return GraphSpec(
        GRAPH_NAME,
        DETECTOR,
        GRAPH_FILE,
        (
            TensorSpec(INPUTS[0], PIXELS, "float32", (rows, 3, geometry.height, geometry.width)),
            TensorSpec(INPUTS[1], IMAGE_SIZES, "float32", (rows, 2)),
        ),
        (
            TensorSpec(OUTPUTS[0], BOX_CORNERS, "float32", (rows, detections, 4)),
            TensorSpec(OUTPUTS[1], SCORES, "float32", (rows, detections)),
            TensorSpec(OUTPUTS[2], LABEL_IDS, "int64", (rows, detections)),
        ),
        {} if max_batch is None else {"B": AxisRange(1, max_batch)},
    )
