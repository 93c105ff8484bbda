"""`tokenizer.json` that gives the runtime's ids of a caption as it was typed: it cleans, cuts and frames by itself.

Source of the rules: `qpert.runtime.inputs.text`. The runtime cleans in Python and sets truncation and padding by the
manifest, so it gives the same ids with this file as with one that does neither.

What the format cannot do is raise the runtime's errors (blank text, lone surrogates).
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from qpert.runtime.inputs.text import TokenizerSpec

if TYPE_CHECKING:
    from tokenizers import Tokenizer

WORDS = 50
"""`max_words` of `clean_caption`."""
CASED = r"[\p{Lu}\p{Ll}\p{Lt}ªºⅠ-ⅿⒶ-ⓩ🄰-🅉🅐-🅩🅰-🆉]"
"""Cased letters that are not case-ignorable, as Unicode defines both (modifier letters, for one, are ignorable)."""
FINAL_SIGMA = rf"(?<={CASED}\p{{Case_Ignorable}}*)Σ(?!\p{{Case_Ignorable}}*{CASED})"
"""A capital sigma at the end of a word: behind a cased letter and before none, signs between them not counted (Unicode
3.13, Final_Sigma, as in `str.lower`). `tokenizers` lowers letter by letter, and would make σ of it."""
PUNCTUATION = '[.!"()*#:;~]'
WHITESPACE_RUN = r"[\s\x1c-\x1f]{2,}"
"""Python counts the separators U+001C to U+001F as whitespace, Unicode does not."""
FURTHER_WORDS = rf"\A(?:[^ ]* ){{{WORDS - 1}}}[^ ]*\K [\s\S]*\z"


def self_contained(tokenizer: Tokenizer, spec: TokenizerSpec) -> Tokenizer:
    """A tokenizer that does what the runtime does around `tokenizer`, as `spec` says."""
    from tokenizers import Tokenizer as Backend

    document = json.loads(tokenizer.to_str())
    if spec.clean == "lavis":
        add_cleaning(document, spec.max_length)
        hide_special_tokens(document)
    made = Backend.from_str(json.dumps(document))
    made.enable_truncation(spec.max_length)
    if spec.pad == "max_length":
        token = made.id_to_token(spec.pad_id)
        made.enable_padding(direction=spec.pad_side, pad_id=spec.pad_id, pad_token=token, length=spec.max_length)
    return made


def add_cleaning(document: dict[str, Any], max_length: int) -> None:
    """Put `clean_caption` before the file's own normaliser."""
    steps = [replace(FINAL_SIGMA, "ς"), {"type": "Lowercase"}, replace(PUNCTUATION, " "), replace(WHITESPACE_RUN, " ")]
    if max_length > WORDS:  # else as many words are more tokens than are kept
        steps += [replace(r"\n+\z", ""), replace(r"\A +| +\z", ""), replace(FURTHER_WORDS, "")]
    own = document["normalizer"]
    document["normalizer"] = {"type": "Sequence", "normalizers": [*steps, *([own] if own else [])]}


def replace(pattern: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}


def hide_special_tokens(document: dict[str, Any]) -> None:
    """Make ordinary entries of the vocabulary of special tokens with capitals.

    `[CLS]` in a caption would be taken for the token before anything is cleaned. The runtime lowers captions first, so
    it never finds one there. The frame names them by id.
    """
    hidden = [t for t in document["added_tokens"] if not t["normalized"] and t["content"] != t["content"].lower()]
    document["added_tokens"] = [token for token in document["added_tokens"] if token not in hidden]
    vocabulary = document["model"]["vocab"]
    for token in hidden:
        vocabulary.setdefault(token["content"], token["id"])
