"""open_clip's `SimpleTokenizer`, CLIP's byte-level BPE, as one `tokenizer.json` that also cleans.

Stock cleans with ftfy and unescapes HTML before it lowers. The steps of ftfy 6.3 that change single characters or fixed
sequences are normalisers of the file, and so are HTML 4's named entities and the common numbered ones. Two of stock's
steps cannot be: repair of text that was decoded with the wrong encoding (mojibake), and the rarer HTML entities
(`OMITTED`).

Source: open_clip 3.3.0 `tokenizer.py`, ftfy 6.3.1 `fixes.py` and `chardata.py`.
"""

from __future__ import annotations

import gzip
import unicodedata
from functools import cache
from html.entities import name2codepoint
from pathlib import Path
from typing import TYPE_CHECKING

from qpert.exporter.host_graphs.tokenizer import FINAL_SIGMA
from qpert.exporter.hub.tokenizer_files import HubTokenizer
from qpert.graphs.families.coca.config import CocaConfig
from qpert.graphs.families.coca.model import PADDING
from qpert.runtime.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer, normalizers

START, END = "<start_of_text>", "<end_of_text>"
MERGES = Path(__file__).with_name("merges.txt")
"""CLIP's merges, which open_clip carries too (see MERGES.md)."""
MERGE_COUNT = 48_894
"""Of the 262,144 lines of CLIP's file, those that are used."""
CLEANING = "ftfy without mojibake repair, common HTML entities, whitespace runs to one space, lower case"
OMITTED = "texts with mojibake, or with rare HTML entities, get other ids than from open_clip's own tokenizer"

SPECIAL = "<(?:start|end)_of_text>"
IOTA = "\u0345"
"""The combining iota, the one sign that is another case of a letter: stock's pattern, which ignores case, drops it."""
WORDS = rf"(?i:{SPECIAL}|'s|'t|'re|'ve|'m|'ll|'d)|[\p{{L}}]+|[\p{{N}}]|[^\s\p{{L}}\p{{N}}{IOTA}]+"
SIGN = r"[^\s\p{L}\p{N}]"


def build_tokenizer(config: CocaConfig, asked: str | None = None, *, check: bool = True) -> HubTokenizer:
    """The tokenizer of a CoCa model, which has no vocabulary of its own.

    `asked`: `--tokenizer`, a file of merges in CLIP's form, `.txt` or `.txt.gz`; None is CLIP's. `check`: compare with
    the token embedding.

    Raises:
        InputError: the file cannot be used, or its ids exceed the token embedding.
    """
    path = MERGES if asked is None else Path(asked)
    backend = _backend(read_merges(path))
    rows, size = config.text.vocab_size, backend.get_vocab_size(with_added_tokens=True)
    if check and size > rows:
        raise InputError(
            f"{path} makes {size:,} tokens, but text.token_embedding.weight has {rows:,} rows; pass the merges that "
            "the checkpoint was trained with as --tokenizer FILE.txt",
            code="tokenizer-vocabulary",
        )
    length = config.text.max_positions
    bos, eos = backend.token_to_id(START), backend.token_to_id(END)
    return HubTokenizer(backend, "clip-bpe", CLEANING, length, "longest", PADDING, "right", bos, eos)


def read_merges(path: Path) -> list[tuple[str, str]]:
    """Merges, best first: a line of the version, then two pieces a line; what follows the first 48,894 is not used."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        lines = raw.decode("utf-8").split("\n")[1 : MERGE_COUNT + 1]
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InputError(
            f"--tokenizer {path} cannot be read ({error}); expected a file of merges in CLIP's form, "
            "bpe_simple_vocab_16e6.txt.gz for instance",
            code="tokenizer-file",
        ) from error
    pairs = [tuple(line.split()) for line in lines if line.strip()]
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise InputError(
            f"--tokenizer {path} is not a file of merges, two pieces a line after the first line; CoCa needs one in "
            "CLIP's form: leave the option out for CLIP's own",
            code="tokenizer-file",
        )
    return [(left, right) for left, right in pairs]


def byte_letters() -> list[str]:
    """The letter of each byte in CLIP's order: printable bytes first, as themselves, then the others as U+0100 and on.

    Source: openai/CLIP and GPT-2, `bytes_to_unicode`.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [*map(chr, printable), *(chr(0x100 + number) for number in range(256 - len(printable)))]


