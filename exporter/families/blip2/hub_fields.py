"""All known fields of a BLIP-2 `config.json`: used, restricted to one value, or without effect.

Source: transformers `configuration_blip_2.py`, `modeling_blip_2.py`, versions 4.27–5.23.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qpert.exporter.checkpoints.config_fields import ANY_MODEL, EVERY_CONFIG, Fields, dotted
from qpert.runtime.errors import CheckpointError

GELU = ("gelu", "gelu_python")
"""Names of the exact GELU, x·Φ(x): as an operator, and written out with erf (transformers `activations.py`)."""

SECTIONS: Mapping[str, Fields] = {
    "": Fields(
        frozenset({"num_query_tokens", "image_text_hidden_size", "vision_config", "qformer_config"}),
        ANY_MODEL,
        # The language model, and the tokens that represent an image in its prompt.
        EVERY_CONFIG | {"text_config", "use_decoder_only_language_model", "image_token_index", "image_token_id"},
    ),
    "vision_config": Fields(
        frozenset(
            {
                *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size"),
                *("patch_size", "hidden_act", "layer_norm_eps", "qkv_bias"),
            }
        ),
        {**ANY_MODEL, "num_channels": (3,), "add_cross_attention": (False, None)},
        EVERY_CONFIG | {"projection_dim"},
    ),
    "qformer_config": Fields(
        frozenset(
            {
                *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
                *("hidden_act", "max_position_embeddings", "layer_norm_eps", "cross_attention_frequency"),
                *("encoder_hidden_size", "use_qformer_text_input"),
            }
        ),
        {**ANY_MODEL, "position_embedding_type": ("absolute",)},
        EVERY_CONFIG | {"add_cross_attention"},  # cross_attention_frequency decides instead
    ),
}


def check_activation(path: Path, section: str, value: Any) -> tuple[str, ...]:
    """A note if the activation is GELU under another name.

    Raises:
        CheckpointError: another activation.
    """
    if value not in GELU:
        raise CheckpointError(
            f"{path} has {dotted(section, 'hidden_act')} {value!r}; only {' and '.join(map(repr, GELU))}, the exact "
            "GELU, are supported",
            code="hub-config-unsupported",
        )
    return () if value == GELU[0] else (f"{dotted(section, 'hidden_act')} {value!r} is the exact GELU",)
