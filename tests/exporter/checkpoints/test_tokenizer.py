"""The tokenizer that is built, against the stock Hugging Face BertTokenizer over the same vocabulary."""

import json
import re
import string
from pathlib import Path

import pytest

from qpert.exporter.families.blip2.tokenizer import build_tokenizer, save_tokenizer
from qpert.runtime.errors import InputError

DEMO_VOCABULARY = Path(__file__).parents[3] / "exporter" / "demo" / "vocab.txt"
CAPTIONS = Path(__file__).parents[3] / "examples" / "photos" / "captions.jsonl"

ODD_TEXTS = [
    "a red striped circle left of a blue cat",
    "A Café, naïve résumé! ÅNGSTRÖM",
    "i̇stanbul İstanbul ﬁne ﬂat",
    "一只猫 in 日本語 カタカナ 한국어",
    "dog 🐶 family 👨‍👩‍👧 flag 🇩🇪 ☃",
    "x" * 101 + " " + "y" * 100,
    "tab\there\nnewline\u00a0nbsp\u2003em\u200bzero\u00adsoft",
    "[CLS] [SEP] [MASK] [PAD] [DEC] [sep]",
    "don't stop-it: (yes) #1 @home 50% $5 a/b a_b ~ ` ^",
    "\u0000null \ufffd replacement \u0007 bell",
    "ΑΒΓ Привет שלום مرحبا ½ ² ①",
    "",
    " ",
    "?!",
]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(DEMO_VOCABULARY, vocab_size=1024)


def write_vocabulary(folder, *, without=(), extra=()):
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "##s", *extra]
    path = folder / "vocab.txt"
    path.write_text("".join(f"{token}\n" for token in tokens if token not in without), encoding="utf-8")
    return path


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_token_ids_are_those_of_the_stock_bert_tokenizer(tokenizer, text):
    transformers = pytest.importorskip("transformers")
    vocabulary = {token: i for i, token in enumerate(DEMO_VOCABULARY.read_text(encoding="utf-8").splitlines())}
    stock = transformers.BertTokenizer(vocab=vocabulary)
    stock.add_special_tokens({"bos_token": "[DEC]"})
    assert tokenizer.encode(text).ids == stock(text)["input_ids"]


def test_a_text_is_framed_by_cls_and_sep(tokenizer):
    assert tokenizer.encode("two dogs").tokens == ["[CLS]", "two", "dogs", "[SEP]"]
    assert tokenizer.encode("zebras").tokens == ["[CLS]", "zebra", "##s", "[SEP]"]
    assert "[DEC]" not in tokenizer.encode("two dogs").tokens


def test_dec_is_appended_when_the_embeddings_have_one_row_more(tmp_path):
    tokenizer = build_tokenizer(write_vocabulary(tmp_path), vocab_size=9)
    assert tokenizer.token_to_id("[DEC]") == 8
    assert tokenizer.get_vocab_size() == 9


def test_dec_is_not_appended_twice_nor_without_a_size(tmp_path):
    with_dec = write_vocabulary(tmp_path, extra=["[DEC]"])
    assert build_tokenizer(with_dec, vocab_size=9).get_vocab_size() == 9
    assert build_tokenizer(write_vocabulary(tmp_path), vocab_size=None).token_to_id("[DEC]") is None


@pytest.mark.parametrize("vocab_size", [7, 10, 30523])
def test_a_vocabulary_of_another_size_is_an_error_that_names_both(tmp_path, vocab_size):
    with pytest.raises(InputError, match=rf"has 8 tokens .* have {vocab_size:,} rows; .* pass the vocabulary"):
        build_tokenizer(write_vocabulary(tmp_path), vocab_size=vocab_size)


