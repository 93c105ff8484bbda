"""CLIP as a model family. Importing this module does not load torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpert.exporter.families.base import FamilyCard
from qpert.exporter.hub.two_towers import TwoTowers
from qpert.runtime.bundle import roles
from qpert.runtime.errors import InputError
from qpert.runtime.inputs.perturbation import Perturbation

if TYPE_CHECKING:
    from torch import Tensor, nn

    from qpert.exporter.checkpoints.checkpoint import Checkpoint, Progress
    from qpert.exporter.hub.opening import FolderFormat
    from qpert.exporter.hub.tokenizer_files import HubTokenizer
    from qpert.exporter.references.protocol import Reference
    from qpert.graphs.perturbation.choices import GraphPerturbation, QueryMap

EXPECTED = "a Hugging Face folder, or a hub id (openai/clip-vit-base-patch32)"


class ClipFamily(TwoTowers):
    """Hugging Face `CLIPModel`."""

    card = FamilyCard(
        name="clip",
        title="CLIP (ITC only, no boxes)",
        checkpoints=EXPECTED,
        stages=("none",),
        note="CLIP pools the image at its class token and has no cross-attention, so it takes no boxes. It also has no "
        "pair scorer: search ranks by ITC only.",
    )

    def folder_format(self) -> FolderFormat:
        from qpert.exporter.families.clip import hub_config
        from qpert.exporter.hub.opening import FolderFormat

        return FolderFormat(
            EXPECTED,
            hub_config.read_config,
            hub_config.expected_shapes,
            hub_config.UNUSED,
            hub_config.POSITIONS,
            hub_config.PREFIX_TOKENS,
            "CLIPImageProcessor",
        )

    def open(
        self, source: str, *, image_size: int | None, options: Mapping[str, Any], progress: Progress
    ) -> Checkpoint:
        from qpert.exporter.families.clip.open_clip_files import refuse_open_clip

        refuse_open_clip(source)
        return super().open(source, image_size=image_size, options=options, progress=progress)

    def build_tokenizer(self, folder: Path, config: Any) -> HubTokenizer:
        from qpert.exporter.families.clip.tokenizer import build_tokenizer

        return build_tokenizer(folder, config)

    def text_shape(self, config: Any) -> tuple[int | str, ...]:
        return "T", "L"

    def flops(self, config: Any, role: str) -> dict[str, int]:
        from qpert.exporter.hub.flops import text_flops, vision_flops

        if role == roles.IMAGE_TOWER:
            return vision_flops(config.vision, config.tokens)
        if role == roles.TEXT_TOWER:
            return text_flops(config.text, config.embed_dim)
        return {"B": 2 * config.vision.width * config.embed_dim}

    def network(
        self, config: Any, perturbation: GraphPerturbation | None, query_map: QueryMap | None = None
    ) -> nn.Module:
        from qpert.graphs.families.clip.model import ClipRetrieval

        return ClipRetrieval(config)

    def stages(self, network: nn.Module) -> Mapping[str, nn.Module]:
        from qpert.graphs.families.clip.model import STAGES

        return {name: stage(network) for name, stage in STAGES.items()}

    def keys(self, network: nn.Module, image_tokens: Tensor) -> Tensor:
        raise ValueError("CLIP has no cross-attention whose keys boxes could select")

    @contextmanager
    def upstream(self, kind: str, checkpoint: Checkpoint, settings: Perturbation) -> Iterator[Reference]:
        from qpert.exporter.families.clip.reference_huggingface import HuggingFaceReference
        from qpert.exporter.hub.stock_inputs import stock_pixels

        if kind != "hf":
            raise InputError(f"CLIP has no reference {kind!r}, expected torch or hf", code="reference-unknown")
        assert checkpoint.folder is not None  # only folders are opened
        reference = HuggingFaceReference.open(checkpoint.folder, prefix=checkpoint.tensors.store.prefix)
        reference.pixels = stock_pixels(checkpoint.folder, checkpoint.preprocessing.size, "CLIPImageProcessor")
        yield reference


FAMILY = ClipFamily()
