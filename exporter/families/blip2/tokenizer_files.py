"""Reads the settings of a BERT vocabulary, field by field: `tokenizer_config.json` and its companions.

Source: transformers `tokenization_utils_base.py` and `tokenization_bert.py` of versions 4.27–5.23.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpert.exporter.checkpoints.json_files import read_json_object
from qpert.exporter.families.blip2.graph_specs import MAX_LENGTH
from qpert.runtime.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Say = Callable[[str], None]

JSON_NAMES = {
    "do_lower_case": "lowercase",
    "strip_accents": "strip_accents",
    "tokenize_chinese_chars": "handle_chinese_chars",
}
"""Fields that decide how BERT cleans a text, and their names in `tokenizer.json`."""
BERT_DEFAULTS = {"do_lower_case": True, "strip_accents": None, "tokenize_chinese_chars": True}

NAMED = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
}
"""The tokens for framing, padding and unknown words, which the runtime relies on."""

ONLY: Mapping[str, tuple[Any, ...]] = {
    "do_basic_tokenize": (True, None),
    "never_split": (None, []),
    "truncation_side": ("right", None),
    "split_special_tokens": (False, None),
    "auto_map": (None,),
    "add_prefix_space": (False, None),
}
WITHOUT_EFFECT = frozenset(
    {
        *("tokenizer_class", "processor_class", "name_or_path", "_name_or_path", "special_tokens_map_file"),
        *("tokenizer_file", "backend", "is_local", "local_files_only", "model_input_names", "return_token_type_ids"),
        *("clean_up_tokenization_spaces", "add_bos_token", "add_eos_token", "chat_template", "_commit_hash"),
        *("bos_token", "eos_token", "mask_token", "use_fast", "transformers_version", "errors"),
    }
)
"""Fields that change no id of a caption: names, file locations, decoding, tokens that frame no caption."""
USED = frozenset(
    {
        *("padding_side", "model_max_length", "max_length", "max_len", "added_tokens_decoder", "truncation"),
        *("additional_special_tokens", "extra_special_tokens", "padding", "stride", "truncation_strategy"),
    }
)


def read_settings(folder: Path) -> dict[str, Any]:
    """`special_tokens_map.json`, overridden by `tokenizer_config.json`; empty if neither exists.

    Raises:
        CheckpointError: one of them is not a JSON object.
    """
    found: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            found |= read_json_object(folder / name)
    return found


def check_settings(folder: Path, settings: Mapping[str, Any], say: Say) -> None:
    """Reject unsupported values by field name, and report what is not used.

    Raises:
        InputError: a field has an unsupported value.
    """
    path = folder / "tokenizer_config.json"
    for name, possible in ONLY.items():
        if settings.get(name, possible[0]) not in possible:
            raise _unsupported(path, name, settings[name], possible[0])
    for name, token in NAMED.items():
        if content(settings.get(name, token)) not in (token, None):
            raise _unsupported(path, name, settings[name], token)
    if settings.get("padding_side") == "left":
        say(f"{path.name} pads on the left: texts are padded on the right, with the same result as each text alone")
    length = settings.get("model_max_length")
    if isinstance(length, int | float) and 0 < length < MAX_LENGTH:
        say(f"{path.name} has model_max_length {length:g}: pass --max-length {length:g} to truncate texts there")
    known = USED | WITHOUT_EFFECT | ONLY.keys() | NAMED.keys() | JSON_NAMES.keys()
    if unknown := sorted(settings.keys() - known):
        say(f"{path.name} has unknown fields, which are not used: {', '.join(unknown)}")


def _unsupported(path: Path, name: str, value: Any, expected: Any) -> InputError:
    return InputError(
        f"{path} has {name} {value!r}; only {expected!r} is supported: pass --tokenizer with another vocabulary, or "
        "correct the file",
        code="tokenizer-unsupported",
    )


def content(token: Any) -> str | None:
    """The text of a token, given as a string or an object."""
    return token.get("content") if isinstance(token, Mapping) else token


def normalisation(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The cleaning that `tokenizer_config.json` states, by BertNormalizer's names, with BERT's defaults."""
    stated = {name: settings.get(name, default) for name, default in BERT_DEFAULTS.items()}
    stated = {name: BERT_DEFAULTS[name] if value is None else value for name, value in stated.items()}
    return {JSON_NAMES[name]: value for name, value in stated.items()}


def check_normalizer(tokenizer: Tokenizer, path: Path, settings: Mapping[str, Any]) -> None:
    """Raise InputError if `tokenizer.json` and `tokenizer_config.json` clean texts differently.

    Which one wins depends on the version of transformers and on the tokenizer's class.
    """
    normalizer = tokenizer.normalizer
    if type(normalizer).__name__ != "BertNormalizer":
        return
    for name, key in JSON_NAMES.items():
        if name in settings and settings[name] is not None and getattr(normalizer, key) != settings[name]:
            raise InputError(
                f"{path} has {key} {getattr(normalizer, key)!r}, but tokenizer_config.json has {name} "
                f"{settings[name]!r}, and versions of transformers differ in which one wins; make them agree",
                code="tokenizer-contradiction",
            )


def declared_tokens(folder: Path, settings: Mapping[str, Any]) -> dict[str, int | None]:
    """Tokens that the files add to the vocabulary, with their ids if stated."""
    found: dict[str, int | None] = {}
    if "added_tokens_decoder" in settings:
        found |= {str(content(token)): int(number) for number, token in settings["added_tokens_decoder"].items()}
    elif (folder / "added_tokens.json").is_file():
        found |= {token: int(number) for token, number in read_json_object(folder / "added_tokens.json").items()}
    named = [settings.get(name) for name in ("bos_token", "eos_token", "mask_token")]
    listed = [*(settings.get("additional_special_tokens") or []), *_extra(settings.get("extra_special_tokens"))]
    for token in (*named, *listed):
        if (text := content(token)) is not None:
            found.setdefault(text, None)
    return found


def _extra(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, Mapping) else list(value or [])


def add_declared(tokenizer: Tokenizer, folder: Path, settings: Mapping[str, Any], rows: int | None) -> tuple[str, ...]:
    """Add the declared tokens that the vocabulary lacks; returns those without a row in the embeddings.

    Raises:
        InputError: a token's id in the vocabulary differs from that in the files.
    """
    tokens = sorted(declared_tokens(folder, settings).items(), key=lambda item: (item[1] is None, item[1] or 0))
    left = []
    for token, stated in tokens:
        own, end = tokenizer.token_to_id(token), tokenizer.get_vocab_size(with_added_tokens=True)
        if own is None and rows is not None and (end if stated is None else stated) >= rows:
            left.append(token)
            continue
        if own is None:
            tokenizer.add_special_tokens([token])
            own = end
        if stated not in (None, own):
            raise InputError(
                f"{folder} gives the token {token!r} id {stated} in one file and {own} in another; correct the "
                "files, or pass --tokenizer with one vocabulary",
                code="tokenizer-contradiction",
            )
    return tuple(left)


def compare_vocabulary(tokenizer: Tokenizer, folder: Path, say: Say) -> None:
    """Report a `vocab.txt` that differs from `tokenizer.json`; transformers reads the latter."""
    path = folder / "vocab.txt"
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").removesuffix("\n").split("\n")
    for number, line in enumerate(lines):
        token = line.removesuffix("\r")
        if tokenizer.token_to_id(token) != number:
            say(
                f"vocab.txt differs from tokenizer.json (first at line {number + 1}, {token!r}): "
                "tokenizer.json is used, as in transformers"
            )
            return
