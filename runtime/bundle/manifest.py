"""`manifest.json`: what a bundle is, as frozen dataclasses that read and write themselves.

The manifest is the only thing the runtime believes about a bundle. It is read strictly: a missing key, a wrong type, a
newer schema or a path that leaves the bundle is a `BundleError` that names it. Schema 1 is upgraded as it is read, and
the published JSON Schema (`qpert.runtime.bundle.schema`) is checked next.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qpert.runtime.bundle.graph_spec import GraphSpec
from qpert.runtime.bundle.paths import bundle_path
from qpert.runtime.bundle.roles import (
    DETECTOR,
    HOST_ROLES,
    IMAGE_TOKENS,
    IMAGE_TOWER,
    PAIR_SCORER,
    QUERY_HEAD,
    ROLES,
    TEXT_TOWER,
)
from qpert.runtime.bundle.schema import MANIFEST, check_against
from qpert.runtime.bundle.score_rules import ScoreRules
from qpert.runtime.bundle.upgrade import upgrade_schema_1
from qpert.runtime.errors import BundleError, InputError
from qpert.runtime.inputs.perturbation import Perturbation
from qpert.runtime.inputs.preprocessing import ImagePreprocessing
from qpert.runtime.inputs.text import TokenizerSpec
from qpert.runtime.inputs.token_grid import TokenGrid

SCHEMA_VERSION = 2
MANIFEST_NAME = "manifest.json"


@dataclass(frozen=True)
class CheckpointRecord:
    """Where the weights came from.

    `format`: whose tensor names it has (`lavis`, `huggingface`, `open_clip`). `sha256` is over the checkpoint file, or
    over a folder's weight files in order. `parts`: other files whose tensors were used, by what they hold (`vision`).
    """

    name: str
    source: str
    format: str
    sha256: str
    license: str
    parts: dict[str, str] | None = None


@dataclass(frozen=True)
class Manifest:
    """Everything that `manifest.json` holds.

    `family` and `architecture` are the exporter's: the runtime only shows them. `patches`: rows and columns of image
    tokens, `patch_size` pixels each, after `prefix_tokens`. `quantization`: what `qpert quantize` did. `calibration`:
    the search in which `qpert calibrate` found the perturbation settings. Both are None for a bundle as exported.
    `graphs`: the network's; `host_graphs`: those of `roles.HOST_ROLES`, which no session, engine or recorded case has
    (in the file, `graphs` holds both). Older bundles have none.
    `schema_read`: the schema that the file has; this class always writes the newest.
    """

    family: str
    architecture: dict[str, Any]
    checkpoint: CheckpointRecord
    precision: str
    graphs: dict[str, GraphSpec]
    patches: tuple[int, int]
    patch_size: int
    prefix_tokens: int
    preprocessing: ImagePreprocessing
    tokenizer: TokenizerSpec
    perturbation: Perturbation
    scores: ScoreRules
    samples: str
    tools: dict[str, str]
    command: str
    created: str
    files: dict[str, str]
    notes: tuple[str, ...] = ()
    verification: dict[str, Any] | None = None
    quantization: dict[str, Any] | None = None
    calibration: dict[str, Any] | None = None
    host_graphs: dict[str, GraphSpec] = field(default_factory=dict)
    schema_read: int = field(default=SCHEMA_VERSION, compare=False)

    @property
    def token_grid(self) -> TokenGrid:
        """Which part of the picture each image token covers."""
        return TokenGrid(*self.patches, self.patch_size, self.prefix_tokens, self.preprocessing)

    @property
    def all_graphs(self) -> dict[str, GraphSpec]:
        """The network's graphs, then the host graphs."""
        return self.graphs | self.host_graphs

    def find(self, role: str) -> GraphSpec | None:
        """The graph of a role, or None."""
        return next((graph for graph in self.all_graphs.values() if graph.role == role), None)

    def graph(self, role: str) -> GraphSpec:
        """The graph of a role.

        Raises:
            BundleError: the bundle has none.
        """
        found = self.find(role)
        if found is None:
            roles = ", ".join(graph.role for graph in self.all_graphs.values())
            raise BundleError(
                f"this bundle has no graph of role {role!r}, only {roles}; export a model that has one",
                code="bundle-role-missing",
            )
        return found

    @property
    def image_tower(self) -> GraphSpec:
        return self.graph(IMAGE_TOWER)

    @property
    def query_head(self) -> GraphSpec:
        return self.graph(QUERY_HEAD)

    @property
    def text_tower(self) -> GraphSpec:
        return self.graph(TEXT_TOWER)

    @property
    def pair_scorer(self) -> GraphSpec | None:
        """None where pairs cannot be re-ranked."""
        return self.find(PAIR_SCORER)

    def to_dict(self) -> dict[str, Any]:
        values = {
            "schema_version": SCHEMA_VERSION,
            "family": self.family,
            "architecture": self.architecture,
            "checkpoint": {key: value for key, value in asdict(self.checkpoint).items() if value is not None},
            "precision": self.precision,
            "graphs": {name: graph.to_dict() for name, graph in self.all_graphs.items()},
            "patches": list(self.patches),
            "patch_size": self.patch_size,
            "prefix_tokens": self.prefix_tokens,
            "preprocessing": self.preprocessing.to_dict(),
            "tokenizer": asdict(self.tokenizer),
            "perturbation": self.perturbation.to_dict(),
            "scores": self.scores.to_dict(),
        }
        rest = ["samples", "tools", "command", "created", "notes"]
        rest += ["quantization", "calibration", "verification", "files"]
        return values | {key: getattr(self, key) for key in rest}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Manifest:
        """Raises BundleError, InputError, KeyError, TypeError or ValueError where `values` is no manifest."""
        schema = check_schema_version(values.get("schema_version"))
        if schema == 1:
            values = upgrade_schema_1(values)
        check_against(MANIFEST, values)
        rows, columns = values["patches"]
        graphs = {name: GraphSpec.from_dict(name, graph) for name, graph in values["graphs"].items()}
        manifest = cls(
            family=values["family"],
            architecture=values["architecture"],
            checkpoint=CheckpointRecord(**values["checkpoint"]),
            precision=values["precision"],
            graphs={name: graph for name, graph in graphs.items() if graph.role not in HOST_ROLES},
            host_graphs={name: graph for name, graph in graphs.items() if graph.role in HOST_ROLES},
            patches=(int(rows), int(columns)),
            patch_size=int(values["patch_size"]),
            prefix_tokens=int(values["prefix_tokens"]),
            preprocessing=ImagePreprocessing.from_dict(values["preprocessing"]),
            tokenizer=TokenizerSpec(**values["tokenizer"]),
            perturbation=Perturbation.from_dict(values["perturbation"]),
            scores=ScoreRules.from_dict(values["scores"]),
            samples=values["samples"],
            tools=dict(values["tools"]),
            command=values["command"],
            created=values["created"],
            files=dict(values["files"]),
            notes=tuple(values["notes"]),
            verification=values["verification"],
            quantization=values.get("quantization"),
            calibration=values.get("calibration"),
            schema_read=schema,
        )
        manifest.check_roles()
        return manifest

    def check_roles(self) -> None:
        """Raises BundleError where a required role is missing, or the graphs and the patches disagree."""
        roles = [graph.role for graph in self.all_graphs.values()]
        missing = [role.name for role in ROLES.values() if role.required and role.name not in roles]
        twice = sorted({role for role in roles if role in ROLES and roles.count(role) > 1})
        if missing or twice:
            raise BundleError(
                f"the manifest describes {'no graph' if missing else 'two graphs'} of role "
                f"{', '.join(missing or twice)}; expected one of each of image_tower, query_head and text_tower: "
                "export the bundle again",
                code="bundle-roles",
            )
        if (self.pair_scorer is None) != (self.scores.second is None):
            raise BundleError(
                f"the manifest's second score is {self.scores.second!r}, and it has "
                f"{'no' if self.pair_scorer is None else 'a'} pair scorer; export the bundle again",
                code="bundle-scores",
            )
        tokens = self.image_tower.output(IMAGE_TOKENS).shape[1]
        if tokens != self.token_grid.tokens:
            raise BundleError(
                f"graph {self.image_tower.name!r} gives {tokens} image tokens, the manifest's patches are "
                f"{self.token_grid.tokens}; export the bundle again",
                code="bundle-patches",
            )


