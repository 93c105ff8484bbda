"""`manifest.json`: what a bundle is, as frozen dataclasses that read and write themselves.

The manifest is the only thing the runtime believes about a bundle. It is read strictly: a missing key, a wrong type, a
newer schema or a path that leaves the bundle is a `BundleError` that names it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qpert.runtime.bundle.paths import bundle_path
from qpert.runtime.errors import BundleError, InputError
from qpert.runtime.inputs.images import ImagePreprocessing
from qpert.runtime.inputs.perturbation import Perturbation

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
GRAPH_NAMES = ("vision", "image_query", "text", "itm")


@dataclass(frozen=True)
class TensorSpec:
    """One input or output. `shape` holds numbers, and the names of axes whose length varies."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TensorSpec:
        np.dtype(values["dtype"])  # TypeError for what is none
        return cls(values["name"], values["dtype"], tuple(values["shape"]))


@dataclass(frozen=True)
class AxisRange:
    """Lengths that a named axis may have: `min` to `max`, both inclusive."""

    min: int
    max: int

    def __post_init__(self) -> None:
        if not 0 <= self.min <= self.max:
            raise ValueError(f"a range goes from {self.min} to {self.max}")


@dataclass(frozen=True)
class GraphSpec:
    """One ONNX graph: where it lies, what goes in and out, and how long its named axes may be."""

    name: str
    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    ranges: dict[str, AxisRange]

    @property
    def input_names(self) -> tuple[str, ...]:
        return tuple(spec.name for spec in self.inputs)

    @property
    def output_names(self) -> tuple[str, ...]:
        return tuple(spec.name for spec in self.outputs)

    @property
    def takes_boxes(self) -> bool:
        return "object_masks" in self.input_names

    def to_dict(self) -> dict[str, Any]:
        return {
            "file": self.file,
            "inputs": [asdict(spec) for spec in self.inputs],
            "outputs": [asdict(spec) for spec in self.outputs],
            "ranges": {axis: asdict(length) for axis, length in self.ranges.items()},
        }

    @classmethod
    def from_dict(cls, name: str, values: dict[str, Any]) -> GraphSpec:
        graph = cls(
            name,
            values["file"],
            tuple(TensorSpec.from_dict(spec) for spec in values["inputs"]),
            tuple(TensorSpec.from_dict(spec) for spec in values["outputs"]),
            {axis: AxisRange(int(length["min"]), int(length["max"])) for axis, length in values["ranges"].items()},
        )
        axes = {axis for spec in graph.inputs for axis in spec.shape if isinstance(axis, str)}
        if unknown := sorted(axes - graph.ranges.keys()):
            raise ValueError(f"graph {name!r} gives no range for the axes {', '.join(unknown)}")
        return graph


@dataclass(frozen=True)
class TokenizerSpec:
    """The tokenizer's file, and the longest sequence (in tokens, [CLS] and [SEP] included) that it makes."""

    file: str
    max_length: int
    vocab_size: int


@dataclass(frozen=True)
class CheckpointRecord:
    """Where the weights came from. `sha256` is over the checkpoint file, or over a folder's weight files in order."""

    name: str
    source: str
    family: str
    sha256: str
    license: str


@dataclass(frozen=True)
class Manifest:
    """Everything that `manifest.json` holds.

    `quantization`: what `qpert quantize` did. `calibration`: the search in which `qpert calibrate` found the
    perturbation settings. Both are None for a bundle as exported.
    """

    architecture: dict[str, Any]
    checkpoint: CheckpointRecord
    precision: str
    graphs: dict[str, GraphSpec]
    preprocessing: ImagePreprocessing
    tokenizer: TokenizerSpec
    perturbation: Perturbation
    score: dict[str, str]
    samples: str
    tools: dict[str, str]
    command: str
    created: str
    files: dict[str, str]
    notes: tuple[str, ...] = ()
    verification: dict[str, Any] | None = None
    quantization: dict[str, Any] | None = None
    calibration: dict[str, Any] | None = None
    schema_version: int = field(default=SCHEMA_VERSION)

    @property
    def grid(self) -> int:
        """Patches along one side of the resized image."""
        vision = self.architecture["vision"]
        return int(vision["image_size"]) // int(vision["patch_size"])

    def to_dict(self) -> dict[str, Any]:
        values = {
            "schema_version": self.schema_version,
            "architecture": self.architecture,
            "checkpoint": asdict(self.checkpoint),
            "precision": self.precision,
            "graphs": {name: graph.to_dict() for name, graph in self.graphs.items()},
            "preprocessing": self.preprocessing.to_dict(),
            "tokenizer": asdict(self.tokenizer),
            "perturbation": self.perturbation.to_dict(),
        }
        rest = ["score", "samples", "tools", "command", "created", "notes"]
        rest += ["quantization", "calibration", "verification", "files"]
        return values | {key: getattr(self, key) for key in rest}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Manifest:
        """Raises BundleError, KeyError or TypeError where `values` is not a manifest of this schema."""
        check_schema_version(values.get("schema_version"))
        graphs = {name: GraphSpec.from_dict(name, graph) for name, graph in values["graphs"].items()}
        missing = [name for name in GRAPH_NAMES if name not in graphs]
        if missing:
            raise BundleError(f"the manifest describes no graph named {', '.join(missing)}; export the bundle again")
        return cls(
            architecture=values["architecture"],
            checkpoint=CheckpointRecord(**values["checkpoint"]),
            precision=values["precision"],
            graphs=graphs,
            preprocessing=ImagePreprocessing.from_dict(values["preprocessing"]),
            tokenizer=TokenizerSpec(**values["tokenizer"]),
            perturbation=Perturbation.from_dict(values["perturbation"]),
            score=dict(values["score"]),
            samples=values["samples"],
            tools=dict(values["tools"]),
            command=values["command"],
            created=values["created"],
            files=dict(values["files"]),
            notes=tuple(values["notes"]),
            verification=values["verification"],
            quantization=values.get("quantization"),
            calibration=values.get("calibration"),
        )


def check_schema_version(version: object) -> None:
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise BundleError(
            f"the manifest's schema_version is {version!r}, expected a number from 1 on; this is not a qpert bundle"
        )
    if version > SCHEMA_VERSION:
        raise BundleError(
            f"the bundle has schema version {version}, this qpert reads up to {SCHEMA_VERSION}; "
            "upgrade qpert, or export the bundle again with this version"
        )


def read_manifest(folder: Path) -> Manifest:
    """Read and check `folder/manifest.json`, every path in it included.

    Raises:
        BundleError: there is none, it is not JSON, not a manifest, of a newer schema, or a path leaves the folder.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise BundleError(f"{folder} holds no {MANIFEST_NAME}; expected a folder that `qpert export` made")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise BundleError(f"{path} cannot be read as JSON ({error}); restore it or export the bundle again") from error
    if not isinstance(values, dict):
        raise BundleError(f"{path} holds a {type(values).__name__}, expected an object; export the bundle again")
    try:
        manifest = Manifest.from_dict(values)
        used = (manifest.samples, manifest.tokenizer.file, *(graph.file for graph in manifest.graphs.values()))
        for name in (*manifest.files, *used):
            bundle_path(folder, name)
        if manifest.grid < 1:
            raise ValueError(f"its images have {manifest.grid} patches a side")
    except BundleError:
        raise
    except (InputError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise BundleError(f"{path} is not a qpert manifest ({error!r}); export the bundle again") from error
    if unhashed := [name for name in used if name not in manifest.files]:
        raise BundleError(f"{path} gives no hash for {', '.join(unhashed)}; do not trust this bundle, export it again")
    return manifest
