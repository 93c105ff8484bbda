"""Captions: cleaning worked by hand from LAVIS's rules, token ids against the stock Hugging Face tokenizer."""

import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qpert.exporter.families.blip2.tokenizer import build_tokenizer, save_tokenizer
from qpert.runtime.errors import InputError, QpertWarning, TextError
from qpert.runtime.inputs.text import Tokenizer, TokenizerSpec, clean_caption

DEMO_VOCABULARY = Path(__file__).parents[3] / "exporter" / "demo" / "vocab.txt"


def spec(max_length, **settings):
    return TokenizerSpec("tokenizer.json", max_length, 1024, **settings)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    file = tmp_path_factory.mktemp("bundle") / "tokenizer.json"
    save_tokenizer(build_tokenizer(DEMO_VOCABULARY, vocab_size=1024), file)
    return file


@pytest.fixture
def tokenizer(path):
    return Tokenizer.open(path, spec(35))


@pytest.mark.parametrize(
    ("caption", "cleaned"),
    [
        ("A Dog.", "a dog"),
        (
            'one.two!three"four(five)six*seven#eight:nine;ten~eleven',
            "one two three four five six seven eight nine ten eleven",
        ),
        ("don't stop, well-known? yes/no", "don't stop, well-known? yes/no"),
        ("a   b \t\n c", "a b c"),
        ("a\tb", "a\tb"),
        ("a dog\t", "a dog\t"),
        ("  a dog\n\n", "a dog"),
        ("a dog\n", "a dog"),
        ("(a) dog!", "a dog"),
        ("ÉCOLE 猫", "école 猫"),
    ],
)
def test_captions_are_cleaned_by_the_rules_of_lavis(caption, cleaned):
    assert clean_caption(caption) == cleaned


def test_fifty_words_are_kept():
    assert clean_caption(" ".join(["w"] * 50)).split(" ") == ["w"] * 50
    assert clean_caption(" ".join(f"w{i}" for i in range(60))).endswith(" w49")
    assert clean_caption("a b c d", max_words=2) == "a b"


@given(st.text(alphabet='aB .!"()*#:;~\t\n,é猫', min_size=1, max_size=40))
@settings(max_examples=200)
def test_a_cleaned_caption_has_no_punctuation_of_the_list_no_capitals_and_no_runs_of_space(caption):
    try:
        cleaned = clean_caption(caption)
    except TextError:
        assert not set(caption) - set('. !"()*#:;~\t\n')
        return
    assert not set(cleaned) & set('.!"()*#:;~')
    assert cleaned == cleaned.lower() == cleaned.strip(" ")
    assert not re.search(r"\s\s", cleaned)


@pytest.mark.parametrize("caption", ["", "   ", "\n", "\t"])
def test_a_blank_caption_is_an_error_that_names_it(tokenizer, caption):
    with pytest.raises(TextError, match="leaves nothing"):
        clean_caption(caption)
    with pytest.raises(TextError, match=r"text 1 is ''|text 1 is '") as caught:
        tokenizer.encode(["a dog", caption])
    assert ascii(caption) in str(caught.value)


def test_ids_and_mask_are_padded_on_the_right_to_the_longest(tokenizer):
    result = tokenizer.encode(["A dog.", "a red dog on a table"])
    assert result.input_ids.dtype == result.attention_mask.dtype == np.int64
    assert result.input_ids.shape == result.attention_mask.shape == (2, 8)
    np.testing.assert_array_equal(result.attention_mask, [[1, 1, 1, 1, 0, 0, 0, 0], [1] * 8])
    np.testing.assert_array_equal(result.input_ids[0, 4:], 0)
    np.testing.assert_array_equal(result.input_ids[:, 0], 2)  # [CLS]
    assert result.input_ids[0, 3] == result.input_ids[1, 7] == 3  # [SEP]


def test_a_batch_is_the_stock_tokenizer_on_cleaned_captions(tokenizer):
    transformers = pytest.importorskip("transformers")
    vocabulary = {token: i for i, token in enumerate(DEMO_VOCABULARY.read_text(encoding="utf-8").splitlines())}
    stock = transformers.BertTokenizer(vocab=vocabulary)
    texts = ["a cat", "Café 猫 🐶, x", "word " * 60, "[SEP] in a text", "q" * 300]
    cleaned = ["a cat", "café 猫 🐶, x", " ".join(["word"] * 50), "[sep] in a text", "q" * 300]
    expected = stock(cleaned, padding="longest", truncation=True, max_length=35, return_tensors="np")
    with pytest.warns(QpertWarning):
        actual = tokenizer.encode(texts)
    np.testing.assert_array_equal(actual.input_ids, expected["input_ids"])
    np.testing.assert_array_equal(actual.attention_mask, expected["attention_mask"])