def check_schema_version(version: object) -> int:
    """The version. Raises BundleError for one that this qpert does not read."""
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise BundleError(
            f"the manifest's schema_version is {version!r}, expected a number from 1 on; this is not a qpert bundle",
            code="bundle-schema",
        )
    if version > SCHEMA_VERSION:
        raise BundleError(
            f"the bundle has schema version {version}, this qpert reads up to {SCHEMA_VERSION}; "
            "upgrade qpert, or export the bundle again with this version",
            code="bundle-schema-newer",
        )
    return version


def manifest_values(folder: Path) -> dict[str, Any]:
    """The object in `folder/manifest.json`, of whatever kind of bundle.

    Raises:
        BundleError: there is none, or it is no JSON object.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise BundleError(
            f"{folder} holds no {MANIFEST_NAME}; expected a folder that `qpert export` made", code="manifest-missing"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise BundleError(
            f"{path} cannot be read as JSON ({error}); restore it or export the bundle again",
            code="manifest-unreadable",
        ) from error
    if not isinstance(values, dict):
        raise BundleError(
            f"{path} holds a {type(values).__name__}, expected an object; export the bundle again", code="manifest-type"
        )
    return values


def is_detector(values: dict[str, Any]) -> bool:
    """Whether a manifest is a detector's (`qpert.runtime.detection.bundle`)."""
    return values.get("kind") == DETECTOR


def read_manifest(folder: Path) -> Manifest:
    """Read and check `folder/manifest.json`, every path in it included.

    Raises:
        BundleError: there is none, it is not JSON, not a manifest, of a newer schema, or a path leaves the folder.
    """
    path, values = folder / MANIFEST_NAME, manifest_values(folder)
    if is_detector(values):
        raise BundleError(
            f"{folder} is a detector, which finds boxes and cannot search; expected a bundle such as `qpert export "
            "blip2` makes. Pass a detector to `qpert detect`, or as --detector",
            code="bundle-is-detector",
        )
    try:
        manifest = Manifest.from_dict(values)
        used = (manifest.samples, manifest.tokenizer.file, *(graph.file for graph in manifest.all_graphs.values()))
        for name in (*manifest.files, *used):
            bundle_path(folder, name)
    except BundleError:
        raise
    except (InputError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise BundleError(
            f"{path} is not a qpert manifest ({error!r}); export the bundle again", code="manifest-fields"
        ) from error
    if unhashed := [name for name in used if name not in manifest.files]:
        raise BundleError(
            f"{path} gives no hash for {', '.join(unhashed)}; do not trust this bundle, export it again",
            code="manifest-unhashed",
        )
    return manifest
