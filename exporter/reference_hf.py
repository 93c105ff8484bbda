"""Stock Hugging Face `Blip2ForImageTextRetrieval` as a reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from qpert.exporter.stock import Pairs, StockReference
from qpert.runtime.errors import CheckpointError, UnavailableError


class HuggingFaceReference(StockReference):
    """The parts of the stock model, put together as its own `forward` does (transformers `modeling_blip_2.py`)."""

    name = "hf"

    @classmethod
    def open(
        cls,
        folder_or_id: str | Path,
        *,
        threshold: float = 0.95,
        preserve_norm: bool = False,
        stages: str = "itc",
    ) -> HuggingFaceReference:
        """Load a folder or a hub id in float32 on the CPU, with attention written out.

        Raises:
            UnavailableError: transformers is not installed.
            CheckpointError: nothing is there, it is another kind of model, or tensors are missing, left over or of
                another shape (transformers itself only warns).
        """
        model = _load(str(folder_or_id))
        heads = model.config.qformer_config.num_attention_heads
        return cls(model, heads=heads, threshold=threshold, preserve_norm=preserve_norm, stages=stages)

    def image_embeds(self, pixel_values: Tensor) -> Tensor:
        other_size = pixel_values.shape[-1] != self.model.config.vision_config.image_size
        output = self.model.vision_model(pixel_values, interpolate_pos_encoding=other_size)
        return cast(Tensor, output.last_hidden_state)

    def query_embeds(self, image_embeds: Tensor) -> Tensor:
        hidden = self.model.qformer(
            query_embeds=self.model.query_tokens.expand(len(image_embeds), -1, -1),
            encoder_hidden_states=image_embeds,
            encoder_attention_mask=torch.ones(image_embeds.shape[:-1], dtype=torch.long),
        ).last_hidden_state
        return F.normalize(self.model.vision_projection(hidden), dim=-1)

    def text_embeds(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.model.qformer(
            query_embeds=self.model.embeddings(input_ids=input_ids), query_length=0, attention_mask=attention_mask
        ).last_hidden_state
        return F.normalize(self.model.text_projection(hidden[:, 0]), dim=-1)

    def match_scores(self, image_embeds: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        queries = self.model.query_tokens.expand(len(image_embeds), -1, -1)
        hidden = self.model.qformer(
            query_embeds=self.model.embeddings(input_ids=input_ids, query_embeds=queries),
            query_length=queries.shape[1],
            attention_mask=torch.cat([attention_mask.new_ones(queries.shape[:-1]), attention_mask], dim=1),
            encoder_hidden_states=image_embeds,
            encoder_attention_mask=torch.ones(image_embeds.shape[:-1], dtype=torch.long),
        ).last_hidden_state
        logits: Tensor = self.model.itm_head(hidden[:, : queries.shape[1]])  # [P,Q,2]
        return logits.mean(dim=1)[:, 1]

    def cross_attention_pairs(self) -> Pairs:
        layers = [layer for layer in self.model.qformer.encoder.layer if layer.has_cross_attention]
        blocks = [layer.crossattention.attention for layer in layers]
        return [(block.query, block.key) for block in blocks]


def _load(folder_or_id: str) -> Any:
    """The stock model, float32, with every one of its tensors from the checkpoint and none left over."""
    try:
        from transformers import Blip2Config, Blip2ForImageTextRetrieval
    except ImportError as error:
        raise UnavailableError(
            f"the Hugging Face reference needs transformers ({error}): pip install 'qpert[hf]'"
        ) from error
    try:
        config = Blip2Config.from_pretrained(folder_or_id)
        if config.model_type != "blip-2":
            raise CheckpointError(f"{folder_or_id} is a {config.model_type!r} model, expected 'blip-2'")
        # Files on the hub mark placeholder tokens for the image; here queries and text come apart.
        config.image_token_index = None
        config.qformer_config.use_qformer_text_input = True
        model, report = Blip2ForImageTextRetrieval.from_pretrained(
            folder_or_id,
            config=config,
            dtype=torch.float32,
            attn_implementation="eager",
            ignore_mismatched_sizes=True,  # so that they are reported below, with the rest
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{folder_or_id} cannot be loaded as Blip2ForImageTextRetrieval: {error}") from error
    _check_report(folder_or_id, report)
    return model


def _check_report(source: str, report: dict[str, Any]) -> None:
    """Raise if transformers reports a tensor that it made up, dropped or could not fit."""
    kinds = {kind: sorted(map(str, report.get(kind) or ())) for kind in ("missing_keys", "unexpected_keys")}
    kinds["mismatched_keys"] = sorted(str(item[0]) for item in report.get("mismatched_keys") or ())
    kinds["unexpected_keys"] = [name for name in kinds["unexpected_keys"] if not name.endswith("position_ids")]
    if any(kinds.values()):
        found = "; ".join(
            f"{len(names)} {kind.removesuffix('_keys')} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"
            for kind, names in kinds.items()
            if names
        )
        raise CheckpointError(
            f"{source} does not hold the tensors of Blip2ForImageTextRetrieval: {found}. "
            "Expected a retrieval checkpoint, Salesforce/blip2-itm-vit-g for instance"
        )
