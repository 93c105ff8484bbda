"""The interface of a model family. Each family is one object; nothing outside its folders may name it.

A family has a folder in `graphs/families` (its network), a folder in `exporter/families` (its checkpoints, graphs and
references), and a row in the table of `qpert.exporter.families` or an entry point in the group `qpert.families`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from qpert.runtime.bundle.graph_spec import GraphSpec
from qpert.runtime.bundle.manifest import Manifest
from qpert.runtime.bundle.score_rules import ScoreRules
from qpert.runtime.inputs.perturbation import Perturbation
from qpert.runtime.inputs.text import TokenizerSpec

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from tokenizers import Tokenizer
    from torch import Tensor, nn

    from qpert.exporter.checkpoints.checkpoint import Checkpoint, Progress
    from qpert.exporter.families.declare import Limits
    from qpert.exporter.references.protocol import Reference
    from qpert.graphs.perturbation.choices import GraphPerturbation, QueryMap
    from qpert.runtime.progress import Progress as Terminal


@dataclass(frozen=True)
class FamilyOption:
    """An option of `qpert export FAMILY` that only this family has. `name` is the flag's, with underscores."""

    name: str
    type: Any
    help: str

    @property
    def flag(self) -> str:
        return f"--{self.name.replace('_', '-')}"


@dataclass(frozen=True)
class CalibratedSettings:
    """How boxes act, and the record of the search that chose it (the manifest's `calibration`), if one did."""

    perturbation: Perturbation
    calibration: dict[str, Any] | None = None

    @classmethod
    def read(cls, file: Path) -> CalibratedSettings:
        """A file that ships with a checkpoint: `{"perturbation": …, "calibration": …}` of a calibrated bundle."""
        values = json.loads(file.read_text(encoding="utf-8"))
        return cls(Perturbation.from_dict(values["perturbation"]), values["calibration"])


@dataclass(frozen=True)
class Host:
    """What the runtime does around the graphs, for the manifest. `patches`: rows and columns."""

    patches: tuple[int, int]
    patch_size: int
    prefix_tokens: int
    tokenizer: TokenizerSpec
    scores: ScoreRules


@dataclass(frozen=True)
class FamilyCard:
    """What is known about a family before a checkpoint is opened; the command line shows it.

    `published`: names for --checkpoint. `default_checkpoint`: exported if none is given; None makes the option
    required. `stages`: values of --perturb, the default first. `perturbation`: defaults that differ from the paper's
    for BLIP-2. `calibrated`: published name → JSON file with that checkpoint's calibrated settings, see
    `CalibratedSettings`. `note`: what a user of boxes should know. `weight_files`: role → data file, for graphs that
    share one.
    """

    name: str
    title: str
    checkpoints: str
    published: tuple[str, ...] = ()
    default_checkpoint: str | None = None
    stages: tuple[str, ...] = ("none",)
    perturbation: Mapping[str, Any] = field(default_factory=dict)
    calibrated: Mapping[str, Path] = field(default_factory=dict)
    options: tuple[FamilyOption, ...] = ()
    note: str = ""
    weight_files: Mapping[str, str] = field(default_factory=dict)

    def weight_file(self, graph: GraphSpec) -> str:
        """The data file of a graph's weights. A text-only deployment does not need the image tower's."""
        return self.weight_files.get(graph.role, f"{graph.name}.data")


class Family(Protocol):
    """See the module docstring. Importing a family must not import torch; its methods import it."""

    @property
    def card(self) -> FamilyCard: ...

    def open(
        self, source: str, *, image_size: int | None, options: Mapping[str, Any], progress: Progress
    ) -> Checkpoint:
        """Open what `--checkpoint` names.

        Args:
            source: a published name, a file, a folder or a hub id.
            image_size: side in pixels to export for; None keeps the checkpoint's.
            options: the family's own options by name; absent or None if the user gave no value.
            progress: called during downloads and hashing.

        Raises:
            CheckpointError, InputError, UnavailableError: the checkpoint cannot be opened as this family.
        """
        ...

    def reopening(self, manifest: Manifest, checkpoint: str | None) -> tuple[str, dict[str, Any]]:
        """The source and options that reopen the exported network.

        `checkpoint`: where the weights are now; None uses the manifest's source.
        """
        ...

    def graphs(self, config: Any, *, precision: str, stages: str, limits: Limits) -> dict[str, GraphSpec]:
        """The graphs by name, in the order in which they run. Raises InputError for limits that they do not support."""
        ...

    def host(self, checkpoint: Checkpoint, limits: Limits) -> Host:
        """What the runtime does around the graphs."""
        ...

    def tokenizer(self, checkpoint: Checkpoint, asked: str | None, progress: Terminal) -> Tokenizer:
        """The bundle's tokenizer, from `--tokenizer` or from the checkpoint's folder."""
        ...

    def network(
        self, config: Any, perturbation: GraphPerturbation | None, query_map: QueryMap | None = None
    ) -> nn.Module:
        """The network in eager PyTorch. With `query_map` None it uses the float64 oracle and serves as a reference."""
        ...

    def stages(self, network: nn.Module) -> Mapping[str, nn.Module]:
        """Graph name → module to trace, with the graph's input names. The PyTorch reference runs the same modules."""
        ...

    def keys(self, network: nn.Module, image_tokens: Tensor) -> Tensor:
        """Keys [B, A, H, N, d] of the A perturbable cross-attentions, from which subspaces are built: centred if the
        network's perturbation says so. Raises ValueError if there are none.
        """
        ...

    def upstream(self, kind: str, checkpoint: Checkpoint, settings: Perturbation) -> AbstractContextManager[Reference]:
        """The third-party implementation called `kind` over the same weights.

        Raises:
            InputError: the family has no such reference. UnavailableError: it is not installed.
        """
        ...
