"""CLIP's byte-level BPE from a Hugging Face folder, with the ids of the stock `CLIPTokenizer`.

The stock class takes only the vocabulary, the merges and the added tokens from the files; it cleans and splits in its
own way and ignores `tokenizer.json` there. It differs from OpenAI's and open_clip's tokenizers in cleaning: NFC instead
of ftfy and HTML unescaping.

Source: transformers `tokenization_clip.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from qpert.graphs.families.clip.config import LEGACY_EOS, ClipConfig
from qpert.runtime.errors import CheckpointError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
NAMED = {"unk_token": END, "bos_token": START, "eos_token": END, "pad_token": END}
CLEANING = "NFC, whitespace runs to one space, lower case"
WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"  # as stock splits
)


def build_tokenizer(folder: Path, config: ClipConfig) -> HubTokenizer:
    """The tokenizer of `folder`: `tokenizer.json`, or `vocab.json` and `merges.txt`.

    Raises:
        CheckpointError: the vocabulary is missing, unreadable or not BPE; a setting cannot be honoured; ids exceed the
            token embedding; or the text tower would not find the end of text.
    """
    files = read_tokenizer_files(folder, NAMED)
    if files.settings.get("padding_side", "right") != "right":  # it would move texts to other positions
        raise unsupported(folder, "padding_side", files.settings["padding_side"])
    backend = _backend(folder, files)
    add_tokens(backend, files)
    bos, eos, pad = (token_id(backend, files, name, folder) for name in ("bos_token", "eos_token", "pad_token"))
    check_fits(backend, config.text.vocab_size, folder)
    _check_end(folder, backend, config, eos)
    length = max_length(files, config.text.max_positions)
    _frame(backend, files, bos, eos)
    backend.enable_truncation(length)
    backend.enable_padding(pad_id=pad, pad_token=files.named["pad_token"].content)
    return HubTokenizer(backend, "clip-bpe", CLEANING, length, "longest", pad, "right", bos, eos)


def _backend(folder: Path, files: TokenizerFiles) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import BPE

    vocabulary, merges = _from_json(folder, files.json) if files.json is not None else _from_text(folder)
    try:
        model = BPE(
            vocab=vocabulary,
            merges=merges,
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            unk_token=files.named["unk_token"].content,
        )
    except Exception as error:  # the Rust library raises bare Exception
        raise _unreadable(folder, str(error)) from error
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    split = pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = decoders.ByteLevel()
    return backend


def _from_json(folder: Path, values: Any) -> tuple[dict[str, int], list[tuple[str, str]]]:
    model = values.get("model") or {}
    if model.get("type", "BPE") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise _unreadable(folder, f"tokenizer.json holds a {model.get('type')!r} model, expected BPE")
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges", []))
    try:
        return model["vocab"], [(left, right) for left, right in pairs]
    except (TypeError, ValueError) as error:
        raise _unreadable(folder, "tokenizer.json has a merge that is not a pair") from error


def _from_text(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    from tokenizers.models import BPE

    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    if not (vocabulary.is_file() and merges.is_file()):
        raise CheckpointError(
            f"{folder} has neither tokenizer.json nor vocab.json and merges.txt; download the whole folder",
            code="hub-file-missing",
        )
    try:
        read: tuple[dict[str, int], list[tuple[str, str]]] = BPE.read_file(str(vocabulary), str(merges))
    except Exception as error:  # the Rust library raises bare Exception
        raise _unreadable(folder, str(error)) from error
    return read


def _check_end(folder: Path, backend: Tokenizer, config: ClipConfig, eos: int) -> None:
    """The text tower pools at the first `eos_token_id`, or at the largest id: either must be the end of text."""
    if config.eos_token_id != LEGACY_EOS:
        if config.eos_token_id != eos:
            raise CheckpointError(
                f"config.json pools texts at id {config.eos_token_id}, but the tokenizer in {folder} ends them with "
                f"{eos}; the two belong to different models, download the folder again",
                code="tokenizer-end-of-text",
            )
        return
    largest = max(backend.get_vocab(with_added_tokens=True).values())
    if largest != eos:
        raise CheckpointError(
            f"config.json has the old eos_token_id {LEGACY_EOS}, which pools texts at their largest id, but the "
            f"tokenizer in {folder} has ids above the end of text ({largest} > {eos}); set eos_token_id to {eos}",
            code="tokenizer-end-of-text",
        )


def _frame(backend: Tokenizer, files: TokenizerFiles, bos: int, eos: int) -> None:
    from tokenizers.processors import TemplateProcessing

    start, end = files.named["bos_token"].content, files.named["eos_token"].content
    backend.post_processor = TemplateProcessing(
        single=[start, "$A", end],
        pair=[start, "$A", end, "$B:1", f"{end}:1"],
        special_tokens=[(start, bos), (end, eos)],
    )


def _unreadable(folder: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"the vocabulary in {folder} cannot be read ({what}); expected CLIP's byte-level BPE: download it again",
        code="tokenizer-file",
    )
