"""The bundle's `tokenizer.json` alone gives the runtime's ids of raw captions; what it cannot do is listed here.

"The runtime" is Python's cleaning with the tokenizer as the family built it, as in bundles exported before.
"""

import json
import random
import warnings

import numpy as np
import pytest
from hostile_captions import hostile_captions
from shared_data import shared_folder
from tokenizers import Tokenizer as Backend
from tower_folders import FIXTURES, clip_folder, siglip_folder

from qpert.exporter.checkpoints.checkpoint import no_progress
from qpert.exporter.families import find_family
from qpert.exporter.families.blip2.tokenizer import build_tokenizer, save_tokenizer
from qpert.exporter.families.declare import Limits
from qpert.exporter.host_graphs.tokenizer import self_contained
from qpert.runtime.errors import QpertWarning, TextError
from qpert.runtime.inputs.text import Tokenizer, TokenizerSpec
from qpert.runtime.progress import Silent

LETTERS = [chr(code) for code in (*range(33, 0x250), *range(0x2B0, 0x300), *range(0x370, 0x460))]
SIGMAS = "ΣΣΣΑαb .'’ʰ\u0345\u0301ªǅⅧⓐ🄰-1中:\u00ad\u200d"
"""A capital sigma among cased letters of every kind, signs that do not count, and letters without case."""
SPECIALS = ["[CLS] a [SEP]", "[DEC]", "a [MASK] dog", "[UNK][PAD]", "[cls]", "[ SEP ]"]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    """BERT's, and the letters that it lacks, so that different characters give different ids."""
    known = (shared_folder("data/vocab") / "bert-base-uncased.txt").read_text(encoding="utf-8").splitlines()
    more = [token for letter in LETTERS for token in (letter, f"##{letter}")]
    file = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    file.write_text("\n".join(dict.fromkeys([*known, *more])) + "\n", encoding="utf-8")
    return file


def captions():
    generator = random.Random(1)
    characters = [chr(code) for code in (*range(0x460), *range(0x300, 0x310))]
    pieces = ["a", "b ", "  ", "\n", "\t ", "dog. ", " ", "\x1c", "\x85"]

    def joined(pool, longest, count):
        return ["".join(generator.choices(pool, k=generator.randrange(1, longest))) for _ in range(count)]

    made = [*hostile_captions(1500, special=True), *SPECIALS, *joined(list(SIGMAS), 9, 1500)]
    return [*made, *joined(characters, 60, 1500), *joined(pieces, 260, 300)]


