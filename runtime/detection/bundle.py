"""A detector on disk: `manifest.json` with `"kind": "detector"`, and one graph.

detector/
  manifest.json        kind, schema version, checkpoint, graph, labels, preprocessing, defaults, verification, hashes
  onnx/detector.onnx   pixel_values [B,3,H,W], image_sizes [B,2] → boxes [B,K,4] in pixels, scores [B,K], labels [B,K]
  engines/             as in every bundle
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qpert.runtime.bundle.folder import HashedFolder, existing_folder
from qpert.runtime.bundle.graph_spec import GraphSpec
from qpert.runtime.bundle.manifest import MANIFEST_NAME, CheckpointRecord, is_detector, manifest_values
from qpert.runtime.bundle.paths import bundle_path
from qpert.runtime.bundle.roles import DETECTOR, PIXELS
from qpert.runtime.bundle.schema import DETECTOR_MANIFEST, check_against
from qpert.runtime.detection.geometry import DetectorGeometry
from qpert.runtime.detection.options import DetectionOptions
from qpert.runtime.errors import BundleError, InputError

DETECTOR_SCHEMA = 1
EXPECTED = "a detector made by `qpert export detector`"


@dataclass(frozen=True)
class DetectorManifest:
    """Everything that a detector's manifest holds.

    architecture: the exporter's name for it (`rt_detr_v2`, `yolox`), only shown. labels: names by label id. defaults:
    the options of `qpert detect` where none is given. decoding: what the graph does after the network (top-k, NMS),
    for people. verification: what the export was compared with, and the largest differences found. quantization: as in
    other bundles.
    """

    architecture: str
    checkpoint: CheckpointRecord
    precision: str
    graph: GraphSpec
    labels: tuple[str, ...]
    preprocessing: DetectorGeometry
    defaults: DetectionOptions
    decoding: dict[str, Any]
    tools: dict[str, str]
    command: str
    created: str
    files: dict[str, str]
    notes: tuple[str, ...] = ()
    verification: dict[str, Any] | None = None
    quantization: dict[str, Any] | None = None

    @property
    def graphs(self) -> dict[str, GraphSpec]:
        return {self.graph.name: self.graph}

    @property
    def all_graphs(self) -> dict[str, GraphSpec]:
        return self.graphs

    def to_dict(self) -> dict[str, Any]:
        values: dict[str, Any] = {
            "kind": DETECTOR,
            "schema_version": DETECTOR_SCHEMA,
            "architecture": self.architecture,
            "checkpoint": {key: value for key, value in asdict(self.checkpoint).items() if value is not None},
            "precision": self.precision,
            "graphs": {self.graph.name: self.graph.to_dict()},
            "labels": list(self.labels),
            "preprocessing": self.preprocessing.to_dict(),
            "defaults": self.defaults.to_dict(),
        }
        rest = ("decoding", "tools", "command", "created", "notes", "verification", "quantization", "files")
        return values | {key: getattr(self, key) for key in rest}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DetectorManifest:
        """Raises BundleError, InputError, LookupError, TypeError or ValueError where `values` is no such manifest."""
        version = values["schema_version"]
        if version != DETECTOR_SCHEMA or isinstance(version, bool):
            raise BundleError(
                f"the detector has schema version {version!r}, this qpert reads {DETECTOR_SCHEMA}; upgrade qpert, or "
                "export the detector again with this version",
                code="bundle-schema-newer",
            )
        check_against(DETECTOR_MANIFEST, values)
        ((name, described),) = values["graphs"].items()
        labels = tuple(values["labels"])
        if not labels or not all(isinstance(label, str) for label in labels):
            raise ValueError(f"labels are {labels!r}")
        manifest = cls(
            architecture=values["architecture"],
            checkpoint=CheckpointRecord(**values["checkpoint"]),
            precision=values["precision"],
            graph=GraphSpec.from_dict(name, described),
            labels=labels,
            preprocessing=DetectorGeometry.from_dict(values["preprocessing"]),
            defaults=DetectionOptions.from_dict(values["defaults"]),
            decoding=dict(values["decoding"]),
            tools=dict(values["tools"]),
            command=values["command"],
            created=values["created"],
            files=dict(values["files"]),
            notes=tuple(values["notes"]),
            verification=values["verification"],
            quantization=values["quantization"],
        )
        manifest.check()
        return manifest

    def check(self) -> None:
        """Raises ValueError where the graph is no detector's, or takes other pictures than the preprocessing makes."""
        geometry = self.preprocessing
        made = (3, geometry.height, geometry.width)
        if self.graph.role != DETECTOR or self.graph.input(PIXELS).shape[1:] != made:
            raise ValueError(f"graph {self.graph.name!r} of role {self.graph.role!r} does not take pictures of {made}")
        largest_batch(self.graph)
        self.defaults.class_ids(self.labels)


def largest_batch(graph: GraphSpec) -> int:
    """The most pictures of one call: a named axis has a range, and a network can fix its batch."""
    axis = graph.input(PIXELS).shape[0]
    return graph.ranges[axis].max if isinstance(axis, str) else axis


@dataclass(frozen=True)
class DetectorBundle(HashedFolder):
    """An opened detector bundle. Use `DetectorBundle.open`."""

    manifest: DetectorManifest

    @classmethod
    def open(cls, folder: str | Path) -> DetectorBundle:
        """Read the manifest and check the hash of every file, as `Bundle.open` does.

        Raises:
            BundleError: no detector, a newer schema, a missing or altered file, a path outside the folder.
        """
        root = existing_folder(folder, EXPECTED)
        bundle = cls(root, read_detector_manifest(root))
        bundle.require_files()
        return bundle

    @classmethod
    def just_written(cls, folder: Path) -> DetectorBundle:
        """Open a detector whose hashes this process has just computed: they are remembered, not computed again."""
        bundle = cls(folder, read_detector_manifest(folder))
        bundle.remember_files()
        return bundle


def read_detector_manifest(folder: Path) -> DetectorManifest:
    """Read and check `folder/manifest.json`, every path in it included.

    Raises:
        BundleError: it is no detector's manifest, of a newer schema, or a path leaves the folder.
    """
    path, values = folder / MANIFEST_NAME, manifest_values(folder)
    if not is_detector(values):
        raise BundleError(
            f"{folder} is a bundle of the family {values.get('family')!r}, which finds no boxes; expected {EXPECTED}",
            code="bundle-no-detector",
        )
    try:
        manifest = DetectorManifest.from_dict(values)
        for name in (*manifest.files, manifest.graph.file):
            bundle_path(folder, name)
    except BundleError:
        raise
    except (InputError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise BundleError(
            f"{path} is not a detector's manifest ({error!r}); export the detector again", code="manifest-fields"
        ) from error
    if manifest.graph.file not in manifest.files:
        raise BundleError(
            f"{path} gives no hash for {manifest.graph.file}; do not trust this detector, export it again",
            code="manifest-unhashed",
        )
    return manifest
