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