@pytest.mark.parametrize("token", ["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
def test_a_missing_special_token_is_an_error_that_names_it(tmp_path, token):
    with pytest.raises(InputError, match=f"lacks {re.escape(token)}"):
        build_tokenizer(write_vocabulary(tmp_path, without=[token]), vocab_size=None)


def test_a_saved_tokenizer_gives_the_same_ids_as_file_and_as_folder(tmp_path, tokenizer):
    save_tokenizer(tokenizer, tmp_path / "tokenizer.json")
    write_vocabulary(tmp_path)  # the folder's tokenizer.json is preferred
    for source in (tmp_path, tmp_path / "tokenizer.json"):
        again = build_tokenizer(source, vocab_size=1024)
        assert [again.encode(text).ids for text in ODD_TEXTS] == [tokenizer.encode(text).ids for text in ODD_TEXTS]


def test_truncation_and_padding_inside_a_tokenizer_json_are_disabled(tmp_path, tokenizer):
    path = tmp_path / "tokenizer.json"
    save_tokenizer(tokenizer, path)
    document = json.loads(path.read_text())
    document["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    document["padding"] = {
        "strategy": {"Fixed": 16},
        "direction": "Left",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "[PAD]",
    }
    path.write_text(json.dumps(document))
    loaded = build_tokenizer(path, vocab_size=1024)
    assert loaded.truncation is None
    assert loaded.padding is None
    assert len(loaded.encode("a b c d e f").ids) == 8


def test_sources_that_cannot_be_read_are_errors(tmp_path):
    with pytest.raises(InputError, match=r"does not exist; expected a vocab\.txt"):
        build_tokenizer(tmp_path / "nowhere", vocab_size=None)
    with pytest.raises(InputError, match=r"neither tokenizer\.json nor vocab\.txt"):
        build_tokenizer(tmp_path, vocab_size=None)
    (tmp_path / "vocab.bin").write_bytes(b"x")
    with pytest.raises(InputError, match=r"is neither \.txt nor \.json"):
        build_tokenizer(tmp_path / "vocab.bin", vocab_size=None)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match=r"is not a tokenizer\.json"):
        build_tokenizer(tmp_path, vocab_size=None)
    (tmp_path / "vocab.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot read the vocabulary"):
        build_tokenizer(tmp_path / "vocab.txt", vocab_size=None)


def test_a_vocabulary_with_a_repeated_or_empty_line_is_an_error_that_names_it(tmp_path):
    with pytest.raises(InputError, match=r"vocab.txt:9 repeats 'dog' of line 7"):
        build_tokenizer(write_vocabulary(tmp_path, extra=["dog"]), vocab_size=None)
    with pytest.raises(InputError, match=r"vocab.txt:9 is empty"):
        build_tokenizer(write_vocabulary(tmp_path, extra=["", "cat"]), vocab_size=None)


def test_a_tokenizer_of_another_kind_is_an_error(tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

    Tokenizer(BPE()).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match="holds a BPE model; expected WordPiece"):
        build_tokenizer(tmp_path, vocab_size=None)


# What the files beside a vocabulary say.


def folder_with(folder, *, settings=None, json_file=True, **changes):
    """A folder as `save_pretrained` leaves it; `changes` go into `tokenizer.json`."""
    write_vocabulary(folder, extra=["[DEC]"])
    if json_file:
        save_tokenizer(build_tokenizer(folder / "vocab.txt", vocab_size=9), folder / "tokenizer.json")
        document = json.loads((folder / "tokenizer.json").read_text())
        (folder / "tokenizer.json").write_text(json.dumps(document | changes))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"} | (settings or {})))
    return folder


@pytest.mark.parametrize(
    "settings",
    [
        {"cls_token": "<s>"},
        {"sep_token": {"content": "</s>", "special": True}},
        {"pad_token": "<pad>"},
        {"unk_token": "<unk>"},
        {"do_basic_tokenize": False},
        {"never_split": ["a dog"]},
        {"truncation_side": "left"},
        {"split_special_tokens": True},
        {"auto_map": {"AutoTokenizer": ["x.Y", None]}},
    ],
)
def test_a_setting_that_cannot_be_honoured_is_refused_by_name(tmp_path, settings):
    with pytest.raises(InputError) as caught:
        build_tokenizer(folder_with(tmp_path, settings=settings), vocab_size=9)
    assert caught.value.code == "tokenizer-unsupported"
    assert next(iter(settings)) in str(caught.value)


@pytest.mark.parametrize(
    "settings", [{"do_lower_case": False}, {"strip_accents": False}, {"tokenize_chinese_chars": False}]
)
def test_cleaning_that_two_files_describe_differently_is_refused(tmp_path, settings):
    with pytest.raises(InputError) as caught:
        build_tokenizer(folder_with(tmp_path, settings=settings), vocab_size=9)
    assert caught.value.code == "tokenizer-contradiction"


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"do_lower_case": False},
        {"strip_accents": False},
        {"tokenize_chinese_chars": False},
        {"do_lower_case": True},
    ],
)
def test_a_vocabulary_alone_is_read_with_the_settings_of_the_stock_tokenizer(tmp_path, settings):
    transformers = pytest.importorskip("transformers")
    text = "A Dog dogs á a一a"
    folder = folder_with(tmp_path, settings=settings, json_file=False)
    stock = transformers.BertTokenizer.from_pretrained(folder)
    assert build_tokenizer(folder, vocab_size=9).encode(text).ids == stock(text)["input_ids"]


