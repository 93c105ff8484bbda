"""SigLIP as a model family. Importing this module does not load torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpert.exporter.families.base import FamilyCard, Host
from qpert.exporter.families.declare import Limits
from qpert.exporter.hub.two_towers import TwoTowers
from qpert.runtime.bundle import roles
from qpert.runtime.errors import CheckpointError, InputError
from qpert.runtime.inputs.perturbation import Perturbation

if TYPE_CHECKING:
    from torch import Tensor, nn

    from qpert.exporter.checkpoints.checkpoint import Checkpoint
    from qpert.exporter.hub.opening import FolderFormat
    from qpert.exporter.hub.tokenizer_files import HubTokenizer
    from qpert.exporter.references.protocol import Reference
    from qpert.graphs.perturbation.choices import GraphPerturbation, QueryMap

EXPECTED = "a Hugging Face folder, or a hub id (google/siglip-base-patch16-224)"
ALPHA = 0.2
"""The smallest value of the paper's grid for models that pool once (CoCa, InternVL-G: 0.2 to 1.0, section 5.1). It is
not calibrated for SigLIP; use `qpert calibrate`."""


class SiglipFamily(TwoTowers):
    """Hugging Face `SiglipModel`: SigLIP, and SigLIP 2 of fixed resolution."""

    card = FamilyCard(
        name="siglip",
        title="SigLIP and SigLIP 2 of fixed resolution (ITC only; boxes are an extension)",
        checkpoints=EXPECTED,
        stages=("itc", "none"),
        perturbation={"alpha": ALPHA},
        note="Boxes perturb the query of the pooling head. That is an extension of qpert: the paper does not test "
        "SigLIP, and no setting is published. There is no pair scorer: search ranks by ITC only.",
    )

    def folder_format(self) -> FolderFormat:
        from qpert.exporter.families.siglip import hub_config
        from qpert.exporter.hub.opening import FolderFormat

        return FolderFormat(
            EXPECTED,
            hub_config.read_config,
            hub_config.expected_shapes,
            hub_config.UNUSED,
            hub_config.POSITIONS,
            hub_config.PREFIX_TOKENS,
            "SiglipImageProcessor",
        )

    def build_tokenizer(self, folder: Path, config: Any) -> HubTokenizer:
        from qpert.exporter.families.siglip.tokenizer import build_tokenizer

        return build_tokenizer(folder, config)

    def text_shape(self, config: Any) -> tuple[int | str, ...]:
        return "T", config.text.max_positions

    def host(self, checkpoint: Checkpoint, limits: Limits) -> Host:
        """The text tower reads its last position, so texts are padded to all positions.

        Raises:
            CheckpointError: the tokenizer pads to another length.
        """
        host = super().host(checkpoint, limits)
        positions = checkpoint.config.text.max_positions
        if host.tokenizer.max_length != positions:
            raise CheckpointError(
                f"the tokenizer in {checkpoint.folder} pads texts to {host.tokenizer.max_length} tokens but the text "
                f"tower has {positions} positions; the two belong to different models, download the folder again",
                code="tokenizer-length",
            )
        return host

    def flops(self, config: Any, role: str) -> dict[str, int]:
        from qpert.exporter.hub.flops import text_flops, vision_flops

        vision, text = config.vision, config.text
        if role == roles.IMAGE_TOWER:
            return vision_flops(vision, config.tokens)
        if role == roles.TEXT_TOWER:
            return text_flops(text, config.embed_dim, text.max_positions)
        keys_and_values = 2 * config.tokens * vision.width * 2 * vision.width
        query = 2 * vision.width * 2 * vision.width + 2 * 2 * config.tokens * vision.width
        return {"B": keys_and_values + query + 2 * 2 * vision.width * vision.mlp_width}

    def network(
        self, config: Any, perturbation: GraphPerturbation | None, query_map: QueryMap | None = None
    ) -> nn.Module:
        from qpert.graphs.families.siglip.model import SiglipRetrieval
        from qpert.graphs.perturbation.oracle import query_map as oracle

        return SiglipRetrieval(config, perturbation, query_map=query_map or oracle)

    def stages(self, network: nn.Module) -> Mapping[str, nn.Module]:
        from qpert.graphs.families.siglip.model import STAGES

        return {name: stage(network) for name, stage in STAGES.items()}

    def keys(self, network: nn.Module, image_tokens: Tensor) -> Tensor:
        from qpert.graphs.families.siglip.model import SiglipRetrieval

        assert isinstance(network, SiglipRetrieval)
        return network.keys(image_tokens)

    @contextmanager
    def upstream(self, kind: str, checkpoint: Checkpoint, settings: Perturbation) -> Iterator[Reference]:
        from qpert.exporter.families.siglip.reference_huggingface import HuggingFaceReference
        from qpert.exporter.hub.stock_inputs import stock_pixels

        if kind != "hf":
            raise InputError(f"SigLIP has no reference {kind!r}, expected torch or hf", code="reference-unknown")
        assert checkpoint.folder is not None  # only folders are opened
        choices = {name: getattr(settings, name) for name in ("threshold", "preserve_norm", "centre_keys", "stages")}
        reference = HuggingFaceReference.open(checkpoint.folder, prefix=checkpoint.tensors.store.prefix, **choices)
        reference.pixels = stock_pixels(checkpoint.folder, checkpoint.preprocessing.size, "SiglipImageProcessor")
        yield reference


FAMILY = SiglipFamily()
