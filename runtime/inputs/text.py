"""Captions to token ids: LAVIS's cleaning, then BERT WordPiece from the bundle's `tokenizer.json`.

Source: LAVIS `lavis/processors/blip_processors.py` (BlipCaptionProcessor.pre_caption) and
`lavis/models/blip2_models/blip2_qformer.py` (35 tokens at most, right padding).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
KINDS = ("wordpiece", "bpe", "sentencepiece")
CLEANINGS = ("lavis", "tokenizer")
"""Who cleans captions: `qpert.runtime.inputs.text.clean_caption`, or the normalisers in `tokenizer.json`."""
PADDINGS = ("longest", "max_length")
SIDES = ("right", "left")


@dataclass(frozen=True)
class TokenizerSpec:
    """How texts become token ids.

    `max_length`: tokens of the longest sequence, special ones included. `pad`: texts of a call are padded with `pad_id`
    to the longest of them, or always to `max_length`, on the side that `pad_side` names.
    """

    file: str
    max_length: int
    vocab_size: int
    kind: str = "wordpiece"
    clean: str = "lavis"
    pad: str = "longest"
    pad_id: int = 0
    pad_side: str = "right"

    def __post_init__(self) -> None:
        for name, choices in (("kind", KINDS), ("clean", CLEANINGS), ("pad", PADDINGS), ("pad_side", SIDES)):
            if getattr(self, name) not in choices:
                raise InputError(
                    f"tokenizer {name} is {getattr(self, name)!r}; expected one of {', '.join(choices)}",
                    code=f"tokenizer-{name}",
                )


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
        raise TextError(f"{name} is a {type(caption).__name__}; expected a string", code="text-kind")
    cleaned = _WHITESPACE_RUN.sub(" ", caption.lower().translate(_PUNCTUATION)).rstrip("\n").strip(" ")
    if not caption.strip():
        raise TextError(
            f"{name} is {_shown(caption)}, of which cleaning leaves nothing; expected at least one word",
            code="text-blank",
        )
    return " ".join(cleaned.split(" ")[:max_words])


@dataclass(frozen=True, eq=False)
class TokenizedTexts:
    """T texts as graphs take them, padded on the right: to the longest, L tokens, or to the tokenizer's full length.

    `input_ids` int64 [T,L], special tokens included. `attention_mask` int64 [T,L]: 1 for tokens, 0 for padding.
    `fixed_length`: the graphs want every text at full length, whatever its tokens. `length_step`: L is a
    multiple of it, up to the full length.
    """

    input_ids: npt.NDArray[np.int64]
    attention_mask: npt.NDArray[np.int64]
    fixed_length: bool = False
    length_step: int = 1

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """int64 [T]: tokens of each text, without padding."""
        return np.asarray(self.attention_mask.sum(axis=1), np.int64)

    def rows(self, index: npt.NDArray[np.int64]) -> TokenizedTexts:
        """Some of the texts, in that order, padded as before."""
        return replace(self, input_ids=self.input_ids[index], attention_mask=self.attention_mask[index])

    def trimmed(self, index: npt.NDArray[np.int64]) -> TokenizedTexts:
        """Some of the texts, in that order, cut to the longest of them where the length is free."""
        some = self.rows(index)
        length = some.input_ids.shape[1] if self.fixed_length else round_up(int(some.lengths.max()), self.length_step)
        ids, mask = some.input_ids[:, :length], some.attention_mask[:, :length]
        return replace(some, input_ids=np.ascontiguousarray(ids), attention_mask=np.ascontiguousarray(mask))


class Tokenizer:
    """Cleans and tokenises texts. Open one with `Tokenizer.open`."""

    def __init__(self, backend: Backend, spec: TokenizerSpec, *, length_step: int = 1) -> None:
        """`backend` is configured here: truncated at `spec.max_length` tokens (special ones included), not padded.

        `length_step`: texts are padded to the next multiple of it (at most `max_length`), so that graphs see few
        different lengths and texts of similar length can share a call. Padding is masked: it changes no result.
        """
        self.length_step = length_step
        self._special = int(backend.num_special_tokens_to_add(is_pair=False))
        length = spec.max_length
        if isinstance(length, bool) or not isinstance(length, int) or length <= self._special:
            raise InputError(
                f"max_length is {length!r}; expected at least {self._special + 1}: {self._special} special tokens and "
                "one of the text",
                code="tokenizer-max-length",
            )
        backend.no_padding()
        backend.enable_truncation(length)
        self._backend = backend
        self.spec = spec
        self._warned_of_truncation = False
        self._warned_of_empty = False

    @classmethod
    def open(cls, path: Path, spec: TokenizerSpec, *, length_step: int = 1) -> Tokenizer:
        """Reads a `tokenizer.json`.

        Truncation and padding settings inside the file are not used: `spec` decides.

        Raises:
            InputError: it is missing, unreadable, or not the tokenizer that `spec` describes.
        """
        backend = read_tokenizer_json(Path(path))
        largest = max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
        if largest >= spec.vocab_size or backend.id_to_token(spec.pad_id) is None:
            raise InputError(
                f"{path} has ids up to {largest} and {'a' if backend.id_to_token(spec.pad_id) else 'no'} token of id "
                f"{spec.pad_id} for padding; expected ids below {spec.vocab_size}, the rows of the word embeddings, "
                "the padding among them",
                code="tokenizer-vocabulary",
            )
        return cls(backend, spec, length_step=length_step)

    @property
    def max_length(self) -> int:
        """Tokens a text may have, special ones included."""
        return self.spec.max_length

    @property
    def vocab_size(self) -> int:
        """Entries of the vocabulary, added tokens such as [DEC] included."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    def encode(self, texts: Sequence[str]) -> TokenizedTexts:
        """Cleaned and tokenised, T texts of L tokens at most. No texts give arrays of shape [0,0].

        A text of more than `max_length` tokens is truncated, its special tokens kept; the first time that this happens
        a `QpertWarning` says how many texts it was. Raises `TextError`, with the text's index, for what cannot be used.
        """
        if isinstance(texts, str):
            raise TextError(
                f"texts is the string {_shown(texts)}; expected a list of strings: put it in a list", code="texts-one"
            )
        cleaned = [self._clean(text, f"text {index}") for index, text in enumerate(texts)]
        encodings = self._encode_cleaned(cleaned)
        self._warn_of_empty(texts, encodings)
        self._warn_once_of_truncation(encodings)
        return self._padded([encoding.ids for encoding in encodings])

    def _clean(self, text: str, name: str) -> str:
        if self.spec.clean == "lavis":
            return clean_caption(text, name=name)
        if not isinstance(text, str):
            raise TextError(f"{name} is a {type(text).__name__}; expected a string", code="text-type")
        if not text.strip():
            raise TextError(f"{name} is {_shown(text)}, which is blank; expected at least one word", code="text-blank")
        return text

    def _encode_cleaned(self, cleaned: list[str]) -> list[Encoding]:
        for index, text in enumerate(cleaned):
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise TextError(
                    f"text {index} is {_shown(text)}: it holds lone surrogates, so it is not valid Unicode; expected "
                    "text that was decoded from UTF-8",
                    code="text-surrogates",
                )
        return self._backend.encode_batch(cleaned)

    def _warn_of_empty(self, texts: Sequence[str], encodings: list[Encoding]) -> None:
        """Texts that give no token are encoded as special tokens alone, as LAVIS does; the first such call warns."""
        empty = [text for text, encoding in zip(texts, encodings, strict=True) if len(encoding.ids) <= self._special]
        if empty and not self._warned_of_empty:
            self._warned_of_empty = True
            message = f"{len(empty)} of {len(texts)} texts hold no word, and are encoded as the empty text, as in LAVIS"
            warnings.warn(f"{message}: {_shown(empty[0])}", QpertWarning, stacklevel=3)

    def _warn_once_of_truncation(self, encodings: list[Encoding]) -> None:
        truncated = sum(bool(encoding.overflowing) for encoding in encodings)
        if truncated and not self._warned_of_truncation:
            self._warned_of_truncation = True
            warnings.warn(
                f"{truncated} of {len(encodings)} texts are longer than the limit of {self.max_length} tokens and were "
                "truncated; further truncations are not reported",
                QpertWarning,
                stacklevel=3,
            )

    def _padded(self, ids: list[list[int]]) -> TokenizedTexts:
        fixed = self.spec.pad == "max_length"
        longest = max(map(len, ids), default=0)
        length = self.max_length if fixed and ids else min(round_up(longest, self.length_step), self.max_length)
        input_ids = np.full((len(ids), length), self.spec.pad_id, np.int64)
        attention_mask = np.zeros((len(ids), length), np.int64)
        for row, tokens in enumerate(ids):
            place = slice(0, len(tokens)) if self.spec.pad_side == "right" else slice(length - len(tokens), length)
            input_ids[row, place] = tokens
            attention_mask[row, place] = 1
        return TokenizedTexts(input_ids, attention_mask, fixed, self.length_step)


def round_up(length: int, step: int) -> int:
    """The next multiple of `step`."""
    return -(-length // step) * step


def read_tokenizer_json(path: Path) -> Backend:
    """The `tokenizers.Tokenizer` of a `tokenizer.json`. Raises `InputError` if it is missing or unreadable."""
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"cannot read the tokenizer {path}: {error.strerror}; expected a tokenizer.json",
            code="tokenizer-unreadable",
        ) from error
    except Exception as error:  # the Rust library raises bare Exception
        raise InputError(
            f"{path} is not a tokenizer.json that `tokenizers` can read: {error}", code="tokenizer-unreadable"
        ) from error


def _shown(text: str) -> str:
    """At most 80 characters of a text, quoted so that odd characters can be seen."""
    return ascii(text) if len(text) <= 80 else ascii(text[:77]) + "…"
