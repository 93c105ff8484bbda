"""CoCa as a model family. Importing this module does not load torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

import click

from qpert.exporter.families.base import FamilyCard, FamilyOption
from qpert.exporter.hub.two_towers import HUB_URL, TwoTowers
from qpert.runtime.bundle import roles
from qpert.runtime.bundle.manifest import Manifest
from qpert.runtime.errors import InputError
from qpert.runtime.inputs.perturbation import Perturbation

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor, nn

    from qpert.exporter.checkpoints.checkpoint import Checkpoint, Progress
    from qpert.exporter.hub.tokenizer_files import HubTokenizer
    from qpert.exporter.references.protocol import Reference
    from qpert.graphs.perturbation.choices import GraphPerturbation, QueryMap
    from qpert.runtime.progress import Progress as Terminal

PUBLISHED = ("coca_ViT-L-14", "coca_ViT-B-32")
ALPHA = 0.2
"""The smallest value of the paper's grid for CoCa (0.2 to 1.0, section 5.1). Which one it chose is not published; use
`qpert calibrate`."""
OPTIONS = (
    FamilyOption("model_config", str, "open_clip's JSON file of the model, or a published name [default: beside it]"),
    FamilyOption(
        "resize",
        click.Choice(["shortest", "squash"]),
        "shortest side and centre crop, or the whole picture squashed [default: the checkpoint's, usually shortest]",
    ),
)


class CocaFamily(TwoTowers):
    """open_clip `CoCa`, without its caption decoder."""

    card = FamilyCard(
        name="coca",
        title="CoCa of open_clip (ITC only)",
        checkpoints=f"{', '.join(PUBLISHED)}, an open_clip file or folder, or a hub id",
        published=PUBLISHED,
        stages=("itc", "none"),
        perturbation={"alpha": ALPHA},
        options=OPTIONS,
        note="Boxes perturb the query of the attentional pooler, as in the paper. Checkpoints called mscoco_finetuned "
        "are not for retrieval. There is no pair scorer: search ranks by ITC only.",
    )

    @property
    def prefix_tokens(self) -> int:
        """CLS."""
        return 1

    def open(
        self, source: str, *, image_size: int | None, options: Mapping[str, Any], progress: Progress
    ) -> Checkpoint:
        from qpert.exporter.families.coca.checkpoint import CocaOptions, open_checkpoint

        return open_checkpoint(source, image_size=image_size, options=CocaOptions(**options), progress=progress)

    def reopening(self, manifest: Manifest, checkpoint: str | None) -> tuple[str, dict[str, Any]]:
        from qpert.graphs.families.coca.config import CocaConfig

        config = CocaConfig.from_dict(manifest.architecture)
        options: dict[str, Any] = {"model_config": config, "resize": config.resize}
        return checkpoint or manifest.checkpoint.source.removeprefix(HUB_URL), options

    def text_shape(self, config: Any) -> tuple[int | str, ...]:
        return "T", "L"

    def stock_tokenizer(self, checkpoint: Checkpoint) -> HubTokenizer:
        from qpert.exporter.families.coca.tokenizer import build_tokenizer

        return build_tokenizer(checkpoint.config, check=False)  # `--tokenizer` may name another vocabulary

    def tokenizer(self, checkpoint: Checkpoint, asked: str | None, progress: Terminal) -> Tokenizer:
        from qpert.exporter.families.coca.tokenizer import OMITTED, build_tokenizer

        progress.say(OMITTED)
        return build_tokenizer(checkpoint.config, asked).backend

    def flops(self, config: Any, role: str) -> dict[str, int]:
        from qpert.exporter.hub.flops import text_flops, vision_flops

        if role == roles.IMAGE_TOWER:
            return vision_flops(config.vision, config.tokens)
        if role == roles.TEXT_TOWER:
            return text_flops(config.text, config.embed_dim)
        width = config.embed_dim
        keys_and_values = 2 * config.tokens * config.vision.width * 2 * width
        return {"B": keys_and_values + 2 * 2 * config.tokens * width + 2 * 2 * width * width}

    def network(
        self, config: Any, perturbation: GraphPerturbation | None, query_map: QueryMap | None = None
    ) -> nn.Module:
        from qpert.graphs.families.coca.model import CocaRetrieval
        from qpert.graphs.perturbation.oracle import query_map as oracle

        return CocaRetrieval(config, perturbation, query_map=query_map or oracle)

    def stages(self, network: nn.Module) -> Mapping[str, nn.Module]:
        from qpert.graphs.families.coca.model import STAGES

        return {name: stage(network) for name, stage in STAGES.items()}

    def keys(self, network: nn.Module, image_tokens: Tensor) -> Tensor:
        from qpert.graphs.families.coca.model import CocaRetrieval

        assert isinstance(network, CocaRetrieval)
        return network.keys(image_tokens)

    @contextmanager
    def upstream(self, kind: str, checkpoint: Checkpoint, settings: Perturbation) -> Iterator[Reference]:
        from qpert.exporter.families.coca.checkpoint import OpenClipCheckpoint
        from qpert.exporter.families.coca.reference_open_clip import CHOICES, OpenClipReference

        if kind != "open_clip":
            raise InputError(f"CoCa has no reference {kind!r}, expected torch or open_clip", code="reference-unknown")
        assert isinstance(checkpoint, OpenClipCheckpoint)
        choices = {name: getattr(settings, name) for name in CHOICES}
        size = checkpoint.preprocessing.size
        file, model, preprocess = checkpoint.tensors.store.files[0], checkpoint.model, checkpoint.preprocess
        with closing(OpenClipReference.open(file, model, preprocess, image_size=size, **choices)) as reference:
            yield reference


FAMILY = CocaFamily()
