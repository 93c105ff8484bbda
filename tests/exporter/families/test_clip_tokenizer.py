"""CLIP's tokenizer against the stock `CLIPTokenizer`, from every form in which its files are found."""

import json

import pytest
from hostile_captions import PIECES, hostile_captions
from stock_towers import CLIP_SHAPES
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from qpert.exporter.families.clip.tokenizer import END, START, build_tokenizer
from qpert.graphs.families.clip.config import ClipConfig
from qpert.graphs.transformer import TextConfig, VisionConfig
from qpert.runtime.errors import CheckpointError

LENGTH = 77


def vocabulary():
    """A small vocabulary laid out as CLIP's: bytes, bytes that end a word, merges, the two special tokens."""
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trained.normalizer = normalizers.Lowercase()
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(vocab_size=900, end_of_word_suffix="</w>", show_progress=False)
    trained.train_from_iterator([" ".join(PIECES), "the dogs and the cats on the tables " * 9, "!! ... ## "], trainer)
    merges = [tuple(m) for m in json.loads(trained.to_str())["model"]["merges"]]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    order = [*letters, *(letter + "</w>" for letter in letters)]
    order += [piece for piece in dict.fromkeys("".join(m) for m in merges) if piece not in set(order)]
    return {piece: i for i, piece in enumerate([*order, START, END])}, merges


VOCABULARY, MERGES = vocabulary()


def text_files(folder, vocabulary=VOCABULARY):
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(merge) for merge in MERGES)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def saved_by_stock(folder):
    CLIPTokenizer(dict(VOCABULARY), list(MERGES), model_max_length=LENGTH).save_pretrained(folder)
    return folder


def openai_form(folder):
    """As openai/clip-vit-base-patch32 was published: objects with `__type`, and tokens that match after cleaning."""
    saved_by_stock(folder)
    text_files(folder)
    rules = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True}
    named = {"bos_token": START, "eos_token": END, "unk_token": END}
    config = {name: rules | {"content": token, "__type": "AddedToken"} for name, token in named.items()}
    config |= {"pad_token": END, "model_max_length": LENGTH, "tokenizer_class": "CLIPTokenizer", "errors": "replace"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    special = {name: rules | {"content": token} for name, token in named.items()} | {"pad_token": END}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    return folder


def old_without_json(folder):
    openai_form(folder)
    (folder / "tokenizer.json").unlink()
    return folder


def laion_form(folder):
    """The padding token is "!", id 0."""
    saved_by_stock(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": "!"}))
    return folder


def with_an_added_token(folder):
    """A learned word after the special tokens, as textual inversion adds it."""
    saved_by_stock(folder)
    stock = CLIPTokenizer.from_pretrained(folder)
    stock.add_tokens(["<cat-toy>", "_"])
    stock.save_pretrained(folder)
    return folder


FORMS = [text_files, saved_by_stock, openai_form, old_without_json, laion_form, with_an_added_token]


def config_for(rows, eos=VOCABULARY[END]):
    encoder = (24, 1, 2, 8, "gelu", 1e-5)
    return ClipConfig("t", VisionConfig(*encoder, 14, 7), TextConfig(*encoder, rows, LENGTH), 8, eos)


@pytest.mark.parametrize("form", FORMS)
def test_ids_equal_the_stock_tokenizers_on_hostile_captions(form, tmp_path):
    folder = form(tmp_path)
    stock = CLIPTokenizer.from_pretrained(folder)
    ours = build_tokenizer(folder, config_for(len(stock)))
    captions = hostile_captions(special=True)
    expected = stock(captions, truncation=True, max_length=LENGTH, padding=True)["input_ids"]
    got = [encoding.ids for encoding in ours.backend.encode_batch(captions)]
    assert len(got[0]) == LENGTH
    wrong = [caption for caption, a, b in zip(captions, got, expected, strict=True) if a != b]
    assert not wrong
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (stock.bos_token_id, stock.eos_token_id, stock.pad_token_id)
    assert ours.vocab_size == len(stock)


def test_the_file_alone_cleans_frames_truncates_and_pads(tmp_path):
    saved_by_stock(tmp_path)
    ours = build_tokenizer(tmp_path, config_for(len(VOCABULARY)))
    again = Tokenizer.from_str(ours.backend.to_str())
    stock = CLIPTokenizer.from_pretrained(tmp_path)
    captions = hostile_captions(100, special=True, seed=1)
    expected = stock(captions, truncation=True, max_length=LENGTH, padding=True)["input_ids"]
    assert [encoding.ids for encoding in again.encode_batch(captions)] == expected


def test_ids_beyond_the_embedding_are_refused(tmp_path):
    with pytest.raises(CheckpointError) as caught:
        build_tokenizer(saved_by_stock(tmp_path), config_for(len(VOCABULARY) - 1))
    assert caught.value.code == "tokenizer-vocabulary"


@pytest.mark.parametrize("eos", [2, 5])
def test_an_end_that_the_text_tower_would_not_find_is_refused(eos, tmp_path):
    folder = with_an_added_token(tmp_path)  # its largest id is not the end of text
    with pytest.raises(CheckpointError) as caught:
        build_tokenizer(folder, config_for(len(VOCABULARY) + 2, eos))
    assert caught.value.code == "tokenizer-end-of-text"


@pytest.mark.parametrize(
    "settings",
    [
        {"padding_side": "left"},
        {"truncation_side": "left"},
        {"split_special_tokens": True},
        {"extra_special_tokens": ["<x>"]},
        {"additional_special_tokens": [{"content": "<x>"}]},
    ],
)
def test_settings_that_cannot_be_honoured_are_refused_by_name(settings, tmp_path):
    (text_files(tmp_path) / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError) as caught:
        build_tokenizer(tmp_path, config_for(len(VOCABULARY)))
    assert caught.value.code == "tokenizer-unsupported"
    assert next(iter(settings)) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "a"}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": ["a"]}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"1": 5}}),
        ("added_tokens.json", {"<x>": "many"}),
        ("tokenizer.json", {"added_tokens": [{"content": "<x>"}], "model": {"vocab": {}}}),
        ("special_tokens_map.json", {"bos_token": 7}),
    ],
)
def test_broken_token_files_are_named_and_not_a_bug(name, values, tmp_path):
    (text_files(tmp_path) / name).write_text(json.dumps(values))
    with pytest.raises(CheckpointError) as caught:
        build_tokenizer(tmp_path, config_for(len(VOCABULARY)))
    assert caught.value.code == "tokenizer-file"


def test_extra_tokens_that_are_among_the_added_ones_are_no_fault(tmp_path):
    saved_by_stock(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"extra_special_tokens": [END]}))
    assert build_tokenizer(tmp_path, config_for(len(VOCABULARY))).eos_id == VOCABULARY[END]


def test_a_folder_without_a_vocabulary_is_refused(tmp_path):
    with pytest.raises(CheckpointError) as caught:
        build_tokenizer(tmp_path, config_for(9))
    assert caught.value.code == "hub-file-missing"


def test_another_kind_of_vocabulary_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text(
        json.dumps({"added_tokens": [], "model": {"type": "Unigram", "vocab": []}})
    )
    with pytest.raises(CheckpointError) as caught:
        build_tokenizer(tmp_path, config_for(9))
    assert caught.value.code == "tokenizer-file"


def test_shapes_have_distinct_ends_of_text():
    assert {spec["text"]["eos_token_id"] for spec in CLIP_SHAPES.values()} == {2, 41, 44}
