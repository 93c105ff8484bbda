"""Reads `spiece.model`, a SentencePiece model, without the sentencepiece package.

The file is one protocol buffer (google/sentencepiece, `sentencepiece_model.proto`); `protobuf` comes with onnx.
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from qpert.runtime.errors import CheckpointError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Kinds of pieces."""
UNIGRAM = 1
NORMALIZER = "nmt_nfkc"
"""SentencePiece's default, and T5's, whose vocabularies SigLIP uses. Others treat the ▁ before a text
differently."""

STRING, FLOAT, INT32, BOOL, ENUM, BYTES, MESSAGE = 9, 2, 5, 8, 5, 12, 11  # FieldDescriptorProto.Type; enums as int32
OPTIONAL, REPEATED = 1, 3
FIELDS: dict[str, tuple[tuple[str, int, int, int, str], ...]] = {
    "Piece": (
        ("piece", 1, STRING, OPTIONAL, ""),
        ("score", 2, FLOAT, OPTIONAL, ""),
        ("type", 3, ENUM, OPTIONAL, "1"),
    ),
    "Trainer": (
        ("model_type", 3, ENUM, OPTIONAL, "1"),
        ("treat_whitespace_as_suffix", 24, BOOL, OPTIONAL, "false"),
        ("byte_fallback", 35, BOOL, OPTIONAL, "false"),
    ),
    "Normalizer": (
        ("name", 1, STRING, OPTIONAL, ""),
        ("precompiled_charsmap", 2, BYTES, OPTIONAL, ""),
        ("add_dummy_prefix", 3, BOOL, OPTIONAL, "true"),
        ("remove_extra_whitespaces", 4, BOOL, OPTIONAL, "true"),
        ("escape_whitespaces", 5, BOOL, OPTIONAL, "true"),
    ),
    "Model": (
        ("pieces", 1, MESSAGE, REPEATED, "Piece"),
        ("trainer_spec", 2, MESSAGE, OPTIONAL, "Trainer"),
        ("normalizer_spec", 3, MESSAGE, OPTIONAL, "Normalizer"),
    ),
}
"""Name, number, type, label, and default or message type of the fields that are used here."""


@dataclass(frozen=True)
class SentencePieceModel:
    """Pieces in id order as (text, score, kind), the normaliser's compiled table, and whether a character without a
    piece becomes byte pieces instead of the unknown one."""

    pieces: tuple[tuple[str, float, int], ...]
    charsmap: bytes
    byte_fallback: bool

    def hidden(self, kind: int) -> bool:
        """Whether captions never contain pieces of this kind: SigLIP's cleaning removes the punctuation of user-defined
        ones (mT5's `<extra_id_0>`), and SentencePiece itself skips the others."""
        return kind in (CONTROL, UNUSED, USER_DEFINED)

    @property
    def unknown_id(self) -> int:
        return next(i for i, (_, _, kind) in enumerate(self.pieces) if kind == UNKNOWN)


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Read a Unigram model like SigLIP's.

    Raises:
        CheckpointError: missing or not a SentencePiece model (`tokenizer-file`), or of another kind
            (`tokenizer-unsupported`, with the setting's name).
    """
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    model = _message_class()()
    try:
        model.ParseFromString(path.read_bytes())
    except (OSError, DecodeError) as error:
        raise CheckpointError(
            f"{path} cannot be read as a SentencePiece model ({error}); download it again", code="tokenizer-file"
        ) from error
    pieces = tuple((piece.piece, float(piece.score), int(piece.type)) for piece in model.pieces)
    if sum(kind == UNKNOWN for _, _, kind in pieces) != 1:
        raise CheckpointError(
            f"{path} is not a SentencePiece model: it must have exactly one unknown piece among its {len(pieces)}; "
            "download it again",
            code="tokenizer-file",
        )
    _check_supported(path, model)
    charsmap = bytes(model.normalizer_spec.precompiled_charsmap)
    return SentencePieceModel(pieces, charsmap, bool(model.trainer_spec.byte_fallback))


def _check_supported(path: Path, model: Any) -> None:
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    found = {
        "model_type": (trainer.model_type, UNIGRAM),
        "treat_whitespace_as_suffix": (trainer.treat_whitespace_as_suffix, False),
        "normalizer": (normalizer.name, NORMALIZER),
        "remove_extra_whitespaces": (normalizer.remove_extra_whitespaces, True),
        "escape_whitespaces": (normalizer.escape_whitespaces, True),
    }
    wrong = [f"{name} {got!r} (expected {expected!r})" for name, (got, expected) in found.items() if got != expected]
    plain = [p.piece for p in model.pieces if p.type == USER_DEFINED and not set(p.piece) & set(string.punctuation)]
    if plain:
        wrong.append(f"user-defined pieces that may occur in captions, such as {plain[0]!r}")
    if wrong:
        raise CheckpointError(
            f"{path} is not a SentencePiece model of SigLIP's kind: {'; '.join(wrong)}",
            code="tokenizer-unsupported",
        )


@cache
def _message_class() -> Any:
    """The message class of a model file. The parser skips undeclared fields."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory  # type: ignore[import-untyped]

    file = descriptor_pb2.FileDescriptorProto(name="qpert_sentencepiece.proto", package="qpert", syntax="proto2")
    for message, fields in FIELDS.items():
        declared = file.message_type.add(name=message)
        for name, number, kind, label, detail in fields:
            field = declared.field.add(name=name, number=number, type=kind, label=label)  # type: ignore[arg-type]
            if kind == MESSAGE:
                field.type_name = f".qpert.{detail}"
            elif detail:
                field.default_value = detail
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("qpert.Model"))
