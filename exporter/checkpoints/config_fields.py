"""Fields of a `config.json`: used, restricted to one value, or without effect. Unknown ones are noted.

Source: transformers `configuration_utils.py`, versions 4.27–5.23.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qpert.runtime.errors import CheckpointError

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


def check_fields(path: Path, section: str, values: Mapping[str, Any], fields: Fields) -> tuple[str, ...]:
    """Notes on unknown fields of a section (`""` for the top level).

    Raises:
        CheckpointError: a field has an unsupported value.
    """
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


def dotted(section: str, name: str) -> str:
    return f"{section}.{name}" if section else name