def _backend(merges: list[tuple[str, str]]) -> Tokenizer:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from tokenizers.processors import TemplateProcessing

    letters = byte_letters()
    pieces = [*letters, *(letter + "</w>" for letter in letters), *(left + right for left, right in merges)]
    vocabulary = {piece: number for number, piece in enumerate([*pieces, START, END])}
    backend = Tokenizer(BPE(vocab=vocabulary, merges=merges, end_of_word_suffix="</w>"))
    backend.normalizer = cleaning()
    split = pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    # Stock finds special tokens in the lowered text, hence `normalized`.
    backend.add_special_tokens([AddedToken(token, normalized=True, special=True) for token in (START, END)])
    backend.post_processor = TemplateProcessing(
        single=[START, "$A", END],
        pair=[START, "$A", END, "$B:1", f"{END}:1"],
        special_tokens=[(token, vocabulary[token]) for token in (START, END)],
    )
    return backend


def cleaning() -> normalizers.Normalizer:
    """`_clean_lower` of open_clip."""
    from tokenizers import Regex, normalizers

    steps: list[normalizers.Normalizer] = [
        normalizers.Replace(old, new) for old, new in (*widths(), *LIGATURES.items())
    ]
    steps += [normalizers.Replace(Regex(pattern), new) for pattern, new in (*entities(), *SEQUENCES)]
    steps += [normalizers.Replace(old, new) for old, new in c1_controls()]
    steps += [normalizers.Replace(Regex(pattern), new) for pattern, new in CHARACTERS]
    steps.append(normalizers.NFC())
    steps += [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    steps += [normalizers.Replace(Regex(FINAL_SIGMA), "ς"), normalizers.Lowercase()]
    steps += [normalizers.Replace(Regex(pattern), "< ") for pattern in HIDDEN]
    return normalizers.Sequence(steps)


HIDDEN = (
    rf"(?<={SIGN})(?<!<start_of_text>)(?<!<end_of_text>)<(?=(?:start|end)_of_text>)",
    r"(?<=< start_of_text>|< end_of_text>)<(?=(?:start|end)_of_text>)",
)
"""Names of special tokens behind a sign: stock's pattern takes their "<" with the signs before it, so they are text. A
space behind it changes no word, and hides the name from the added tokens."""

SEQUENCES = ((r"\x1b\[[0-9;]*[a-zA-Z]", ""),)
"""Terminal escapes."""

CHARACTERS = (
    ("[\u02bc\u2018-\u201b]", "'"),
    ("[\u201c-\u201f]", '"'),
    (r"[\x00-\x08\x0b\x0e-\x1f\x7f\u206a-\u206f\ufeff\ufff9-\ufffc]", ""),
)
"""Curly quotes become straight, control characters go. Line breaks need nothing: all of them are whitespace."""

LIGATURES = {
    **{"Ĳ": "IJ", "ĳ": "ij", "ŉ": "ʼn", "ﬀ": "ff", "ﬁ": "fi", "ﬂ": "fl", "ﬃ": "ffi", "ﬄ": "ffl", "ﬅ": "ſt", "ﬆ": "st"},
    **{"Ǳ": "DZ", "ǲ": "Dz", "ǳ": "dz", "Ǆ": "DŽ", "ǅ": "Dž", "ǆ": "dž"},
    **{"Ǉ": "LJ", "ǈ": "Lj", "ǉ": "lj", "Ǌ": "NJ", "ǋ": "Nj", "ǌ": "nj"},
}


TYPOGRAPHIC = tuple(map(ord, "\u00a0–—‘’“”•…"))


def widths() -> list[tuple[str, str]]:
    """Full-width and half-width forms, and their usual ones."""
    forms = [chr(code) for code in (0x3000, *range(0xFF01, 0xFFF0))]
    usual = [(form, unicodedata.normalize("NFKC", form)) for form in forms]
    return [(form, plain) for form, plain in usual if plain != form]


def c1_controls() -> list[tuple[str, str]]:
    """Controls U+0080 to U+009F, which were meant as bytes of Windows-1252."""
    bytes_ = [bytes([code]) for code in range(0x80, 0xA0)]
    read = [(byte.decode("latin-1"), byte.decode("cp1252", errors="replace")) for byte in bytes_]
    return [(control, meant) for control, meant in read if meant != "\ufffd"]


@cache
def entities() -> tuple[tuple[str, str], ...]:
    """HTML 4's named entities, and numbered ones of ASCII signs and `TYPOGRAPHIC`, as patterns. "&" is first, as stock
    unescapes what it has unescaped."""
    named = {name: code for name, code in name2codepoint.items() if name != "amp"}
    codes = (*range(0x21, 0x30), *range(0x3A, 0x41), *range(0x5B, 0x61), *range(0x7B, 0x7F), *TYPOGRAPHIC)
    first = (r"&(?:(?:amp|AMP|#0*38|#[xX]0*26);)+", "&")
    numbers = [(rf"&#(?:0*{code}(?![0-9])|[xX]0*(?i:{code:x})(?![0-9a-fA-F]));?", chr(code)) for code in codes]
    return (first, *((f"&{name};", chr(code)) for name, code in named.items()), *numbers)
