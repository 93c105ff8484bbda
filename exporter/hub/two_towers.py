"""The common base of CLIP, SigLIP and CoCa: two towers that meet in one dot product, and no pair scorer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpert.exporter.families.base import FamilyCard, Host
from qpert.exporter.families.declare import FEATURE_DTYPES, Limits, box_tensors, graph, tensor
from qpert.runtime.bundle import roles
from qpert.runtime.bundle.graph_spec import GraphSpec
from qpert.runtime.bundle.manifest import Manifest
from qpert.runtime.bundle.score_rules import ScoreRules
from qpert.runtime.errors import InputError
from qpert.runtime.inputs.text import TokenizerSpec

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from qpert.exporter.checkpoints.checkpoint import Checkpoint, Progress
    from qpert.exporter.hub.opening import FolderFormat
    from qpert.exporter.hub.tokenizer_files import HubTokenizer
    from qpert.runtime.progress import Progress as Terminal

HUB_URL = "https://huggingface.co/"
KINDS = {"clip-bpe": "bpe", "gemma-bpe": "bpe", "siglip-sentencepiece": "sentencepiece"}


class TwoTowers:
    """A family of Hugging Face folders; a subclass supplies the network and how the folder is read.

    A family of other files replaces `open`, `reopening`, `stock_tokenizer`, `tokenizer` and `prefix_tokens` instead.
    """

    card: FamilyCard

    # What a subclass provides.

    def folder_format(self) -> FolderFormat:
        raise NotImplementedError

    def build_tokenizer(self, folder: Path, config: Any) -> HubTokenizer:
        raise NotImplementedError

    def stock_tokenizer(self, checkpoint: Checkpoint) -> HubTokenizer:
        """The tokenizer of the checkpoint's folder."""
        assert checkpoint.folder is not None  # folders alone are opened
        return self.build_tokenizer(checkpoint.folder, checkpoint.config)

    @property
    def prefix_tokens(self) -> int:
        """Image tokens before the patches."""
        return self.folder_format().prefix_tokens

    def text_shape(self, config: Any) -> tuple[int | str, ...]:
        """Shape of `input_ids`: [T, L], or [T, length] if all texts have the same length."""
        raise NotImplementedError

    def flops(self, config: Any, role: str) -> dict[str, int]:
        raise NotImplementedError

    # The family.

    def open(
        self, source: str, *, image_size: int | None, options: Mapping[str, Any], progress: Progress
    ) -> Checkpoint:
        from qpert.exporter.hub.opening import open_checkpoint

        return open_checkpoint(source, self.folder_format(), image_size=image_size, progress=progress)

    def reopening(self, manifest: Manifest, checkpoint: str | None) -> tuple[str, dict[str, Any]]:
        return checkpoint or manifest.checkpoint.source.removeprefix(HUB_URL), {}

    def graphs(self, config: Any, *, precision: str, stages: str, limits: Limits) -> dict[str, GraphSpec]:
        vision, positions = config.vision, config.text.max_positions
        tokens = tensor(roles.IMAGE_TOKENS, FEATURE_DTYPES[precision], "B", config.tokens, vision.width)
        boxes = box_tensors("B", config.tokens) if stages == "itc" else ()
        ranges = limits.ranges(limits.text_length(positions, positions), shortest=3)
        pixels = tensor(roles.PIXELS, "float32", "B", 3, vision.image_size, vision.image_size)
        vectors = tensor(roles.IMAGE_VECTORS, "float32", "B", 1, config.embed_dim)
        texts = tensor(roles.TEXT_VECTORS, "float32", "T", config.embed_dim)
        ids = tensor(roles.TOKEN_IDS, "int64", *self.text_shape(config))
        declared = (
            graph(roles.IMAGE_TOWER, [pixels], tokens, ranges, self.flops(config, roles.IMAGE_TOWER)),
            graph(
                roles.QUERY_HEAD,
                [replace(tokens, shared=bool(boxes)), *boxes],
                vectors,
                ranges,
                self.flops(config, roles.QUERY_HEAD),
            ),
            graph(roles.TEXT_TOWER, [ids], texts, ranges, self.flops(config, roles.TEXT_TOWER)),
        )
        return {spec.name: spec for spec in declared}

    def host(self, checkpoint: Checkpoint, limits: Limits) -> Host:
        config, stock = checkpoint.config, self.stock_tokenizer(checkpoint)
        length = stock.max_length
        if limits.length is not None:
            length = limits.text_length(length, length)
            self._check_length(length, stock)
        return Host(
            patches=(config.vision.grid, config.vision.grid),
            patch_size=config.vision.patch_size,
            prefix_tokens=self.prefix_tokens,
            tokenizer=TokenizerSpec(
                file="tokenizer.json",
                max_length=length,
                vocab_size=config.text.vocab_size,
                kind=KINDS[stock.kind],
                clean="tokenizer",
                pad=stock.pad_to,
                pad_id=stock.pad_id,
                pad_side=stock.pad_side,
            ),
            scores=ScoreRules("max_cosine", None, "first"),
        )

    def _check_length(self, length: int, stock: HubTokenizer) -> None:
        if stock.pad_to == "max_length" and length != stock.max_length:
            raise InputError(
                f"--max-length is {length}; {self.card.name} pads every text to {stock.max_length} tokens, as in "
                "training: leave the option out",
                code="export-limit",
            )

    def tokenizer(self, checkpoint: Checkpoint, asked: str | None, progress: Terminal) -> Tokenizer:
        folder = checkpoint.folder if asked is None else Path(asked)
        if folder is None or not folder.is_dir():
            raise InputError(
                f"--tokenizer is {asked}; {self.card.name} needs a folder with the tokenizer's files",
                code="tokenizer-not-folder",
            )
        backend = self.build_tokenizer(folder, checkpoint.config).backend
        backend.no_truncation()
        backend.no_padding()
        return backend
