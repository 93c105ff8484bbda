"""CoCa's `tokenizer.json` against open_clip's own tokenizer, on captions that are hard on both."""

import gzip
import json
import subprocess
from dataclasses import replace

import pytest
from hostile_captions import hostile_captions
from tokenizers import Tokenizer

from qpert.exporter.families.coca.reference_open_clip import WORKER
from qpert.exporter.families.coca.tokenizer import END, MERGES, START, build_tokenizer, read_merges
from qpert.exporter.host_graphs.tokenizer import self_contained
from qpert.graphs.families.coca.config import CONFIGS
from qpert.runtime.errors import InputError
from qpert.runtime.inputs.text import TokenizerSpec

LENGTH = 76
EXTRA = [
    *(
        "wow!§ cat",
        "ok!☺",
        "x!_y",
        "!",
        "!!!",
        "!?",
        "Tom &amp;amp; Jerry&#39;s &eacute;clair",
        "&lt;b&gt; &nbsp; &#x27;",
    ),
    *(f"a {START} b", f"a{END.upper()}b", f"!{START}", f"{START}{END}", f"!{START}{END}", f"_{END}", f"'s{START}"),
    *(
        "“curly” ‘quotes’ it’s",
        "ﬁne ﬂuﬃer",
        "ＬＯＵＤ　ＮＯＩＳＥＳ",
        "ｶﾀｶﾅ",
        "\x85 \x91x\x92 \x1b[31mred\x1b[0m",
        "a\u2028b\x0bc\x1cd",
    ),
    *("'ſ it'ſ", "\u0345", "a\u0345b", "ΑΣ ΑΣ'Α", "İ", "x" * 400, "no. 12 of 2024", "e\u0301", "\ufeffbom"),
]


def stock(python, captions):
    """open_clip's ids [T, 76], and which captions ftfy's repair of mojibake changes."""
    program = (
        "import sys, json\n"
        f"sys.path.insert(0, {str(WORKER.parent)!r})\n"
        "import open_clip_worker; open_clip_worker.prepare_imports()\n"
        "from open_clip.tokenizer import SimpleTokenizer\n"
        "import ftfy\n"
        "captions = json.load(sys.stdin)\n"
        "plain = [ftfy.fix_text(text, fix_encoding=False) != ftfy.fix_text(text) for text in captions]\n"
        "json.dump([SimpleTokenizer(context_length=76)(captions).tolist(), plain], sys.stdout)"
    )
    command = [python, "-W", "ignore", "-c", program]
    answer = subprocess.run(command, input=json.dumps(captions), capture_output=True, text=True, check=True)
    return json.loads(answer.stdout)


@pytest.fixture(scope="module")
def ours():
    """As in a bundle: read again from the file."""
    spec = TokenizerSpec("tokenizer.json", LENGTH, 49408, "bpe", "tokenizer", "longest", 0)
    made = self_contained(build_tokenizer(CONFIGS["coca_ViT-L-14"]).backend, spec)
    return Tokenizer.from_str(made.to_str())


def padded(encoding):
    return encoding.ids + [0] * (LENGTH - len(encoding.ids))


@pytest.mark.open_clip
def test_ids_equal_stocks_on_thousands_of_hostile_captions(ours, open_clip_python):
    captions = EXTRA + hostile_captions(2500, special=False) + hostile_captions(1500, special=True, seed=3)
    expected, mojibake = stock(open_clip_python, captions)
    found = [padded(encoding) for encoding in ours.encode_batch(captions)]
    rows = zip(captions, found, expected, mojibake, strict=True)
    assert [text for text, a, b, repaired in rows if a != b and not repaired] == []
    assert sum(mojibake) < len(captions) // 100, "what is declared as left out must be rare here"


def test_captions_with_an_exclamation_mark_of_id_zero(ours):
    """Recorded from open_clip 3.3.0: "!" is 0, the id of padding, inside a run of signs."""
    assert ours.encode("wow!§ cat").ids == [49406, 2781, 0, 126, 356, 2368, 49407]
    assert 0 not in ours.encode("wow! cat").ids


def test_a_long_text_is_cut_and_still_ends(ours):
    ids = ours.encode("word " * 200).ids
    assert len(ids) == LENGTH
    assert (ids[0], ids[-1]) == (49406, 49407)
    assert set(ids[1:-1]) == {2653}


@pytest.mark.open_clip
def test_the_vocabulary_is_that_of_the_installed_open_clip(open_clip_python, tmp_path):
    program = "import importlib.util as u; print(u.find_spec('open_clip').submodule_search_locations[0])"
    place = subprocess.run([open_clip_python, "-c", program], capture_output=True, text=True, check=True).stdout.strip()
    assert read_merges(MERGES) == read_merges(type(MERGES)(place) / "bpe_simple_vocab_16e6.txt.gz")


def test_another_file_of_merges_is_taken_and_other_files_are_refused(tmp_path):
    lines = MERGES.read_text(encoding="utf-8").split("\n")[:101]
    (tmp_path / "own.txt.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    small = build_tokenizer(CONFIGS["coca_ViT-B-32"], str(tmp_path / "own.txt.gz"))
    assert (small.vocab_size, small.bos_id, small.eos_id) == (614, 612, 613)
    with pytest.raises(InputError) as beyond:
        build_tokenizer(replace(CONFIGS["coca_ViT-B-32"], text=replace(CONFIGS["coca_ViT-B-32"].text, vocab_size=99)))
    assert beyond.value.code == "tokenizer-vocabulary"
    (tmp_path / "vocab.json").write_text('{"a": 1}\n{"b": 2, "c": 3}')
    for name in ("vocab.json", "missing.txt", "."):
        with pytest.raises(InputError) as caught:
            build_tokenizer(CONFIGS["coca_ViT-B-32"], str(tmp_path / name))
        assert caught.value.code == "tokenizer-file"
