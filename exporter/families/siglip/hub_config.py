"""`config.json` of a Hugging Face SigLIP folder.

SigLIP 2 comes in two forms. Its checkpoints of fixed resolution have model_type "siglip": the same class, the same
tensors. The NaFlex ones (model_type "siglip2") are another network: patches of variable grids through a linear layer,
resized positions, a mask over image tokens.

Source: transformers `configuration_siglip.py`, `modeling_siglip.py`, `modeling_siglip2.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qpert.exporter.checkpoints.json_files import read_json_object
from qpert.exporter.hub.towers import (
    Shape,
    assumed_defaults,
    check_class,
    parameter_shapes,
    read_text,
    read_vision,
    section,
    unknown_fields,
)
from qpert.graphs.families.siglip.config import SiglipConfig
from qpert.graphs.families.siglip.model import SiglipRetrieval
from qpert.runtime.errors import CheckpointError

MODEL_TYPE = "siglip"
ARCHITECTURE = "SiglipModel"
ADVICE = "expected a SigLIP checkpoint in Hugging Face's form, google/siglip-base-patch16-224 for instance"

TEXT_DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 64,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "projection_size": None,
}
VISION_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "vision_use_head": True,
}

UNUSED = frozenset(
    {
        "logit_scale",
        "logit_bias",
        "text_model.embeddings.position_ids",
        "vision_model.embeddings.position_ids",
    }
)
"""Tensors that retrieval does not need: scale and bias are the same for every score, and position ids are 0, 1, 2, …
(early files store them)."""

PREFIX_TOKENS = 0
"""There is no CLS: every image token is a patch."""

POSITIONS = "vision_model.embeddings.position_embedding.weight"
"""The parameter to interpolate for another image size (`qpert.graphs.transformer.interpolate_positions`)."""


def read_config(folder: Path, *, name: str) -> tuple[SiglipConfig, tuple[str, ...]]:
    """The architecture that `folder/config.json` describes, and notes on what it omits.

    Raises:
        CheckpointError: missing or unreadable, another model, or an unsupported value, named in the message.
    """
    path = folder / "config.json"
    values = read_json_object(path)
    _refuse_naflex(path, values)
    check_class(path, values, MODEL_TYPE, ARCHITECTURE, ADVICE)
    text = section(path, values, "text_config", TEXT_DEFAULTS)
    vision = section(path, values, "vision_config", VISION_DEFAULTS)
    _check_head(path, vision)
    _check_width(path, text, vision)
    config = SiglipConfig(name, read_vision(path, vision), read_text(path, text))
    notes = assumed_defaults("vision_config", values.get("vision_config"), VISION_DEFAULTS)
    notes += assumed_defaults("text_config", values.get("text_config"), TEXT_DEFAULTS)
    parts = {"vision_config": (vision, VISION_DEFAULTS), "text_config": (text, TEXT_DEFAULTS)}
    return config, (*notes, *unknown_fields(path, values, parts))


def _refuse_naflex(path: Path, values: Mapping[str, Any]) -> None:
    if values.get("model_type") == "siglip2":
        raise CheckpointError(
            f"{path} describes a SigLIP 2 NaFlex model (model_type 'siglip2'), whose image grids vary; only SigLIP 2 "
            "of fixed resolution is supported, google/siglip2-base-patch16-224 for instance",
            code="siglip-naflex",
        )


def _check_head(path: Path, vision: Mapping[str, Any]) -> None:
    if vision["vision_use_head"] is not True:
        raise CheckpointError(
            f"{path} has vision_config.vision_use_head {vision['vision_use_head']!r}: without its pooling head the "
            f"model gives no image vector; {ADVICE}",
            code="hub-config-unsupported",
        )


def _check_width(path: Path, text: Mapping[str, Any], vision: Mapping[str, Any]) -> None:
    """The two vectors meet in a dot product. Without projection_size, transformers uses the text's own width."""
    projected = text["hidden_size"] if text["projection_size"] is None else text["projection_size"]
    if projected != vision["hidden_size"]:
        raise CheckpointError(
            f"{path}: the text vector has {projected!r} values (text_config.projection_size), the image vector "
            f"{vision['hidden_size']!r} (vision_config.hidden_size); they must be equal: download it again",
            code="hub-config-value",
        )


def expected_shapes(config: SiglipConfig) -> dict[str, Shape]:
    """All required tensors (`UNUSED` ones may exist too)."""
    return parameter_shapes(lambda: SiglipRetrieval(config))
