"""SigLIP's tokenizers against the stock ones: SentencePiece as recorded (fixtures/siglip/record.py), BPE live."""

import json
import re
import shutil
import unicodedata
from itertools import pairwise
from pathlib import Path

import pytest
from hostile_captions import PIECES, SPECIAL, hostile_captions
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import GemmaTokenizer, Siglip2Tokenizer

from qpert.exporter.families.siglip.sentencepiece import (
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    read_sentencepiece,
)
from qpert.exporter.families.siglip.tokenizer import build_tokenizer
from qpert.graphs.families.siglip.config import SiglipConfig
from qpert.graphs.transformer import TextConfig, VisionConfig
from qpert.runtime.errors import CheckpointError

FIXTURES = Path(__file__).parents[2] / "fixtures" / "siglip"
LENGTH = 64
DEPARTURE = re.compile(r"(</s>|<unk>)\s*[!-/:-@\[-`{-~]")
"""A literal special token that punctuation follows."""


def stacks_marks(caption):
    """Whether a letter carries two combining marks, which NFKC sorts and composes and SentencePiece does not."""
    decomposed = unicodedata.normalize("NFKD", caption.lower())
    return any(unicodedata.combining(a) and unicodedata.combining(b) for a, b in pairwise(decomposed))


def config_for(rows, positions=LENGTH):
    encoder = (24, 1, 2, 8, "gelu", 1e-6)
    return SiglipConfig("t", VisionConfig(*encoder, 14, 7), TextConfig(*encoder, rows, positions))


def recorded(name):
    rows = json.loads((FIXTURES / "captions.json").read_text(encoding="utf-8"))[name]
    return [caption for caption, _ in rows], [ids + [1] * (LENGTH - len(ids)) for _, ids in rows]


@pytest.fixture
def folder(tmp_path):
    shutil.copy(FIXTURES / "spiece.model", tmp_path)
    return tmp_path


def encoded(tokenizer, captions):
    return [encoding.ids for encoding in tokenizer.encode_batch(captions)]


def test_sentencepiece_ids_equal_the_stock_tokenizers_on_a_thousand_captions(folder):
    captions, expected = recorded("plain")
    assert len(captions) == 1000
    got = encoded(build_tokenizer(folder, config_for(400)).backend, captions)
    wrong = [caption for caption, a, b in zip(captions, got, expected, strict=True) if a != b]
    assert all(stacks_marks(caption) for caption in wrong)
    assert len(wrong) <= 2


def test_the_file_alone_cleans_frames_truncates_and_pads(folder):
    captions, expected = recorded("plain")
    again = Tokenizer.from_str(build_tokenizer(folder, config_for(400)).backend.to_str())
    assert encoded(again, captions[:200]) == expected[:200]


def test_literal_special_tokens_differ_only_where_punctuation_follows_them(folder):
    captions, expected = recorded("special")
    got = encoded(build_tokenizer(folder, config_for(400)).backend, captions)
    wrong = [caption for caption, a, b in zip(captions, got, expected, strict=True) if a != b]
    assert all(DEPARTURE.search(caption) or stacks_marks(caption) for caption in wrong)
    literal = [c for c in captions if re.search(r"</s>|<unk>", c) and not DEPARTURE.search(c)]
    assert len(literal) > 20, "captions without the departure must be among them"


def test_facts_of_siglip(folder):
    tokenizer = build_tokenizer(folder, config_for(400))
    assert (tokenizer.pad_to, tokenizer.max_length, tokenizer.pad_side) == ("max_length", 64, "right")
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id) == (1, 1, None)
    assert tokenizer.backend.encode("").ids == [1] * 64


def test_the_published_settings_change_nothing(folder):
    """tokenizer_config.json in the form of google/siglip-base-patch16-224."""
    rules = {"lstrip": True, "rstrip": True, "normalized": False, "single_word": False, "special": True}
    settings = {
        "added_tokens_decoder": {"1": rules | {"content": "</s>"}, "2": rules | {"content": "<unk>"}},
        "do_lower_case": True,
        "eos_token": "</s>",
        "pad_token": "</s>",
        "unk_token": "<unk>",
        "model_max_length": 64,
        "model_input_names": ["input_ids"],
        "sp_model_kwargs": {},
        "additional_special_tokens": [],
        "tokenizer_class": "SiglipTokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    captions, _ = recorded("plain")
    with_settings = encoded(build_tokenizer(folder, config_for(400)).backend, captions)
    (folder / "tokenizer_config.json").unlink()
    assert with_settings == encoded(build_tokenizer(folder, config_for(400)).backend, captions)


def test_letters_keep_their_case_where_the_file_says_so(folder):
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False}))
    kept, lowered = (
        build_tokenizer(folder, config_for(400)),
        build_tokenizer(shutil.copytree(FIXTURES, folder / "b"), config_for(400)),
    )
    assert kept.backend.encode("A dog").ids != lowered.backend.encode("A dog").ids
    assert kept.backend.encode("a dog").ids == lowered.backend.encode("a dog").ids


def test_the_model_file_is_read_in_full():
    model = read_sentencepiece(FIXTURES / "spiece.model")
    assert [(text, kind) for text, _, kind in model.pieces[:3]] == [
        ("<pad>", CONTROL),
        ("</s>", CONTROL),
        ("<unk>", UNKNOWN),
    ]
    assert {kind for _, _, kind in model.pieces[3:]} == {NORMAL}
    assert all(score < 0 for _, score, _ in model.pieces[3:])
    assert len(model.charsmap) > 200_000  # nmt_nfkc


