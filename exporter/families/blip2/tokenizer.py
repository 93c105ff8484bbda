"""Builds the bundle's `tokenizer.json` from a checkpoint's vocabulary.

Source: LAVIS `lavis/models/blip2_models/blip2.py` (Blip2Base.init_tokenizer: bert-base-uncased, plus `[DEC]` as
bos_token: 30,522 + 1 entries.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpert.exporter.families.blip2.tokenizer_files import (
    Say,
    add_declared,
    check_normalizer,
    check_settings,
    compare_vocabulary,
    normalisation,
    read_settings,
)
from qpert.runtime.errors import InputError
from qpert.runtime.inputs.text import read_tokenizer_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

DEFAULT_TOKENIZER = "bert-base-uncased"
"""LAVIS `Blip2Base.init_tokenizer`: this vocabulary, plus [DEC]."""
REQUIRED_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
DECODER_TOKEN = "[DEC]"


def ignore(line: str) -> None:
    """The default callback: does nothing."""


def build_tokenizer(source: Path, *, vocab_size: int | None, own: bool = False, say: Say = ignore) -> Tokenizer:
    """The uncased BERT WordPiece tokenizer of `source`. It frames texts as `[CLS] A [SEP]`, without truncation or
    padding.

    Args:
        source: a `vocab.txt`, a `tokenizer.json`, or a folder with either (`tokenizer.json` is preferred, as in
            transformers). The settings of `tokenizer_config.json` and its companions are honoured or rejected.
        vocab_size: rows of the checkpoint's word embeddings. If the vocabulary is one short of them and has no
            `[DEC]`, `[DEC]` is appended, as in LAVIS; added tokens beyond them are left out. None skips the check.
        own: it comes from the checkpoint's folder, so rows without a token are accepted.
        say: called with notes on what was left out or not used.

    Raises:
        InputError: the source cannot be read, lacks a special token, or disagrees with `vocab_size`.
    """
    file = _vocabulary_file(Path(source))
    settings = read_settings(file.parent)
    check_settings(file.parent, settings, say)
    tokenizer = _from_vocabulary(file, settings) if file.suffix == ".txt" else _from_json(file, settings, say)
    tokenizer, left = _without_rowless(tokenizer, vocab_size)
    left += add_declared(tokenizer, file.parent, settings, vocab_size)
    if left:
        say(f"tokens without a row in the word embeddings were left out: {', '.join(map(repr, dict.fromkeys(left)))}")
    missing = [token for token in REQUIRED_TOKENS if tokenizer.token_to_id(token) is None]
    if missing:
        raise InputError(
            f"{file} lacks {', '.join(missing)}; expected an uncased BERT vocabulary with these tokens",
            code="tokenizer-special-token",
        )
    if vocab_size is not None:
        _fit_to_embeddings(tokenizer, vocab_size, file, own, say)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    _frame(tokenizer, file, say)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Write `tokenizer.json`."""
    path.write_text(tokenizer.to_str(pretty=True), encoding="utf-8")


def _vocabulary_file(source: Path) -> Path:
    candidates = [source / "tokenizer.json", source / "vocab.txt"] if source.is_dir() else [source]
    for candidate in candidates:
        if candidate.is_file() and candidate.suffix in (".txt", ".json"):
            return candidate
    if source.is_dir():
        raise InputError(
            f"the folder {source} has neither tokenizer.json nor vocab.txt; expected one of them",
            code="tokenizer-missing",
        )
    what = "is neither .txt nor .json" if source.is_file() else "does not exist"
    raise InputError(
        f"tokenizer source {source} {what}; expected a vocab.txt, a tokenizer.json or a folder with either",
        code="tokenizer-missing",
    )


def _from_vocabulary(path: Path, settings: Mapping[str, Any]) -> Tokenizer:
    """One token a line; the line number, from 0, is its id."""
    from tokenizers import Tokenizer
    from tokenizers.decoders import WordPiece as WordPieceDecoder
    from tokenizers.models import WordPiece
    from tokenizers.normalizers import BertNormalizer
    from tokenizers.pre_tokenizers import BertPreTokenizer

    vocabulary = _read_vocabulary(path)
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    cleaning = normalisation(settings)
    if cleaning["strip_accents"] is None:
        cleaning["strip_accents"] = cleaning["lowercase"]  # BertNormalizer's meaning of None
    tokenizer.normalizer = BertNormalizer(clean_text=True, **cleaning)
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.decoder = WordPieceDecoder(prefix="##")
    specials = (*REQUIRED_TOKENS, "[MASK]", DECODER_TOKEN)
    tokenizer.add_special_tokens([token for token in specials if token in vocabulary])
    return tokenizer


