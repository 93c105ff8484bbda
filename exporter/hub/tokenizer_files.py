"""Tokenizer files of a Hugging Face folder, merged as transformers merges them.

Source: transformers `tokenization_utils_base.py` (`_from_pretrained`) and `tokenization_utils_tokenizers.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qpert.exporter.checkpoints.json_files import read_json_object
from qpert.runtime.errors import CheckpointError

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")


@dataclass(frozen=True)
class HubTokenizer:
    """A tokenizer that cleans, frames, truncates and pads like the stock one, with the facts that a host needs.

    `backend` pads to the longest text of a batch (`pad_to` "longest") or always to `max_length` ("max_length").
    `max_length` counts the frame's tokens. `cleaning` describes the normaliser, for a manifest.
    """

    backend: Tokenizer
    kind: str
    cleaning: str
    max_length: int
    pad_to: Literal["longest", "max_length"]
    pad_id: int
    pad_side: Literal["left", "right"]
    bos_id: int | None
    eos_id: int | None

    @property
    def vocab_size(self) -> int:
        return int(self.backend.get_vocab_size(with_added_tokens=True))


@dataclass(frozen=True)
class TokenizerFiles:
    """Content of the files: the settings of `tokenizer_config.json`, the named tokens, and every added token by id."""

    settings: Mapping[str, Any]
    named: Mapping[str, AddedToken]
    added: Mapping[int, AddedToken]
    json: Mapping[str, Any] | None
    """`tokenizer.json`, if there is one."""


def read_tokenizer_files(folder: Path, defaults: Mapping[str, str]) -> TokenizerFiles:
    """The files of `folder`; each may be missing. `defaults` are the class's named tokens.

    Raises:
        CheckpointError: a file is not JSON, an entry is not a token, or a setting cannot be honoured.
    """
    settings = _optional(folder / "tokenizer_config.json")
    whole = _optional(folder / "tokenizer.json") or None
    tokens: dict[str, Any] = {**defaults, **{k: v for k, v in settings.items() if k in NAMED and v is not None}}
    try:
        if "added_tokens_decoder" in settings:
            added = {int(i): _token(folder, t) for i, t in settings["added_tokens_decoder"].items()}
        else:  # files from before transformers 4.34
            tokens |= {k: v for k, v in _optional(folder / "special_tokens_map.json").items() if k in NAMED}
            added = _legacy_added(folder, {_content(t) for t in tokens.values()}, whole)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"the added tokens in {folder} cannot be read ({error!r}); expected an id and a token in each entry: "
            "download the folder again",
            code="tokenizer-file",
        ) from error
    by_content = {token.content: token for token in added.values()}
    _check_settings(folder, settings, set(by_content))
    named = {name: by_content.get(_content(token)) or _token(folder, token) for name, token in tokens.items()}
    for token in named.values():
        token.special = True
    return TokenizerFiles(settings, named, added, whole)


def _check_settings(folder: Path, settings: Mapping[str, Any], added: set[str]) -> None:
    """Raise for settings that would change ids and are not supported."""
    for name in ("extra_special_tokens", "additional_special_tokens"):
        extra = settings.get(name) or []
        if not isinstance(extra, list) or {_content(token) for token in extra} - added:
            raise unsupported(folder, name, extra)
    if settings.get("split_special_tokens"):
        raise unsupported(folder, "split_special_tokens", settings["split_special_tokens"])
    if settings.get("truncation_side", "right") != "right":
        raise unsupported(folder, "truncation_side", settings["truncation_side"])


def unsupported(folder: Path, name: str, value: Any) -> CheckpointError:
    """The error for a setting of `tokenizer_config.json` that cannot be honoured."""
    return CheckpointError(
        f"{folder}/tokenizer_config.json has {name} {value!r}, which qpert cannot honour", code="tokenizer-unsupported"
    )


def _optional(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.is_file() else {}


def _legacy_added(folder: Path, special: set[str], whole: Mapping[str, Any] | None) -> dict[int, AddedToken]:
    from tokenizers import AddedToken

    added = {
        int(i): AddedToken(content, normalized=content not in special, special=content in special)
        for content, i in _optional(folder / "added_tokens.json").items()
    }
    for entry in (whole or {}).get("added_tokens", []):
        added[int(entry["id"])] = _token(folder, {k: v for k, v in entry.items() if k != "id"})
    return added


def _content(token: Any) -> str:
    return str(token.get("content")) if isinstance(token, dict) else str(token)


def _token(folder: Path, value: Any) -> AddedToken:
    """A token given as a string (then it is special), or as an object with its matching rules."""
    from tokenizers import AddedToken

    if isinstance(value, str):
        return AddedToken(value, special=True)
    if isinstance(value, dict) and isinstance(value.get("content"), str):
        rules = {k: bool(value[k]) for k in ("single_word", "lstrip", "rstrip", "normalized", "special") if k in value}
        return AddedToken(value["content"], **rules)
    raise CheckpointError(
        f"a tokenizer file in {folder} has {value!r} where a token was expected; download the folder again",
        code="tokenizer-file",
    )


def add_tokens(backend: Tokenizer, files: TokenizerFiles) -> None:
    """Add all tokens to a new backend in transformers' order: by id, then the named ones.

    Of several tokens with the same content, the last one's matching rules apply: a padding token given as a plain
    string replaces those of the end of text (OpenAI's files).
    """
    tokens = [token for _, token in sorted(files.added.items())]
    contents = {token.content for token in tokens}
    tokens += [files.named[name] for name in NAMED if name in files.named and files.named[name].content not in contents]
    for token in tokens:
        (backend.add_special_tokens if token.special else backend.add_tokens)([token])


def token_id(backend: Tokenizer, files: TokenizerFiles, name: str, source: Path) -> int:
    """The id of a named token.

    Raises:
        CheckpointError: the vocabulary has no such token.
    """
    content = files.named[name].content
    found = backend.token_to_id(content)
    if found is None:
        raise CheckpointError(
            f"the tokenizer in {source} has no {content!r}, its {name}; download the folder again",
            code="tokenizer-special-token",
        )
    return int(found)


def check_fits(backend: Tokenizer, rows: int, source: Path) -> None:
    """Raise `CheckpointError` if a token's id is not a row of the token embedding."""
    largest = max(backend.get_vocab(with_added_tokens=True).values())
    if largest >= rows:
        raise CheckpointError(
            f"the tokenizer in {source} has ids up to {largest} but the token embedding has {rows} rows; they belong "
            "to different models, download the folder again",
            code="tokenizer-vocabulary",
        )


def max_length(files: TokenizerFiles, positions: int, default: int | None = None) -> int:
    """`model_max_length`, at most the number of position embeddings."""
    stated = files.settings.get("model_max_length", default)
    return min(int(stated), positions) if isinstance(stated, int | float) else positions
