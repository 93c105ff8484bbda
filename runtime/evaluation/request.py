"""Which split to evaluate, with which boxes: what the options of `qpert eval` and `qpert calibrate` choose."""

from __future__ import annotations

from dataclasses import dataclass

from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.evaluation.inputs import ENTITIES, NO_BOXES, EvaluationData, open_data
from qpert.runtime.inputs.box_files import XmlCoordinates
from qpert.runtime.inputs.perturbation import Semantics
from qpert.runtime.progress import Progress

DEFAULT_COORDINATES: dict[Semantics, XmlCoordinates] = {
    "paper": "one_based_inclusive",
    "release": "one_based_shift_all",
}


@dataclass(frozen=True)
class DataRequest:
    """Arguments of `open_data`; None lets `open` choose."""

    dataset: str
    split: str
    boxes: str | None = None
    bin_boxes: str | None = None
    xml_coordinates: XmlCoordinates | None = None
    skip_bad_boxes: bool = False
    limit: int | None = None
    max_boxes: int | None = None

    def open(self, bundle: Bundle, semantics: Semantics, progress: Progress) -> EvaluationData:
        """The split and its boxes; reports what it chose.

        Defaults: Entities boxes if the bundle takes boxes, XML corners as counted by `semantics`. Errors: see
        `open_data`.
        """
        takes = bundle.manifest.query_head.takes_boxes
        data = open_data(
            self.dataset,
            self.split,
            boxes=self.boxes or (ENTITIES if takes else NO_BOXES),
            bin_boxes=self.bin_boxes,
            xml_coordinates=self.xml_coordinates or DEFAULT_COORDINATES[semantics],
            skip_bad_boxes=self.skip_bad_boxes,
            limit=self.limit,
            max_boxes=self.max_boxes,
            progress=progress,
        )
        progress.say(f"{len(data.dataset):,} images, {len(data.dataset.captions):,} texts of {data.dataset.root}")
        progress.say(f"boxes that perturb: {data.boxes_from}; boxes that sort by size: {data.bins_from}")
        return data
