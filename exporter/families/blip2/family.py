"""BLIP-2 as a model family. Importing this module does not load torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpert.exporter import demo
from qpert.exporter.families.base import FamilyCard, FamilyOption, Host
from qpert.runtime.bundle.graph_spec import GraphSpec
from qpert.runtime.bundle.manifest import Manifest
from qpert.runtime.bundle.roles import PAIR_SCORER, QUERY_HEAD, TEXT_TOWER
from qpert.runtime.bundle.score_rules import ScoreRules
from qpert.runtime.errors import InputError
from qpert.runtime.inputs.perturbation import Perturbation
from qpert.runtime.inputs.text import TokenizerSpec

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor, nn

    from qpert.exporter.checkpoints.checkpoint import Checkpoint, Progress
    from qpert.exporter.families.declare import Limits
    from qpert.exporter.references.protocol import ClosableReference, Reference
    from qpert.graphs.perturbation.choices import GraphPerturbation, QueryMap
    from qpert.runtime.progress import Progress as Terminal

PUBLISHED = ("demo", "demo-small-objects", "coco", "pretrain", "pretrain_vitL")
HUB_URL = "https://huggingface.co/"
OPTIONS = (
    FamilyOption("vision_checkpoint", Path, "the vision tower's own .pth, if the checkpoint lacks it"),
    FamilyOption("vision_heads", int, "attention heads of the vision tower, if not stated elsewhere"),
    FamilyOption("vision_layers", int, "number of blocks used of --vision-checkpoint [default: the published model's]"),
    FamilyOption("vision_eps", float, "LayerNorm epsilon of the vision tower, if not stated elsewhere"),
    FamilyOption("ln_vision_eps", float, "LayerNorm epsilon of ln_vision, if not stated elsewhere"),
    FamilyOption("qformer_eps", float, "LayerNorm epsilon of the Q-Former, if not stated elsewhere"),
    FamilyOption("qformer_heads", int, "attention heads of the Q-Former, if not stated elsewhere"),
)


class Blip2Family:
    """LAVIS `Blip2Qformer`/`Blip2ITM` and Hugging Face `Blip2ForImageTextRetrieval`."""

    card = FamilyCard(
        name="blip2",
        title="BLIP-2 image-text retrieval (ITC and ITM)",
        checkpoints=f"{', '.join(PUBLISHED)}, a LAVIS .pth, a Hugging Face folder, or a hub id",
        published=PUBLISHED,
        default_checkpoint="demo",
        calibrated=demo.CALIBRATED,
        stages=("itc", "both", "none"),
        options=OPTIONS,
        weight_files=dict.fromkeys((QUERY_HEAD, TEXT_TOWER, PAIR_SCORER), "qformer.data"),
    )

    def open(
        self, source: str, *, image_size: int | None, options: Mapping[str, Any], progress: Progress
    ) -> Checkpoint:
        from qpert.exporter.families.blip2.architecture import ArchitectureOptions
        from qpert.exporter.families.blip2.checkpoint import open_checkpoint

        return open_checkpoint(source, image_size=image_size, options=ArchitectureOptions(**options), progress=progress)

    def reopening(self, manifest: Manifest, checkpoint: str | None) -> tuple[str, dict[str, Any]]:
        from qpert.graphs.families.blip2.config import Blip2Config

        architecture, record = Blip2Config.from_dict(manifest.architecture), manifest.checkpoint
        if checkpoint is None and record.name in self.card.published:
            return record.name, {}
        options: dict[str, Any] = {
            "vision_heads": architecture.vision.heads,
            "qformer_heads": architecture.qformer.heads,
            "vision_eps": architecture.vision.layer_norm_eps,
            "ln_vision_eps": architecture.ln_vision_eps,
            "qformer_eps": architecture.qformer.layer_norm_eps,
        }
        if vision := (record.parts or {}).get("vision"):
            options |= {"vision_checkpoint": Path(vision), "vision_layers": architecture.vision.layers}
        return checkpoint or record.source.removeprefix(HUB_URL), options

    def graphs(self, config: Any, *, precision: str, stages: str, limits: Limits) -> dict[str, GraphSpec]:
        from qpert.exporter.families.blip2.graph_specs import graph_specs

        return graph_specs(config, precision=precision, stages=stages, limits=limits)

    def host(self, checkpoint: Checkpoint, limits: Limits) -> Host:
        from qpert.exporter.families.blip2.graph_specs import MAX_LENGTH

        vision, qformer = checkpoint.config.vision, checkpoint.config.qformer
        length = limits.text_length(MAX_LENGTH, qformer.max_positions)
        return Host(
            patches=(vision.grid, vision.grid),
            patch_size=vision.patch_size,
            prefix_tokens=vision.tokens - vision.grid**2,
            tokenizer=TokenizerSpec("tokenizer.json", length, qformer.vocab_size, "wordpiece", "lavis", "longest", 0),
            scores=ScoreRules("max_cosine", "logit", "sum"),
        )

    def tokenizer(self, checkpoint: Checkpoint, asked: str | None, progress: Terminal) -> Tokenizer:
        from qpert.exporter.checkpoints.tokenizer_source import find_tokenizer
        from qpert.exporter.families.blip2.tokenizer import DEFAULT_TOKENIZER, build_tokenizer

        source = find_tokenizer(asked, checkpoint.tokenizer, DEFAULT_TOKENIZER, progress)
        rows = checkpoint.config.qformer.vocab_size
        return build_tokenizer(source, vocab_size=rows, own=source == checkpoint.tokenizer, say=progress.say)

    def network(
        self, config: Any, perturbation: GraphPerturbation | None, query_map: QueryMap | None = None
    ) -> nn.Module:
        from qpert.graphs.families.blip2.model import Blip2Retrieval
        from qpert.graphs.perturbation.oracle import query_map as oracle

        return Blip2Retrieval(config, perturbation, query_map=query_map or oracle)

    def stages(self, network: nn.Module) -> Mapping[str, nn.Module]:
        from qpert.graphs.families.blip2.model import STAGES

        return {name: stage(network) for name, stage in STAGES.items()}

    def keys(self, network: nn.Module, image_tokens: Tensor) -> Tensor:
        from qpert.graphs.families.blip2.model import Blip2Retrieval

        assert isinstance(network, Blip2Retrieval)
        keys, _ = network.Qformer.keys_and_values(image_tokens)
        return network.subspace_keys(keys)

    @contextmanager
    def upstream(self, kind: str, checkpoint: Checkpoint, settings: Perturbation) -> Iterator[Reference]:
        from qpert.exporter.families.blip2.upstream_references import open_huggingface, open_lavis

        openers: dict[str, Callable[[Checkpoint, Perturbation], ClosableReference]]
        openers = {"hf": open_huggingface, "lavis": open_lavis}
        if kind not in openers:
            raise InputError(
                f"BLIP-2 has no reference {kind!r}, expected one of {', '.join(openers)}", code="reference-unknown"
            )
        with closing(openers[kind](checkpoint, settings)) as reference:
            yield reference


FAMILY = Blip2Family()
