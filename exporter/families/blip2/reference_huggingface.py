"""Stock Hugging Face `Blip2ForImageTextRetrieval` as a reference."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from qpert.exporter.families.blip2.names import UNUSED, foreign_extras, is_unused, lavis_origins
from qpert.exporter.families.blip2.upstream import Pairs, UpstreamReference
from qpert.graphs.families.blip2.config import Blip2Config
from qpert.runtime.errors import CheckpointError, UnavailableError
from qpert.runtime.libraries import turn_off_telemetry


class LavisTensors(Protocol):
    """Parameters by LAVIS name."""

    def names(self) -> Iterable[str]: ...

    def get(self, name: str) -> Tensor: ...


class HuggingFaceReference(UpstreamReference):
    """The parts of the stock model, put together as its own `forward` does (transformers `modeling_blip_2.py`).

    `pixels` and `token_ids`: the stock image processor and tokenizer, if they are known (`stock_inputs`).
    """

    name = "hf"
    pixels: Callable[[Path], np.ndarray] | None = None
    token_ids: Callable[[Sequence[str], int], list[np.ndarray]] | None = None

    @classmethod
    def open(
        cls,
        folder_or_id: str | Path,
        *,
        prefix: str = "",
        threshold: float = 0.95,
        preserve_norm: bool = False,
        centre_keys: bool = False,
        stages: str = "itc",
    ) -> HuggingFaceReference:
        """Load a folder or a hub id in float32 on the CPU, with attention written out.

        `prefix`: a prefix of every tensor name in its files that stock transformers does not expect.

        Raises:
            UnavailableError: transformers is not installed.
            CheckpointError: it is missing, another kind of model, or tensors are missing, unexpected or of another
                shape (transformers itself only warns).
        """
        model = _load(str(folder_or_id), prefix)
        heads = model.config.qformer_config.num_attention_heads
        return cls(
            model,
            heads=heads,
            threshold=threshold,
            preserve_norm=preserve_norm,
            centre_keys=centre_keys,
            stages=stages,
        )

    @classmethod
    def from_lavis(
        cls,
        tensors: LavisTensors,
        config: Blip2Config,
        *,
        threshold: float = 0.95,
        preserve_norm: bool = False,
        centre_keys: bool = False,
        stages: str = "itc",
    ) -> HuggingFaceReference:
        """The stock model of `config` with a LAVIS checkpoint's weights, in float32 on the CPU.

        Raises:
            UnavailableError: transformers is not installed, or lacks the vision transformer (CLIP's).
            CheckpointError: the stock model has a parameter that the checkpoint lacks.
        """
        model = _stock_model(config)
        copy_from_lavis(tensors, model.state_dict())
        heads = config.qformer.heads
        return cls(
            model,
            heads=heads,
            threshold=threshold,
            preserve_norm=preserve_norm,
            centre_keys=centre_keys,
            stages=stages,
        )

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


def _stock_model(config: Blip2Config) -> Any:
    """Stock `Blip2ForImageTextRetrieval` with those dimensions and random weights."""
    if config.vision.family != "eva":
        raise UnavailableError(
            f"the Hugging Face reference has no vision transformer of the {config.vision.family!r} family, only EVA's; "
            "use --reference lavis or torch",
            code="reference-vision",
        )
    turn_off_telemetry()
    try:
        from transformers import Blip2Config as StockConfig
        from transformers import Blip2ForImageTextRetrieval, Blip2QFormerConfig, Blip2VisionConfig
    except ImportError as error:
        raise _no_transformers(error) from error
    vision, qformer = config.vision, config.qformer
    stock = StockConfig(
        vision_config=Blip2VisionConfig(
            hidden_size=vision.width,
            intermediate_size=vision.mlp_width,
            num_hidden_layers=vision.layers,
            num_attention_heads=vision.heads,
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            layer_norm_eps=vision.layer_norm_eps,
            qkv_bias=vision.qkv_bias,
        ).to_dict(),
        qformer_config=Blip2QFormerConfig(
            vocab_size=qformer.vocab_size,
            hidden_size=qformer.width,
            num_hidden_layers=qformer.layers,
            num_attention_heads=qformer.heads,
            intermediate_size=qformer.mlp_width,
            max_position_embeddings=qformer.max_positions,
            layer_norm_eps=qformer.layer_norm_eps,
            cross_attention_frequency=qformer.cross_attention_frequency,
            encoder_hidden_size=vision.width,
            use_qformer_text_input=True,
        ).to_dict(),
        num_query_tokens=qformer.queries,
        image_text_hidden_size=config.embed_dim,
        image_token_index=None,
    )
    stock._attn_implementation = "eager"
    model = Blip2ForImageTextRetrieval(stock).eval().requires_grad_(False)
    # LAVIS's LayerNorm after the blocks has its own eps (1e-5); transformers uses the blocks' (1e-6).
    model.vision_model.post_layernorm.eps = config.ln_vision_eps
    return model


def copy_from_lavis(tensors: LavisTensors, stock: Mapping[str, Tensor]) -> None:
    """Copy a LAVIS checkpoint's parameters into the stock model's.

    Args:
        tensors: by LAVIS name, any floating dtype.
        stock: the stock model's `state_dict()`, which shares its memory. Position ids stay as they are; the third
            of a `qkv.bias` that LAVIS lacks becomes zero, because EVA's keys have no bias.

    Raises:
        CheckpointError: a parameter has no counterpart.
    """
    origins = lavis_origins("huggingface", stock)
    known = {origin.name for origin in origins.values()}
    missing = sorted(origins.keys() - set(tensors.names()))
    missing += [name for name, own in stock.items() if own.is_floating_point() and name not in known]
    if missing:
        raise CheckpointError(
            f"the LAVIS checkpoint has nothing for {len(missing)} parameters of Blip2ForImageTextRetrieval: "
            f"{', '.join(missing[:4])}{', ...' if len(missing) > 4 else ''}; use --reference torch",
            code="checkpoint-tensors",
        )
    for name in known:
        stock[name].zero_()
    for lavis, origin in origins.items():
        whole = stock[origin.name]
        part = whole if origin.third is None else whole.chunk(3)[origin.third]
        part.copy_(tensors.get(lavis).reshape(part.shape))


def _no_transformers(error: ImportError) -> UnavailableError:
    return UnavailableError(
        f"the Hugging Face reference needs transformers ({error}): pip install 'qpert[hf]'", code="hf-extra-missing"
    )


def _load(folder_or_id: str, prefix: str = "") -> Any:
    """The stock model in float32, with all tensors from the checkpoint and none unused."""
    turn_off_telemetry()
    try:
        from transformers import Blip2Config, Blip2ForImageTextRetrieval
    except ImportError as error:
        raise _no_transformers(error) from error
    try:
        config = Blip2Config.from_pretrained(folder_or_id)
        if config.model_type != "blip-2":
            raise CheckpointError(
                f"{folder_or_id} is a {config.model_type!r} model, expected 'blip-2'", code="hub-model-type"
            )
        # Files on the hub mark placeholder tokens for the image; here queries and text are passed separately.
        config.image_token_index = None
        config.qformer_config.use_qformer_text_input = True
        model, report = Blip2ForImageTextRetrieval.from_pretrained(
            folder_or_id,
            config=config,
            dtype=torch.float32,
            attn_implementation="eager",
            ignore_mismatched_sizes=True,  # so that they are reported below, with the rest
            key_mapping={f"^{re.escape(prefix)}": ""} if prefix else None,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{folder_or_id} cannot be loaded as Blip2ForImageTextRetrieval: {error}", code="reference-load"
        ) from error
    _check_report(folder_or_id, report)
    return model


def _check_report(source: str, report: dict[str, Any]) -> None:
    """Raise if transformers reports a tensor of the network that it initialised, dropped or could not fit."""
    kinds = {kind: sorted(map(str, report.get(kind) or ())) for kind in ("missing_keys", "unexpected_keys")}
    kinds["mismatched_keys"] = sorted(str(item[0]) for item in report.get("mismatched_keys") or ())
    unused = {*foreign_extras("huggingface", kinds["unexpected_keys"])}
    kinds["unexpected_keys"] = [
        name for name in kinds["unexpected_keys"] if name not in unused and not is_unused(name, UNUSED["huggingface"])
    ]
    if any(kinds.values()):
        found = "; ".join(
            f"{len(names)} {kind.removesuffix('_keys')} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"
            for kind, names in kinds.items()
            if names
        )
        raise CheckpointError(
            f"{source} does not hold the tensors of Blip2ForImageTextRetrieval: {found}. "
            "Expected a retrieval checkpoint, such as Salesforce/blip2-itm-vit-g",
            code="checkpoint-tensors",
        )