def ids_of(tokenizer, text):
    """The runtime's ids; None where it refuses the text."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QpertWarning)
        try:
            return tokenizer.encode([text]).input_ids[0].tolist()
        except TextError:
            return None


def compare(backend, spec, texts, folder):
    """How many of `texts` were compared, and those of which the file alone gives other ids than the runtime."""
    (folder / "before.json").write_text(backend.to_str(), encoding="utf-8")
    (folder / "after.json").write_text(self_contained(backend, spec).to_str(pretty=True), encoding="utf-8")
    before, after = (Tokenizer.open(folder / f"{name}.json", spec) for name in ("before", "after"))
    alone = Backend.from_file(str(folder / "after.json"))
    expected = {text: ids for text in texts if (ids := ids_of(before, text)) is not None}
    assert [text for text, ids in expected.items() if ids_of(after, text) != ids] == [], "the runtime's ids changed"
    return len(expected), [text for text, ids in expected.items() if alone.encode(text).ids != ids]


@pytest.mark.parametrize("max_length", [35, 100])
def test_blip2s_file_alone_gives_the_runtimes_ids(vocabulary, tmp_path, max_length):
    """100: captions of more than 50 words fit, so the words are cut, too."""
    backend = build_tokenizer(vocabulary, vocab_size=None)
    spec = TokenizerSpec("tokenizer.json", max_length, backend.get_vocab_size())
    compared, differing = compare(backend, spec, captions(), tmp_path)
    assert compared > 4000
    assert differing == []


def test_without_the_cleaning_most_would_differ(vocabulary):
    backend = build_tokenizer(vocabulary, vocab_size=None)
    spec = TokenizerSpec("tokenizer.json", 35, backend.get_vocab_size(), clean="tokenizer")
    alone, runtime = self_contained(backend, spec), Tokenizer(backend, TokenizerSpec("", 35, spec.vocab_size))
    texts = hostile_captions(300, special=True)
    different = [text for text in texts if ids_of(runtime, text) not in (None, alone.encode(text).ids)]
    assert len(different) > 50


def test_words_are_cut_where_more_than_fifty_of_them_fit(vocabulary):
    backend = build_tokenizer(vocabulary, vocab_size=None)
    alone = self_contained(backend, TokenizerSpec("", 100, backend.get_vocab_size()))
    assert len(alone.encode("a " * 60).ids) == 50 + 2


def test_vocabulary_and_frame_stay(vocabulary, tmp_path):
    backend = build_tokenizer(vocabulary, vocab_size=None)
    save_tokenizer(backend, tmp_path / "before.json")
    made = self_contained(backend, TokenizerSpec("", 35, backend.get_vocab_size()))
    assert made.get_vocab() == Backend.from_file(str(tmp_path / "before.json")).get_vocab()
    assert made.encode("A dog!").tokens == ["[CLS]", "a", "dog", "[SEP]"]
    assert json.loads(made.to_str())["added_tokens"] == []


def test_an_appended_decoder_token_keeps_its_id(vocabulary):
    rows = len(vocabulary.read_text(encoding="utf-8").removesuffix("\n").split("\n")) + 1
    backend = build_tokenizer(vocabulary, vocab_size=rows)
    made = self_contained(backend, TokenizerSpec("", 35, rows))
    assert made.token_to_id("[DEC]") == backend.token_to_id("[DEC]") == rows - 1


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_clips_and_siglips_files_alone_give_the_runtimes_ids(family, tmp_path):
    assert FIXTURES.is_dir()
    folder = clip_folder(tmp_path / "hub", "a") if family == "clip" else siglip_folder(made_folder(tmp_path), "a")
    seam = find_family(family)
    with seam.open(str(folder), image_size=None, options={}, progress=no_progress) as checkpoint:
        backend = seam.tokenizer(checkpoint, None, Silent())
        spec = seam.host(checkpoint, Limits()).tokenizer
    compared, differing = compare(backend, spec, hostile_captions(800, special=True), tmp_path)
    assert compared > 700
    assert differing == []


def made_folder(tmp_path):
    (tmp_path / "hub").mkdir()
    return tmp_path / "hub"


@pytest.mark.parametrize(("text", "code"), [("", "text-blank"), (" \n", "text-blank"), ("\u3000", "text-blank")])
def test_what_cannot_be_equal_is_the_runtimes_refusal_of_blank_text(vocabulary, text, code):
    """A file cannot raise: it gives the frame alone, as of the empty text. (Lone surrogates are no UTF-8, so no other
    language can hand them over; Python's binding refuses them itself.)"""
    backend = build_tokenizer(vocabulary, vocab_size=None)
    spec = TokenizerSpec("", 35, backend.get_vocab_size())
    alone = self_contained(backend, spec)
    with pytest.raises(TextError) as caught:
        Tokenizer(backend, spec).encode([text])
    assert caught.value.code == code
    assert alone.encode(text).tokens == ["[CLS]", "[SEP]"]
    with pytest.raises(TypeError):
        alone.encode("a \ud800 dog")


def test_a_file_in_a_bundle_is_such_a_file(tiny_bundle):
    alone = Backend.from_file(str(tiny_bundle / "tokenizer.json"))
    values = json.loads((tiny_bundle / "manifest.json").read_text())["tokenizer"]
    runtime = Tokenizer.open(tiny_bundle / "tokenizer.json", TokenizerSpec(**values))
    texts = ["A DOG: (small)  \x1c red!", "[CLS] dog", "dog " * 40]
    for text in texts:
        np.testing.assert_array_equal(alone.encode(text).ids, ids_of(runtime, text))
    assert alone.encode(texts[0]).tokens == ["[CLS]", "a", "dog", "small", "red", "[SEP]"]
    assert len(alone.encode(texts[2]).ids) == values["max_length"]