def test_declared_tokens_get_their_rows_and_those_without_one_are_left_out_and_said(tmp_path):
    said = []
    added = {"9": {"content": "<image>"}, "10": {"content": "<video>"}}
    settings = {"added_tokens_decoder": added, "additional_special_tokens": ["<late>"]}
    tokenizer = build_tokenizer(folder_with(tmp_path, settings=settings), vocab_size=10, own=True, say=said.append)
    assert tokenizer.token_to_id("<image>") == 9
    assert tokenizer.get_vocab_size() == 10
    assert said == ["tokens without a row in the word embeddings were left out: '<video>', '<late>'"]


def test_a_token_with_two_ids_is_refused(tmp_path):
    settings = {"added_tokens_decoder": {"7": {"content": "[DEC]"}}}
    with pytest.raises(InputError) as caught:
        build_tokenizer(folder_with(tmp_path, settings=settings), vocab_size=9)
    assert caught.value.code == "tokenizer-contradiction"


def test_rows_without_a_token_are_the_checkpoints_own_choice_and_said(tmp_path):
    said = []
    tokenizer = build_tokenizer(folder_with(tmp_path), vocab_size=64, own=True, say=said.append)
    assert tokenizer.get_vocab_size() == 9
    assert said == ["55 of the 64 rows of the word embeddings have no token in tokenizer.json"]
    with pytest.raises(InputError) as caught:
        build_tokenizer(tmp_path, vocab_size=64)
    assert caught.value.code == "tokenizer-vocabulary"


def test_what_is_not_used_is_said(tmp_path):
    said = []
    folder_with(tmp_path, settings={"padding_side": "left", "model_max_length": 20, "odd": 1})
    write_vocabulary(tmp_path, without=["[MASK]"], extra=["[DEC]"])
    build_tokenizer(tmp_path, vocab_size=9, say=said.append)
    assert said == [
        "tokenizer_config.json pads on the left: texts are padded on the right, with "
        "the same result as each text alone",
        "tokenizer_config.json has model_max_length 20: pass --max-length 20 to truncate texts there",
        "tokenizer_config.json has unknown fields, which are not used: odd",
        "vocab.txt differs from tokenizer.json (first at line 5, 'a'): tokenizer.json is used, as in transformers",
    ]


def test_a_frame_other_than_berts_is_refused_and_a_missing_one_said(tmp_path):
    said = []
    build_tokenizer(folder_with(tmp_path, post_processor=None), vocab_size=9, say=said.append)
    assert said == ["tokenizer.json does not frame texts: they are framed as [CLS] … [SEP], as in BLIP-2's training"]
    frame = {"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[DEC]", 8]}
    with pytest.raises(InputError) as caught:
        build_tokenizer(folder_with(tmp_path, post_processor=frame), vocab_size=9)
    assert caught.value.code == "tokenizer-unsupported"


def test_the_demonstration_vocabulary_is_complete():
    tokens = DEMO_VOCABULARY.read_text(encoding="utf-8").splitlines()
    assert len(tokens) == len(set(tokens)) == 1024
    assert tokens[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert tokens[-1] == "[DEC]"
    single = string.ascii_lowercase + string.digits
    assert set(single + string.punctuation) | {f"##{c}" for c in single} <= set(tokens)


def test_the_demonstration_vocabulary_has_the_words_of_the_example_captions_whole(tokenizer):
    captions = [c for line in CAPTIONS.read_text().splitlines() for c in json.loads(line)["captions"]]
    pieces = [token for caption in captions for token in tokenizer.encode(caption).tokens]
    assert "[UNK]" not in pieces
    assert not [piece for piece in pieces if piece.startswith("##")]
