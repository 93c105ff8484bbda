"""SigLIP's tokenizers from a Hugging Face folder: SentencePiece for SigLIP, Gemma's BPE for SigLIP 2.

Texts are always padded to one length, and padding matters: the tower has no mask and reads the last position.

Sources: transformers `tokenization_siglip.py`, `tokenization_siglip2.py`, `tokenization_gemma.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qpert.exporter.families.siglip.sentencepiece import SentencePieceModel, read_sentencepiece
from qpert.exporter.hub.tokenizer_files import (
    HubTokenizer,
    TokenizerFiles,
    add_tokens,
    check_fits,
    max_length,
    read_tokenizer_files,
    token_id,
    unsupported,
)
from qpert.graphs.families.siglip.config import SiglipConfig
from qpert.runtime.errors import CheckpointError

if TYPE_CHECKING:
    from tokenizers import Tokenizer, normalizers

SENTENCEPIECE_NAMED = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
GEMMA_NAMED = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"}
CLASSES = ("SiglipTokenizer", "Siglip2Tokenizer", "GemmaTokenizer")
DEFAULT_LENGTH = 64

SPACE = "▁"
CASED = r"[\p{Cased}&&\P{Case_Ignorable}]"
FINAL_SIGMA = rf"(?<={CASED}\p{{Case_Ignorable}}*)Σ(?!\p{{Case_Ignorable}}*{CASED})"
"""Where Python's `str.lower` writes ς (Unicode's Final_Sigma), which the `tokenizers` package does not know."""
PUNCTUATION = r"[!-/:-@\[-`{-~]"
"""Python's `string.punctuation`: ASCII alone."""
INVISIBLE = "[\u200b\u200c\u200e\u200f\ufeff\ufffd]"
"""Characters that SentencePiece's nmt_nfkc treats as a space and Python does not."""
WHITESPACE = r"[\s\x1c-\x1f]+"
"""What Python's `\\s` matches. The four control characters are not white space in Unicode."""


def build_tokenizer(folder: Path, config: SiglipConfig) -> HubTokenizer:
    """The tokenizer of `folder`, of the class that `tokenizer_config.json` names (SiglipTokenizer if it names none).

    Raises:
        CheckpointError: another class, a missing or unreadable vocabulary, a setting that cannot be honoured, or ids
            that exceed the token embedding.
    """
    settings = read_tokenizer_files(folder, {}).settings
    kind = str(settings.get("tokenizer_class") or CLASSES[0]).removesuffix("Fast")
    if kind not in CLASSES:
        raise CheckpointError(
            f"{folder}/tokenizer_config.json has tokenizer_class {kind!r}; supported are {', '.join(CLASSES)}",
            code="tokenizer-unsupported",
        )
    built = _sentencepiece(folder, config) if kind == CLASSES[0] else _gemma(folder, config, kind)
    check_fits(built.backend, config.text.vocab_size, folder)
    return built


def _finished(
    backend: Tokenizer,
    folder: Path,
    files: TokenizerFiles,
    positions: int,
    *,
    kind: str,
    cleaning: str,
    default_side: Literal["left", "right"],
) -> HubTokenizer:
    """Add truncation and padding to one length."""
    length = max_length(files, positions, DEFAULT_LENGTH)
    pad = token_id(backend, files, "pad_token", folder)
    eos = token_id(backend, files, "eos_token", folder)
    side = files.settings.get("padding_side", default_side)
    if side not in ("left", "right"):
        raise unsupported(folder, "padding_side", side)
    backend.enable_truncation(length)
    pad_token = files.named["pad_token"].content
    backend.enable_padding(direction=side, pad_id=pad, pad_token=pad_token, length=length)
    bos = backend.token_to_id(files.named["bos_token"].content) if "bos_token" in files.named else None
    return HubTokenizer(backend, kind, cleaning, length, "max_length", pad, side, bos, eos)


# SigLIP: Unigram.


def _sentencepiece(folder: Path, config: SiglipConfig) -> HubTokenizer:
    from tokenizers import pre_tokenizers

    files = read_tokenizer_files(folder, SENTENCEPIECE_NAMED)
    if files.settings.get("sp_model_kwargs"):
        raise unsupported(folder, "sp_model_kwargs", files.settings["sp_model_kwargs"])
    path = folder / "spiece.model"
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no spiece.model, which the stock SiglipTokenizer requires; download the whole folder",
            code="hub-file-missing",
        )
    model = read_sentencepiece(path)
    named = [token.content for token in files.named.values()]
    backend = _unigram(model, {*named, *(token.content for token in files.added.values())})
    lower = bool(files.settings.get("do_lower_case", True))
    backend.normalizer = _cleaning(lower, model.charsmap)
    # Only the text's first piece gets a ▁: the stock class writes it before the text, then splits at special tokens.
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="first", split=False)
    add_tokens(backend, _stripping(files))
    eos = token_id(backend, files, "eos_token", folder)
    _frame(backend, files.named["eos_token"].content, eos)
    cleaning = ("lower case, " if lower else "") + "no ASCII punctuation, white space runs to one space, NFKC"
    return _finished(
        backend,
        folder,
        files,
        config.text.max_positions,
        kind="siglip-sentencepiece",
        cleaning=cleaning,
        default_side="right",
    )