def _read_vocabulary(path: Path) -> dict[str, int]:
    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the vocabulary {path}: {error}", code="tokenizer-file") from error
    vocabulary: dict[str, int] = {}
    for number, line in enumerate(lines):
        token = line.removesuffix("\r")
        if not token or token in vocabulary:
            what = f"repeats {token!r} of line {vocabulary[token] + 1}" if token else "is empty"
            raise InputError(f"{path}:{number + 1} {what}; expected one new token on every line", code="tokenizer-file")
        vocabulary[token] = number
    return vocabulary


def _from_json(path: Path, settings: Mapping[str, Any], say: Say) -> Tokenizer:
    from tokenizers.models import WordPiece

    tokenizer = read_tokenizer_json(path)
    if not isinstance(tokenizer.model, WordPiece):
        got = type(tokenizer.model).__name__
        raise InputError(
            f"{path} holds a {got} model; expected WordPiece, BERT's, as BLIP-2's text branch uses",
            code="tokenizer-kind",
        )
    check_normalizer(tokenizer, path, settings)
    compare_vocabulary(tokenizer, path.parent, say)
    return tokenizer


def _without_rowless(tokenizer: Tokenizer, rows: int | None) -> tuple[Tokenizer, tuple[str, ...]]:
    """Remove added tokens whose ids exceed the word embeddings, such as `<image>`, which saved processors add."""
    from tokenizers import Tokenizer as Backend

    document = json.loads(tokenizer.to_str())
    own = set(document["model"]["vocab"].values())
    beyond = [t for t in document["added_tokens"] if rows is not None and t["id"] >= rows and t["id"] not in own]
    if not beyond:
        return tokenizer, ()
    document["added_tokens"] = [token for token in document["added_tokens"] if token not in beyond]
    return Backend.from_str(json.dumps(document)), tuple(token["content"] for token in beyond)


def _fit_to_embeddings(tokenizer: Tokenizer, vocab_size: int, file: Path, own: bool, say: Say) -> None:
    if tokenizer.get_vocab_size() == vocab_size - 1 and tokenizer.token_to_id(DECODER_TOKEN) is None:
        tokenizer.add_special_tokens([DECODER_TOKEN])
    got, largest = tokenizer.get_vocab_size(), max(tokenizer.get_vocab().values())
    if own and got <= vocab_size and largest < vocab_size:
        if got < vocab_size:
            say(f"{vocab_size - got} of the {vocab_size:,} rows of the word embeddings have no token in {file.name}")
        return
    if got != vocab_size or largest >= vocab_size:
        raise InputError(
            f"{file} has {got:,} tokens with ids up to {largest:,}, but the checkpoint's word embeddings have "
            f"{vocab_size:,} rows; they must be equal: pass the vocabulary that the checkpoint was trained with "
            "(LAVIS: bert-base-uncased, 30,522 + [DEC])",
            code="tokenizer-vocabulary",
        )


def _frame(tokenizer: Tokenizer, file: Path, say: Say) -> None:
    """[CLS] A [SEP], as LAVIS frames a caption.

    Raises:
        InputError: the file frames texts differently, so its stock tokenizer gives other ids.
    """
    from tokenizers.processors import TemplateProcessing

    stated = tokenizer.encode("").tokens
    if stated not in (["[CLS]", "[SEP]"], []):
        raise InputError(
            f"{file} frames a text as {' '.join(stated[:-1])} … {stated[-1]}; expected [CLS] … [SEP], BERT's frame",
            code="tokenizer-unsupported",
        )
    if not stated and file.suffix == ".json":
        say(f"{file.name} does not frame texts: they are framed as [CLS] … [SEP], as in BLIP-2's training")
    ids = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ids
    )
