"""A Hugging Face detector's image processor as a `DetectorGeometry`: every field is honoured, or refused by name.

Source: transformers `models/rt_detr/image_processing_rt_detr.py`, the processor of RT-DETR, RT-DETRv2, D-FINE and
DEIMv2, and `image_processing_backends.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qpert.exporter.checkpoints.image_processor import (
    COMMON_DEFAULTS,
    WITHOUT_EFFECT,
    filter_name,
    normalisation,
    processor_files,
    stated_size,
    unsupported,
    wrong_value,
)
from qpert.exporter.checkpoints.json_files import whole_number
from qpert.runtime.detection.geometry import DetectorGeometry
from qpert.runtime.errors import CheckpointError

DEFAULTS: dict[str, Any] = COMMON_DEFAULTS | {
    "size": {"height": 640, "width": 640},
    "resample": 2,
    "do_normalize": False,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}
PROCESSORS = frozenset(
    {"RTDetrImageProcessor", "RTDetrImageProcessorFast", "RTDetrImageProcessorPil", "RTDetrFeatureExtractor"}
)
ANNOTATIONS = frozenset({"format", "annotation_format", "do_convert_annotations", "return_segmentation_masks"})
"""Fields about training data, which change no pixel."""
OFF_ONLY = frozenset({"do_pad", "do_center_crop"})
UNUSED_WHEN_OFF = frozenset({"pad_size", "crop_size"})


@dataclass(frozen=True)
class ReadGeometry:
    """How pictures are prepared, and notes on it."""

    geometry: DetectorGeometry
    notes: tuple[str, ...]


def read_geometry(folder: Path) -> ReadGeometry:
    """Read the folder's `preprocessor_config.json` (or the image processor in `processor_config.json`).

    Raises:
        CheckpointError: there is none; a field is unknown or has a value that is not supported.
    """
    files = processor_files(folder)
    if not files:
        raise CheckpointError(
            f"{folder} has neither preprocessor_config.json nor processor_config.json; download the whole folder",
            code="hub-file-missing",
        )
    path, values, notes = files[0]
    return geometry_of(path, values, notes)


def geometry_of(path: Path, values: Mapping[str, Any], notes: tuple[str, ...] = ()) -> ReadGeometry:
    """The geometry of one file's fields. Errors: see `read_geometry`."""
    stated = {key: value for key, value in values.items() if value is not None}  # null means the class's default
    kind = stated.get("image_processor_type") or stated.get("feature_extractor_type") or "RTDetrImageProcessor"
    if kind not in PROCESSORS:
        raise unsupported(path, "image_processor_type", kind, f"supported are {', '.join(sorted(PROCESSORS))}")
    unknown = stated.keys() - DEFAULTS.keys() - WITHOUT_EFFECT - ANNOTATIONS - OFF_ONLY - UNUSED_WHEN_OFF
    if acting := sorted(name for name in unknown if stated[name] is not False):
        raise CheckpointError(
            f"{path} has unknown fields, which qpert cannot honour: {', '.join(acting)}; expected the fields of "
            "transformers' RTDetrImageProcessor",
            code="preprocessing-unsupported",
        )
    for name in sorted(OFF_ONLY & stated.keys()):
        if stated[name]:
            raise unsupported(path, name, stated[name], "only false is supported")
    for name in DEFAULTS:
        if name.startswith(("do_", "default_")) and name in stated and not isinstance(stated[name], bool):
            raise wrong_value(path, name, stated[name], "true or false")
    fields = DEFAULTS | stated
    if not fields["do_resize"]:
        raise unsupported(path, "do_resize", False, "pictures must be resized to the size of the graph's input")
    size = stated_size(path, "size", fields["size"], square=fields["default_to_square"])
    if set(size) != {"height", "width"}:
        raise unsupported(path, "size", fields["size"], "expected height and width, to which pictures are stretched")
    height, width = (whole_number(f"{path}, size", size, side) for side in ("height", "width"))
    mean, std, scale_notes = normalisation(path, fields)
    resample = filter_name(path, fields["resample"])
    geometry = DetectorGeometry(width, height, "stretch", "rgb", 1 / 255, mean, std, resample)
    return ReadGeometry(geometry, (*notes, *scale_notes))