def _unigram(model: SentencePieceModel, kept: set[str]) -> Tokenizer:
    """A Unigram backend that never matches pieces that SentencePiece skips.

    Unless they are added tokens, such pieces get a space before their text. Cleaned texts have ▁ instead of spaces, so
    they do not match."""
    from tokenizers import Tokenizer, decoders
    from tokenizers.models import Unigram

    pieces = [
        (f" {text}" if model.hidden(kind) and text not in kept else text, score) for text, score, kind in model.pieces
    ]
    backend = Tokenizer(Unigram(pieces, model.unknown_id, byte_fallback=model.byte_fallback))
    backend.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme="first", split=False)
    return backend


def _stripping(files: TokenizerFiles) -> TokenizerFiles:
    """Like the stock class, let named tokens given as plain strings absorb the white space around them."""
    from tokenizers import AddedToken

    known = {token.content for token in files.added.values()}
    named = {
        name: token
        if token.content in known
        else AddedToken(token.content, lstrip=True, rstrip=True, normalized=False, special=True)
        for name, token in files.named.items()
    }
    return TokenizerFiles(files.settings, named, files.added, files.json)


def _cleaning(lower: bool, charsmap: bytes) -> normalizers.Normalizer:
    """`canonicalize_text`, then SentencePiece's own normaliser.

    Punctuation at the start becomes a space, because the ▁ before a text is only written if a piece begins at the
    text's first character. In one case ids therefore differ from the stock class's, by an extra ▁: after the literal
    text of a special token (`</s>`, `<unk>`) that is followed by punctuation.

    `Precompiled` loses marks that combine with a character that its table maps, so NFKC runs before it. NFKC sorts and
    composes several marks on one letter, which SentencePiece does not: a second difference.
    """
    from tokenizers import Regex, normalizers

    steps: list[normalizers.Normalizer] = [normalizers.Replace(SPACE, " ")]
    if lower:
        steps += [normalizers.Replace(Regex(FINAL_SIGMA), "ς"), normalizers.Lowercase()]
    steps += [
        normalizers.Replace(Regex(rf"\A{PUNCTUATION}+"), " "),
        normalizers.Replace(Regex(PUNCTUATION), ""),
        normalizers.Replace(Regex(WHITESPACE), " "),
        normalizers.Strip(left=False, right=True),
        normalizers.Replace(Regex(INVISIBLE), " "),
        normalizers.NFKC(),
        normalizers.Precompiled(charsmap),
        normalizers.Replace(Regex(" {2,}"), " "),
        normalizers.Strip(left=False, right=True),
    ]
    return normalizers.Sequence(steps)


def _frame(backend: Tokenizer, end: str, eos: int) -> None:
    from tokenizers.processors import TemplateProcessing

    backend.post_processor = TemplateProcessing(
        single=["$A", end], pair=["$A", end, "$B:1", f"{end}:1"], special_tokens=[(end, eos)]
    )


# SigLIP 2: Gemma's BPE.


def _gemma(folder: Path, config: SiglipConfig, kind: str) -> HubTokenizer:
    """`Siglip2Tokenizer` is `GemmaTokenizer` with lower-casing. The frame comes from `tokenizer.json`."""
    from tokenizers import Tokenizer, normalizers, pre_tokenizers

    files = read_tokenizer_files(folder, GEMMA_NAMED)
    path = folder / "tokenizer.json"
    if files.json is None:
        raise CheckpointError(f"{folder} has no tokenizer.json; download the whole folder", code="hub-file-missing")
    backend = Tokenizer(_gemma_model(path, files.json, files.named["unk_token"].content))
    spaces = normalizers.Replace(" ", SPACE)
    lower = kind == "Siglip2Tokenizer"
    backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), spaces]) if lower else spaces
    backend.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    frame = _frame_of(path)
    if frame is not None:
        backend.post_processor = frame
    add_tokens(backend, files)
    return _finished(
        backend,
        folder,
        files,
        config.text.max_positions,
        kind="gemma-bpe",
        cleaning="lower case" if lower else "none",
        default_side="left",
    )


def _gemma_model(path: Path, values: Mapping[str, Any], unknown: str) -> Any:
    from tokenizers.models import BPE

    model = values.get("model") or {}
    try:
        merges = [(a, b) for a, b in (m.split(" ") if isinstance(m, str) else m for m in model["merges"])]
        return BPE(
            vocab=model["vocab"], merges=merges, fuse_unk=True, unk_token=unknown, dropout=None, byte_fallback=True
        )
    except Exception as error:  # the Rust library raises bare Exception
        raise CheckpointError(
            f"{path} cannot be read as Gemma's BPE ({error}); download it again", code="tokenizer-file"
        ) from error


def _frame_of(path: Path) -> Any:
    from qpert.runtime.inputs.text import read_tokenizer_json

    return read_tokenizer_json(path).post_processor
