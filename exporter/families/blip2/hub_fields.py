"""All known fields of a BLIP-2 `config.json`: used, restricted to one value, or without effect.

Source: transformers `configuration_blip_2.py`, `modeling_blip_2.py`, `configuration_utils.py`, versions 4.27–5.23.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qpert.runtime.errors import CheckpointError

GELU = ("gelu", "gelu_python")
"""Names of the exact GELU, x·Φ(x): as an operator, and written out with erf (transformers `activations.py`)."""

EVERY_CONFIG = frozenset(
    {
        # bookkeeping
        *("model_type", "architectures", "transformers_version", "_name_or_path", "_commit_hash", "name_or_path"),
        *("tokenizer_class", "id2label", "label2id", "problem_type", "finetuning_task", "task_specific_params"),
        # how a stock model runs: kernels, storage, what it returns
        *("torch_dtype", "dtype", "torchscript", "use_bfloat16", "tf_legacy_loss", "return_dict"),
        *("output_attentions", "output_hidden_states", "use_cache", "chunk_size_feed_forward"),
        *("_attn_implementation_autoset", "attn_implementation", "_attn_implementation"),
        # training: initial values and dropout, unused in evaluation
        *("initializer_range", "initializer_factor", "attention_dropout", "dropout", "hidden_dropout_prob"),
        *("attention_probs_dropout_prob", "classifier_dropout"),
        # text generation, unused in retrieval
        *("tie_word_embeddings", "tie_encoder_decoder", "is_encoder_decoder", "cross_attention_hidden_size"),
        *("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "decoder_start_token_id", "prefix"),
        *("bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "do_sample", "early_stopping"),
        *("encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "forced_bos_token_id"),
        *("forced_eos_token_id", "length_penalty", "max_length", "min_length", "no_repeat_ngram_size"),
        *("num_beam_groups", "num_beams", "num_return_sequences", "output_scores", "remove_invalid_values"),
        *("repetition_penalty", "return_dict_in_generate", "suppress_tokens", "temperature", "top_k", "top_p"),
        "typical_p",
    }
)
"""Fields of any configuration that do not change the results of the retrieval model."""


@dataclass(frozen=True)
class Fields:
    """The fields of one section: used, restricted to certain values, or without effect in retrieval."""

    used: frozenset[str]
    only: Mapping[str, tuple[Any, ...]]
    without_effect: frozenset[str] = EVERY_CONFIG


ANY_MODEL: Mapping[str, tuple[Any, ...]] = {
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
    "auto_map": (None,),
    "is_decoder": (False, None),
}

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


def check_fields(path: Path, section: str, values: Mapping[str, Any]) -> tuple[str, ...]:
    """Notes on unknown fields of a section (`""` for the top level).

    Raises:
        CheckpointError: a field has an unsupported value.
    """
    fields = SECTIONS[section]
    for name, possible in fields.only.items():
        if name in values and values[name] not in possible:
            raise CheckpointError(
                f"{path} has {dotted(section, name)} {values[name]!r}; only {possible[0]!r} is supported",
                code="hub-config-unsupported",
            )
    unknown = values.keys() - fields.used - fields.only.keys() - fields.without_effect
    return unknown_note(path, section, unknown)


def unknown_note(path: Path, section: str, unknown: Collection[str]) -> tuple[str, ...]:
    if not unknown:
        return ()
    names = ", ".join(dotted(section, name) for name in sorted(unknown))
    return (f"{path.name} has unknown fields, which are not used: {names}",)


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


def dotted(section: str, name: str) -> str:
    return f"{section}.{name}" if section else name