def test_truncation_keeps_sep_and_is_said_once(path):
    tokenizer = Tokenizer.open(path, spec(5))
    with pytest.warns(QpertWarning, match="2 of 3 texts are longer than the limit of 5 tokens"):
        result = tokenizer.encode(["a dog", "a dog and a cat", "a red dog and a cat"])
    assert result.input_ids.shape == (3, 5)
    np.testing.assert_array_equal(result.input_ids[1:, 4], 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer.encode(["a dog and a cat"])


def test_exactly_as_many_tokens_as_allowed_is_no_truncation(path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Tokenizer.open(path, spec(5)).encode(["a red dog"]).input_ids.shape == (1, 5)


@pytest.mark.parametrize("caption", ["...", "(*#:;~)!", "\u200b\u200b"])
def test_a_caption_without_a_word_is_the_empty_text_as_in_lavis_and_that_is_said(tokenizer, caption):
    # LAVIS's pre_caption returns "" for it and its tokenizer frames that: two tokens, neither cut nor padded.
    with pytest.warns(QpertWarning, match="1 of 2 texts hold no word") as said:
        encoded = tokenizer.encode(["a dog", caption])
    frame = [tokenizer.encode(["a dog"]).input_ids[0, place] for place in (0, -1)]
    assert encoded.input_ids[1, :2].tolist() == frame
    assert encoded.attention_mask[1].tolist() == [1, 1, *[0] * (encoded.attention_mask.shape[1] - 2)]
    assert ascii(caption) in str(said[0].message)


def test_no_texts_give_empty_arrays(tokenizer):
    assert tokenizer.encode([]).input_ids.shape == (0, 0)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("a dog", "put it in a list"),
        (["a dog", None], "text 1 is a NoneType; expected a string"),
        (["a \ud800 dog"], "text 0 is .*surrogates"),
    ],
)
def test_what_is_no_text_is_an_error_that_names_it(tokenizer, texts, message):
    with pytest.raises(TextError, match=message):
        tokenizer.encode(texts)


def test_the_vocabulary_size_counts_dec(tokenizer):
    assert tokenizer.vocab_size == 1024
    assert tokenizer.max_length == 35


def test_a_missing_or_foreign_tokenizer_file_is_an_error(tmp_path):
    with pytest.raises(InputError, match="cannot read the tokenizer"):
        Tokenizer.open(tmp_path / "tokenizer.json", spec(35))
    (tmp_path / "tokenizer.json").write_text("[]")
    with pytest.raises(InputError, match=r"is not a tokenizer\.json"):
        Tokenizer.open(tmp_path / "tokenizer.json", spec(35))


def test_a_vocabulary_that_does_not_fit_the_bundle_is_an_error(path):
    with pytest.raises(InputError) as caught:
        Tokenizer.open(path, TokenizerSpec("tokenizer.json", 35, 1000))
    assert caught.value.code == "tokenizer-vocabulary"
    with pytest.raises(InputError) as caught:
        Tokenizer.open(path, spec(35, pad_id=5000))
    assert caught.value.code == "tokenizer-vocabulary"


def test_texts_of_fixed_length_are_padded_to_it_on_the_side_that_is_asked_for(path):
    plain = Tokenizer.open(path, spec(35)).encode(["a dog", "a red dog"])
    for side, place in (("right", slice(0, 5)), ("left", slice(4, 9))):
        padded = Tokenizer.open(path, spec(9, pad="max_length", pad_side=side, pad_id=7)).encode(["a dog", "a red dog"])
        assert padded.fixed_length
        np.testing.assert_array_equal(padded.input_ids[1, place], plain.input_ids[1])
        np.testing.assert_array_equal(np.delete(padded.input_ids[1], place), 7)
        np.testing.assert_array_equal(padded.lengths, [4, 5])
        assert padded.trimmed(np.array([0])).input_ids.shape == (1, 9), "the graph wants every text at full length"


@pytest.mark.parametrize(
    ("field", "value"), [("kind", "words"), ("clean", "twice"), ("pad", "never"), ("pad_side", "top")]
)
def test_a_tokenizer_of_an_unknown_kind_is_an_error(field, value):
    with pytest.raises(InputError) as caught:
        spec(35, **{field: value})
    assert caught.value.code == f"tokenizer-{field}"


@pytest.mark.parametrize("max_length", [2, 0, -1, True, 3.5])
def test_an_impossible_limit_is_an_error(path, max_length):
    with pytest.raises(InputError, match="max_length is"):
        Tokenizer.open(path, spec(max_length))


def test_a_tokenizer_with_an_id_beyond_the_embeddings_is_refused_when_it_is_opened(path):
    document = json.loads(path.read_text())
    document["added_tokens"].append(document["added_tokens"][0] | {"id": 1024, "content": "<image>"})
    beyond = path.parent / "beyond.json"
    beyond.write_text(json.dumps(document))
    with pytest.raises(InputError) as caught:
        Tokenizer.open(beyond, spec(35))
    assert caught.value.code == "tokenizer-vocabulary"
    assert Tokenizer.open(beyond, TokenizerSpec("tokenizer.json", 35, 1025)).vocab_size == 1025


def test_ids_count_and_not_the_number_of_tokens(path):
    document = json.loads(path.read_text())
    vocabulary = document["model"]["vocab"]
    vocabulary["zebra"] = 5000  # fewer tokens than rows, and one of them beyond the last row
    del vocabulary["##z"], vocabulary["##q"]
    sparse = path.parent / "sparse.json"
    sparse.write_text(json.dumps(document))
    with pytest.raises(InputError) as caught:
        Tokenizer.open(sparse, spec(35))
    assert caught.value.code == "tokenizer-vocabulary"
