"""What a model family must supply. One object a family; nothing outside its folders may name it.

A family is a folder in `graphs/families` (its network), a folder in `exporter/families` (checkpoints, graphs and
references around it), and a row in the table of `qpert.exporter.families`, or an entry point in `qpert.families`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
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
    """An option of `qpert export FAMILY` that only this family has. `name`: of the flag, with underscores."""

    name: str
    type: Any
    help: str

    @property
    def flag(self) -> str:
        return f"--{self.name.replace('_', '-')}"


@dataclass(frozen=True)
class Host:
    """What the runtime does around the graphs; it goes into the manifest. `patches`: rows and columns."""

    patches: tuple[int, int]
    patch_size: int
    prefix_tokens: int
    tokenizer: TokenizerSpec
    scores: ScoreRules


@dataclass(frozen=True)
class FamilyCard:
    """What is known of a family without opening anything: what the command line shows.

    `published`: names for --checkpoint. `default_checkpoint`: what is exported where none is given, None if one must
    be. `stages`: what --perturb may be, the default first. `perturbation`: defaults that differ from the paper's for
    BLIP-2. `note`: what a user of boxes should know. `weight_files`: role → data file, where graphs share weights.
    """

    name: str
    title: str
    checkpoints: str
    published: tuple[str, ...] = ()
    default_checkpoint: str | None = None
    stages: tuple[str, ...] = ("none",)
    perturbation: Mapping[str, Any] = field(default_factory=dict)
    options: tuple[FamilyOption, ...] = ()
    note: str = ""
    weight_files: Mapping[str, str] = field(default_factory=dict)

    def weight_file(self, graph: GraphSpec) -> str:
        """The data file that a graph's weights go to. A text-only deployment needs no file of the image tower."""
        return self.weight_files.get(graph.role, f"{graph.name}.data")


class Family(Protocol):
    """See the module. Importing one must not import torch: its methods do."""

    @property
    def card(self) -> FamilyCard: ...

    def open(
        self, source: str, *, image_size: int | None, options: Mapping[str, Any], progress: Progress
    ) -> Checkpoint:
        """Open what `--checkpoint` names.

        Args:
            source: a published name, a file, a folder or a hub id.
            image_size: side in pixels to export for; None keeps the checkpoint's.
            options: values of the family's own options by name; absent or None where the user gave none.
            progress: hears of downloads and hashing.

        Raises:
            CheckpointError, InputError, UnavailableError: it cannot be opened as this family.
        """
        ...

    def reopening(self, manifest: Manifest, checkpoint: str | None) -> tuple[str, dict[str, Any]]:
        """What to open, and with which options, to have the exported network again.

        `checkpoint`: where the weights are now; None takes what the manifest says.
        """
        ...

    def graphs(self, config: Any, *, precision: str, stages: str, limits: Limits) -> dict[str, GraphSpec]:
        """The graphs by name, in the order in which they run. Raises InputError for limits they cannot have."""
        ...

    def host(self, checkpoint: Checkpoint, limits: Limits) -> Host:
        """What the runtime does around the graphs."""
        ...

    def tokenizer(self, checkpoint: Checkpoint, asked: str | None, progress: Terminal) -> Tokenizer:
        """The bundle's tokenizer, from what `--tokenizer` names or from beside the checkpoint."""
        ...

    def network(
        self, config: Any, perturbation: GraphPerturbation | None, query_map: QueryMap | None = None
    ) -> nn.Module:
        """The network in eager PyTorch. `query_map` None is the float64 oracle: the network is a reference then."""
        ...

    def stages(self, network: nn.Module) -> Mapping[str, nn.Module]:
        """Graph name → module to trace, its inputs named as the graph's; also what the PyTorch reference runs."""
        ...

    def keys(self, network: nn.Module, image_tokens: Tensor) -> Tensor:
        """Keys [B, A, H, N, d] of the A perturbable cross-attentions. Raises ValueError where there are none."""
        ...

    def upstream(self, kind: str, checkpoint: Checkpoint, settings: Perturbation) -> AbstractContextManager[Reference]:
        """The third-party implementation called `kind` over the same weights.

        Raises:
            InputError: the family has none of that name. UnavailableError: it is not installed here.
        """
        ...
