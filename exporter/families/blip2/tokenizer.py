"""The bundle's `tokenizer.json`, from whatever vocabulary lies beside a checkpoint.

Source: LAVIS `lavis/models/blip2_models/blip2.py` (Blip2Base.init_tokenizer: bert-base-uncased, plus `[DEC]` as
bos_token), which makes 30,522 + 1 entries.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qpert.runtime.errors import InputError
from qpert.runtime.inputs.text import read_tokenizer_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

DEFAULT_TOKENIZER = "bert-base-uncased"
"""LAVIS `Blip2Base.init_tokenizer`: this vocabulary, plus [DEC]."""
REQUIRED_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
DECODER_TOKEN = "[DEC]"


def build_tokenizer(source: Path, *, vocab_size: int | None) -> Tokenizer:
    """The uncased BERT WordPiece tokenizer of `source`, framing a text as `[CLS] A [SEP]`, never truncating or padding.

    `source` is a `vocab.txt`, a `tokenizer.json`, or a folder with either (`tokenizer.json` is preferred).
    `vocab_size` is the number of rows of the checkpoint's word embeddings; where the vocabulary is one short of it and
    has no `[DEC]`, `[DEC]` is appended, as LAVIS does. None skips the comparison and appends nothing.

    Raises `InputError` if the source cannot be read, lacks a special token, or disagrees with `vocab_size`.
    """
    file = _vocabulary_file(Path(source))
    tokenizer = _from_vocabulary(file) if file.suffix == ".txt" else _from_json(file)
    missing = [token for token in REQUIRED_TOKENS if tokenizer.token_to_id(token) is None]
    if missing:
        raise InputError(f"{file} lacks {', '.join(missing)}; expected an uncased BERT vocabulary with these tokens")
    if vocab_size is not None:
        _fit_to_embeddings(tokenizer, vocab_size, file)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    _frame(tokenizer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Writes `tokenizer.json`."""
    path.write_text(tokenizer.to_str(pretty=True), encoding="utf-8")


def _vocabulary_file(source: Path) -> Path:
    candidates = [source / "tokenizer.json", source / "vocab.txt"] if source.is_dir() else [source]
    for candidate in candidates:
        if candidate.is_file() and candidate.suffix in (".txt", ".json"):
            return candidate
    if source.is_dir():
        raise InputError(f"the folder {source} has neither tokenizer.json nor vocab.txt; expected one of them")
    what = "is neither .txt nor .json" if source.is_file() else "does not exist"
    raise InputError(
        f"tokenizer source {source} {what}; expected a vocab.txt, a tokenizer.json or a folder with either"
    )


def _from_vocabulary(path: Path) -> Tokenizer:
    """One token a line; the line number, from 0, is its id."""
    from tokenizers import Tokenizer
    from tokenizers.decoders import WordPiece as WordPieceDecoder
    from tokenizers.models import WordPiece
    from tokenizers.normalizers import BertNormalizer
    from tokenizers.pre_tokenizers import BertPreTokenizer

    vocabulary = _read_vocabulary(path)
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = BertNormalizer(
        clean_text=True, handle_chinese_chars=True, strip_accents=True, lowercase=True
    )
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.decoder = WordPieceDecoder(prefix="##")
    specials = (*REQUIRED_TOKENS, "[MASK]", DECODER_TOKEN)
    tokenizer.add_special_tokens([token for token in specials if token in vocabulary])
    return tokenizer


def _read_vocabulary(path: Path) -> dict[str, int]:
    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the vocabulary {path}: {error}") from error
    vocabulary: dict[str, int] = {}
    for number, line in enumerate(lines):
        token = line.removesuffix("\r")
        if not token or token in vocabulary:
            what = f"repeats {token!r} of line {vocabulary[token] + 1}" if token else "is empty"
            raise InputError(f"{path}:{number + 1} {what}; expected one new token on every line")
        vocabulary[token] = number
    return vocabulary


def _from_json(path: Path) -> Tokenizer:
    from tokenizers.models import WordPiece

    tokenizer = read_tokenizer_json(path)
    if not isinstance(tokenizer.model, WordPiece):
        got = type(tokenizer.model).__name__
        raise InputError(f"{path} holds a {got} model; expected WordPiece, BERT's, as BLIP-2's text branch uses")
    return tokenizer


def _fit_to_embeddings(tokenizer: Tokenizer, vocab_size: int, file: Path) -> None:
    if tokenizer.get_vocab_size() == vocab_size - 1 and tokenizer.token_to_id(DECODER_TOKEN) is None:
        tokenizer.add_special_tokens([DECODER_TOKEN])
    if (got := tokenizer.get_vocab_size()) != vocab_size:
        raise InputError(
            f"{file} has {got:,} tokens and the checkpoint's word embeddings have {vocab_size:,} rows; they must be "
            "equal: pass the vocabulary that the checkpoint was trained with (LAVIS: bert-base-uncased, 30,522 + [DEC])"
        )


def _frame(tokenizer: Tokenizer) -> None:
    """[CLS] A [SEP], whatever the source said."""
    from tokenizers.processors import TemplateProcessing

    ids = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ids
    )
