"""Captions to token ids: LAVIS's cleaning, then BERT WordPiece from the bundle's `tokenizer.json`.

Source: LAVIS `lavis/processors/blip_processors.py` (BlipCaptionProcessor.pre_caption) and
`lavis/models/blip2_models/blip2_qformer.py` (35 tokens at most, right padding).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from qpert.runtime.errors import InputError, QpertWarning, TextError

if TYPE_CHECKING:
    from tokenizers import Encoding
    from tokenizers import Tokenizer as Backend

_PUNCTUATION = str.maketrans(dict.fromkeys('.!"()*#:;~', " "))
_WHITESPACE_RUN = re.compile(r"\s{2,}")
_FRAME = ("[PAD]", "[CLS]", "[SEP]")
"""The special tokens that `Tokenizer` itself relies on."""


def clean_caption(caption: str, *, max_words: int = 50, name: str = "the text") -> str:
    """A caption as LAVIS's `BlipCaptionProcessor.pre_caption` cleans it.

    In this order: lower case; each of . ! " ( ) * # : ; ~ becomes a space; a run of two or more whitespace characters
    becomes one space; trailing newlines, then surrounding spaces, are stripped; the first `max_words` words are kept,
    words being what single spaces separate. (A lone tab or newline inside stays, as in LAVIS; the tokenizer takes it
    for a space.)

    Of a text of punctuation alone nothing is left; LAVIS scores it as the empty text, and so it is given here. Raises
    `TextError` if `caption` is not a string or is blank; `name` is what the message calls it.
    """
    if not isinstance(caption, str):
        raise TextError(f"{name} is a {type(caption).__name__}; expected a string")
    cleaned = _WHITESPACE_RUN.sub(" ", caption.lower().translate(_PUNCTUATION)).rstrip("\n").strip(" ")
    if not caption.strip():
        raise TextError(
            f"{name} is {_shown(caption)}, of which cleaning leaves nothing; expected at least one word",
            code="text-blank",
        )
    return " ".join(cleaned.split(" ")[:max_words])


@dataclass(frozen=True, eq=False)
class TokenizedTexts:
    """T texts as the `text` and `itm` graphs take them, padded on the right to the longest of the batch, L tokens.

    `input_ids` int64 [T,L]: `[CLS] … [SEP] [PAD]…`. `attention_mask` int64 [T,L]: 1 for tokens, 0 for padding.
    """

    input_ids: npt.NDArray[np.int64]
    attention_mask: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.input_ids)

    def rows(self, index: npt.NDArray[np.int64]) -> TokenizedTexts:
        """Some of the texts, in that order, padded as before."""
        return TokenizedTexts(self.input_ids[index], self.attention_mask[index])


class Tokenizer:
    """Cleans and tokenises texts. Open one with `Tokenizer.open`."""

    def __init__(self, backend: Backend, *, max_length: int) -> None:
        """`backend` is configured here: truncated at `max_length` tokens ([CLS] and [SEP] included), not padded."""
        if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 3:
            raise InputError(f"max_length is {max_length!r}; expected at least 3: [CLS], one token and [SEP]")
        missing = [token for token in _FRAME if backend.token_to_id(token) is None]
        if missing:
            raise InputError(f"the tokenizer lacks {', '.join(missing)}; expected a BERT WordPiece tokenizer")
        backend.no_padding()
        backend.enable_truncation(max_length)
        self._backend = backend
        self._pad_token_id: int = backend.token_to_id("[PAD]") or 0
        self._max_length = max_length
        self._truncation_said = False
        self._empty_said = False

    @classmethod
    def open(cls, path: Path, *, max_length: int) -> Tokenizer:
        """Reads a `tokenizer.json`. Raises `InputError` if it is missing or is no BERT tokenizer.

        `max_length` counts tokens including [CLS] and [SEP] (35 in LAVIS retrieval evaluation). Truncation or padding
        settings inside the file are not used.
        """
        backend = read_tokenizer_json(Path(path))
        return cls(backend, max_length=max_length)

    @property
    def max_length(self) -> int:
        """Tokens a text may have, [CLS] and [SEP] included."""
        return self._max_length

    @property
    def vocab_size(self) -> int:
        """Entries of the vocabulary, added tokens such as [DEC] included."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    @property
    def pad_token_id(self) -> int:
        """The id in the padding of `input_ids`."""
        return self._pad_token_id

    def encode(self, texts: Sequence[str]) -> TokenizedTexts:
        """Cleaned (`clean_caption`) and tokenised, T texts of L tokens at most. No texts give arrays of shape [0,0].

        A text of more than `max_length` tokens is truncated, [SEP] kept; the first time that this happens a
        `QpertWarning` says how many texts it was. Raises `TextError`, with the text's index, for what cannot be used.
        """
        if isinstance(texts, str):
            raise TextError(f"texts is the string {_shown(texts)}; expected a list of strings: put it in a list")
        cleaned = [clean_caption(text, name=f"text {index}") for index, text in enumerate(texts)]
        encodings = self._encode_cleaned(cleaned)
        self._warn_of_empty(texts, encodings)
        self._warn_once_of_truncation(encodings)
        return self._padded([encoding.ids for encoding in encodings])

    def _encode_cleaned(self, cleaned: list[str]) -> list[Encoding]:
        for index, text in enumerate(cleaned):
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise TextError(f"text {index} is {_shown(text)}: it holds lone surrogates, so it is not valid Unicode")
        return self._backend.encode_batch(cleaned)

    def _warn_of_empty(self, texts: Sequence[str], encodings: list[Encoding]) -> None:
        """Texts that give no token are encoded as [CLS] [SEP], as in LAVIS; only the first such call warns."""
        empty = [text for text, encoding in zip(texts, encodings, strict=True) if len(encoding.ids) <= 2]
        if empty and not self._empty_said:
            self._empty_said = True
            message = f"{len(empty)} of {len(texts)} texts hold no word, and are encoded as the empty text, as in LAVIS"
            warnings.warn(f"{message}: {_shown(empty[0])}", QpertWarning, stacklevel=3)

    def _warn_once_of_truncation(self, encodings: list[Encoding]) -> None:
        truncated = sum(bool(encoding.overflowing) for encoding in encodings)
        if truncated and not self._truncation_said:
            self._truncation_said = True
            warnings.warn(
                f"{truncated} of {len(encodings)} texts are longer than the limit of {self._max_length} tokens "
                "and were truncated (said once)",
                QpertWarning,
                stacklevel=3,
            )

    def _padded(self, ids: list[list[int]]) -> TokenizedTexts:
        length = max(map(len, ids), default=0)
        input_ids = np.full((len(ids), length), self.pad_token_id, np.int64)
        attention_mask = np.zeros((len(ids), length), np.int64)
        for row, tokens in enumerate(ids):
            input_ids[row, : len(tokens)] = tokens
            attention_mask[row, : len(tokens)] = 1
        return TokenizedTexts(input_ids, attention_mask)


def read_tokenizer_json(path: Path) -> Backend:
    """The `tokenizers.Tokenizer` of a `tokenizer.json`. Raises `InputError` if it is missing or unreadable."""
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read the tokenizer {path}: {error.strerror}; expected a tokenizer.json") from error
    except Exception as error:  # the Rust library raises bare Exception
        raise InputError(f"{path} is not a tokenizer.json that `tokenizers` can read: {error}") from error


def _shown(text: str) -> str:
    """At most 80 characters of a text, quoted so that odd characters can be seen."""
    return ascii(text) if len(text) <= 80 else ascii(text[:77]) + "…"
