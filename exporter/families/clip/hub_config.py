"""`config.json` of a Hugging Face CLIP folder.

Source: transformers `configuration_clip.py` and `modeling_clip.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qpert.exporter.checkpoints.json_files import read_json_object, whole_number
from qpert.exporter.hub.towers import (
    Shape,
    assumed_defaults,
    check_class,
    parameter_shapes,
    read_text,
    read_vision,
    unknown_fields,
)
from qpert.exporter.hub.towers import section as read_section
from qpert.graphs.families.clip.config import ClipConfig
from qpert.graphs.families.clip.model import ClipRetrieval
from qpert.runtime.errors import CheckpointError

MODEL_TYPE = "clip"
ARCHITECTURE = "CLIPModel"
ADVICE = "expected a CLIP checkpoint in Hugging Face's form, openai/clip-vit-base-patch32 for instance"

TEXT_DEFAULTS: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "eos_token_id": 49407,
}
VISION_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
PROJECTION_DEFAULT = 512

UNUSED = frozenset({"logit_scale", "text_model.embeddings.position_ids", "vision_model.embeddings.position_ids"})
"""Tensors that retrieval does not need: the scale is the same for every score, and position ids are 0, 1, 2, … (files
from before transformers 4.31 store them)."""

PREFIX_TOKENS = 1
"""CLS comes before the patches."""

POSITIONS = "vision_model.embeddings.position_embedding.weight"
"""The parameter to interpolate for another image size (`qpert.graphs.transformer.interpolate_positions`)."""


def read_config(folder: Path, *, name: str) -> tuple[ClipConfig, tuple[str, ...]]:
    """The architecture that `folder/config.json` describes, and notes on what it omits.

    Raises:
        CheckpointError: missing or unreadable, another model, or an unsupported value, named in the message.
    """
    path = folder / "config.json"
    values = read_json_object(path)
    check_class(path, values, MODEL_TYPE, ARCHITECTURE, ADVICE)
    text, text_notes = _section(path, values, "text_config", TEXT_DEFAULTS)
    vision, vision_notes = _section(path, values, "vision_config", VISION_DEFAULTS)
    config = ClipConfig(
        name=name,
        vision=read_vision(path, vision),
        text=read_text(path, text),
        embed_dim=whole_number(str(path), {"projection_dim": PROJECTION_DEFAULT, **values}, "projection_dim"),
        eos_token_id=_eos_token_id(path, text),
    )
    parts = {"vision_config": (vision, VISION_DEFAULTS), "text_config": (text, TEXT_DEFAULTS)}
    return config, (*vision_notes, *text_notes, *unknown_fields(path, values, parts))


def _section(
    path: Path, values: Mapping[str, Any], name: str, defaults: Mapping[str, Any]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """A section as transformers reads it: an old `…_config_dict`, with the defaults, replaces `…_config` entirely
    (OpenAI's files have both)."""
    old = f"{name}_dict"
    key = name if values.get(old) is None else old
    part = read_section(path, values, key, defaults)
    return part, assumed_defaults(key, values.get(key), defaults)


def _eos_token_id(path: Path, text: Mapping[str, Any]) -> int:
    value = text["eos_token_id"]
    if isinstance(value, bool) or not isinstance(value, int):
        raise CheckpointError(
            f"{path} has text_config.eos_token_id {value!r}; only a single id is supported, because the text is pooled "
            "at that token",
            code="hub-config-unsupported",
        )
    return value


def expected_shapes(config: ClipConfig) -> dict[str, Shape]:
    """All required tensors (`UNUSED` ones may exist too)."""
    return parameter_shapes(lambda: ClipRetrieval(config))
