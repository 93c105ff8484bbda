"""The gate of a detector's export: the written graph finds what the stock implementation finds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from qpert.exporter.detectors.opened import Detections, OpenedDetector
from qpert.runtime.detection.bundle import largest_batch
from qpert.runtime.detection.detector import Detector
from qpert.runtime.detection.geometry import DetectorGeometry
from qpert.runtime.errors import QpertError
from qpert.runtime.inputs.images import resize
from qpert.runtime.scenes import draw_scene, sample_scene

if TYPE_CHECKING:
    from PIL.Image import Image

TOLERANCE = 1e-4
"""Of scores, and of boxes as a share of the picture's sides. Stock and exported graph sum the same float32 products in
another order, which on networks with live activations is 1e-7 to 1e-5."""
SIZES = ((320, 240), (240, 300), (97, 61), (301, 160), (150, 150), (64, 48), (500, 400), (60, 90))
"""Pixels of the pictures that are tried: wide, tall, with odd sides, larger and smaller than what goes in."""
PICTURES = 3
COMPARED = 100
"""The best detections of each picture that are compared: below them come those that no threshold keeps."""


class DetectorGateError(QpertError):
    """The exported detector finds something else than the stock implementation."""

    exit_code = 1
    code = "detector-gate"


@dataclass(frozen=True)
class Comparison:
    """What was compared, and the largest differences found: of boxes as a share of the picture's sides.

    unmatched: detections of either side to which the other has none of the same label within the tolerance.
    """

    reference: str
    pictures: int
    batches: tuple[int, ...]
    detections: int
    unmatched: int
    box_difference: float
    score_difference: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return not self.unmatched and self.detections > 0

    def to_dict(self) -> dict[str, Any]:
        return {"verdict": "pass" if self.passed else "fail"} | asdict(self) | {"batches": list(self.batches)}


def gate_pictures(geometry: DetectorGeometry) -> list[Image]:
    """Generated scenes, the same at every export of one geometry, of three sizes.

    Stock processors leave the order of a resize's passes to Pillow, which can change bytes by 1: only pictures of which
    the bytes are the same in either order are compared. Two that need a pass along one axis at most always are.
    """
    from PIL import Image

    width, height = geometry.width, geometry.height
    filter_ = Image.Resampling[geometry.resample.upper()]
    chosen: list[Image.Image] = []
    for place, size in enumerate((*SIZES, (width, height), (2 * width, height), (width, 2 * height))):
        scene = draw_scene(sample_scene(f"detector gate {place}")).convert("RGB").resize(size, Image.Resampling.BICUBIC)
        ours = resize(scene, (width, height), geometry.resample)
        if geometry.fit != "stretch" or ours.tobytes() == scene.resize((width, height), filter_).tobytes():
            chosen.append(scene)
    return chosen[:PICTURES]


def compare(opened: OpenedDetector, detector: Detector, tolerance: float) -> Comparison:
    """Run the exported detector on batches of 1, 2 and 3 pictures (as far as it takes them) and compare each picture.

    Detections are compared as sets, by label: their order among nearly equal scores is arbitrary.
    """
    pictures = gate_pictures(detector.manifest.preprocessing)
    stock = opened.reference(pictures)
    most = largest_batch(detector.manifest.graph)
    batches = tuple(batch for batch in (1, 2, 3) if batch <= most)
    total, unmatched, boxes, scores = 0, 0, 0.0, 0.0
    for batch in batches:
        rows = []
        for start in range(0, len(pictures), batch):
            rows += detector.detections(pictures[start : start + batch])
        for picture, theirs, found in zip(pictures, stock, rows, strict=True):
            ours = Detections(*found)
            for one, other in ((theirs, ours), (ours, theirs)):
                differences = nearest(one, other, picture.size, tolerance)
                total += len(differences)
                unmatched += int((differences.max(axis=1, initial=0) > tolerance).sum())
                boxes = max(boxes, float(differences[:, 0].max(initial=0)))
                scores = max(scores, float(differences[:, 1].max(initial=0)))
    name = opened.reference_name
    return Comparison(name, len(pictures), batches, total, unmatched, boxes, scores, tolerance)


def nearest(one: Detections, other: Detections, size: Sequence[int], tolerance: float) -> np.ndarray:
    """For each of the best detections of `one`: box and score difference [n,2] to the nearest of its label in `other`.

    Without a detection of the label both are 1. Detections whose score is within the tolerance of the last one of
    either side are left out: which of them is still among the K is decided by rounding.
    """
    last = max((each.scores.min() for each in (one, other) if len(each.scores)), default=0.0)
    chosen = [row for row in np.argsort(-one.scores, kind="stable") if one.scores[row] > last + tolerance][:COMPARED]
    if not chosen and len(one.scores):  # all scores are equal: compare them all
        chosen = list(range(min(COMPARED, len(one.scores))))
    sides = np.array([*size, *size], np.float64)
    differences = np.ones((len(chosen), 2))
    for place, row in enumerate(chosen):
        same = other.labels == one.labels[row]
        if not same.any():
            continue
        box = np.abs((other.boxes[same].astype(np.float64) - one.boxes[row]) / sides).max(axis=1)
        score = np.abs(other.scores[same].astype(np.float64) - one.scores[row])
        best = np.maximum(box, score).argmin()
        differences[place] = box[best], score[best]
    return differences


def require_pass(found: Comparison) -> None:
    """Raises DetectorGateError where the comparison failed."""
    if found.passed:
        return
    raise DetectorGateError(
        f"the exported detector does not find what {found.reference} finds: {found.unmatched} of {found.detections} "
        f"detections have no counterpart within {found.tolerance:g}; the largest differences are "
        f"{found.box_difference:.2g} of the picture (boxes) and {found.score_difference:.2g} (scores). Nothing was "
        "written. A network whose class scores are nearly all equal, as an untrained one's, cannot be compared; for a "
        "trained one pass a larger --tolerance if you accept these differences, and please report it",
        code="detector-gate",
    )