@pytest.mark.parametrize(
    ("settings", "code", "named"),
    [
        ({"sp_model_kwargs": {"enable_sampling": True}}, "tokenizer-unsupported", "sp_model_kwargs"),
        ({"extra_special_tokens": ["<x>"]}, "tokenizer-unsupported", "extra_special_tokens"),
        ({"padding_side": "middle"}, "tokenizer-unsupported", "padding_side"),
        ({"tokenizer_class": "T5Tokenizer"}, "tokenizer-unsupported", "T5Tokenizer"),
        ({"pad_token": "<none>"}, "tokenizer-vocabulary", "ids up to"),
        ({"added_tokens_decoder": {"1": 5}}, "tokenizer-file", "5"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused_by_name(settings, code, named, folder):
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    rows = len(read_sentencepiece(folder / "spiece.model").pieces)
    with pytest.raises(CheckpointError) as caught:
        build_tokenizer(folder, config_for(rows))
    assert caught.value.code == code
    assert named in str(caught.value)


def altered(folder, change):
    """The model file with another message in place of its own, written by protobuf from our declaration."""
    from qpert.exporter.families.siglip.sentencepiece import _message_class

    path = folder / "spiece.model"
    model = _message_class()()
    model.ParseFromString(path.read_bytes())
    change(model)
    path.write_bytes(model.SerializeToString())
    return folder


def add_piece(model, text, kind, score=0.0):
    model.pieces.add(piece=text, type=kind, score=score)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda m: setattr(m.normalizer_spec, "name", "identity"), "normalizer 'identity'"),
        (lambda m: setattr(m.trainer_spec, "model_type", 2), "model_type 2"),
        (lambda m: setattr(m.trainer_spec, "treat_whitespace_as_suffix", True), "treat_whitespace_as_suffix"),
        (lambda m: setattr(m.normalizer_spec, "escape_whitespaces", False), "escape_whitespaces"),
        (lambda m: add_piece(m, "dog", USER_DEFINED), "'dog'"),
    ],
)
def test_models_of_another_kind_are_refused_by_name(change, named, folder):
    with pytest.raises(CheckpointError) as caught:
        build_tokenizer(altered(folder, change), config_for(400))
    assert caught.value.code == "tokenizer-unsupported"
    assert named in str(caught.value)


@pytest.mark.parametrize("kind", [CONTROL, UNUSED, USER_DEFINED])
def test_pieces_that_no_caption_gives_are_not_found_in_one(kind, folder):
    """Their score of 0 is above every other piece's: a tokenizer that saw them would always take them."""
    captions, _ = recorded("plain")
    before = encoded(build_tokenizer(folder, config_for(400)).backend, ["a dog", "▁＜dog＞", *captions[:99]])
    text = "▁dog<>" if kind == USER_DEFINED else "▁dog"
    altered(folder, lambda model: add_piece(model, text, kind))
    after = encoded(build_tokenizer(folder, config_for(400)).backend, ["a dog", "▁＜dog＞", *captions[:99]])
    assert after == before


def test_what_is_no_model_is_refused(folder):
    for content in (b"", b"\xff\xff\xff", b'{"a": 1}'):
        (folder / "spiece.model").write_bytes(content)
        with pytest.raises(CheckpointError) as caught:
            build_tokenizer(folder, config_for(400))
        assert caught.value.code == "tokenizer-file"
    (folder / "spiece.model").unlink()
    with pytest.raises(CheckpointError) as caught:
        build_tokenizer(folder, config_for(400))
    assert caught.value.code == "hub-file-missing"


def gemma_vocabulary():
    """A small vocabulary laid out as Gemma's: pad 0, end 1, begin 2, unknown 3, and the bytes."""
    trained = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    trained.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(" ", "▁")])
    trained.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False, limit_alphabet=90)
    trained.train_from_iterator([*PIECES, "A Dog and a cat on the tables " * 9], trainer)
    model = json.loads(trained.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("stock_class", [Siglip2Tokenizer, GemmaTokenizer])
def test_bpe_ids_equal_the_stock_tokenizers_on_a_thousand_captions(stock_class, side, tmp_path):
    vocabulary, merges = gemma_vocabulary()
    made = stock_class(vocabulary, merges, model_max_length=LENGTH, padding_side=side, add_eos_token=True)
    made.save_pretrained(tmp_path)
    stock = stock_class.from_pretrained(tmp_path)
    captions = hostile_captions(special=True)
    expected = stock(captions, truncation=True, padding="max_length", max_length=LENGTH)["input_ids"]
    tokenizer = build_tokenizer(tmp_path, config_for(len(vocabulary)))
    assert SPECIAL[-2] == "<eos>"
    assert any(row.count(1) > 1 for row in expected), "some captions must hold the end token"
    wrong = [c for c, a, b in zip(captions, encoded(tokenizer.backend, captions), expected, strict=True) if a != b]
    assert not wrong
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_side) == (0, 1, 2, side)
    assert tokenizer.cleaning == ("lower case" if stock_class is Siglip2Tokenizer else "none")
