"""`examples/cpp` against the Python runtime, PIL and `tokenizers`: the same scores, pixels, boxes and ids."""

import json
import random
import shutil
import warnings
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from cpp_programs import built
from hostile_captions import hostile_captions
from shared_data import shared_folder

import qpert.exporter.demo
from qpert.exporter.families.blip2.tokenizer import build_tokenizer
from qpert.exporter.host_graphs.preprocess import preprocess_graph, preprocess_spec
from qpert.exporter.host_graphs.tokenizer import self_contained
from qpert.exporter.host_graphs.write import save, write_boxes_graph
from qpert.runtime import Retriever
from qpert.runtime.bundle.manifest import read_manifest
from qpert.runtime.bundle.roles import BOXES
from qpert.runtime.errors import QpertWarning, TextError
from qpert.runtime.files import sha256_of
from qpert.runtime.inputs.images import load_image, preprocess_images
from qpert.runtime.inputs.preprocessing import ImagePreprocessing
from qpert.runtime.inputs.text import Tokenizer, TokenizerSpec
from qpert.runtime.verification.tensors import verify_tensors

pytestmark = pytest.mark.slow

DEMO_VOCABULARY = Path(qpert.exporter.demo.__file__).parent / "vocab.txt"
SAME_SCORE = 1e-5
"""Both sides run the same graphs in the same library on the same pixels, ids, masks and weights; batches differ (one
picture a call against several), which changes float32 sums by some 1e-6."""
TEXTS = ["a small red box on a table", "an astronaut: orange suit!", "A CAT " * 40, "rocket"]
ODD_SIZES = [(97, 640), (31, 1999), (1999, 31), (7, 5), (1, 1), (1, 300), (300, 2), (113, 111), (640, 480), (2, 2)]
LETTERS = [chr(code) for code in (*range(33, 0x250), *range(0x2B0, 0x300), *range(0x370, 0x460))]
SIGMAS = "ΣΣΣΑαb .'’ʰ\u0345\u0301ªǅⅧⓐ🄰-1中:\u00ad\u200d"


@pytest.fixture(scope="module")
def programs():
    return built(sanitize=False)


def with_settings(bundle, folder, *, sets=8, **settings):
    """A copy with other settings of the host's part of the perturbation. `sets`: the most in one call of the head."""
    shutil.copytree(bundle, folder)
    manifest = read_manifest(folder)
    perturbation = replace(manifest.perturbation, **settings)
    boxes, head = manifest.graph(BOXES), manifest.query_head
    write_boxes_graph(folder, boxes, manifest.token_grid, perturbation)
    values = json.loads((folder / "manifest.json").read_text())
    values["perturbation"] = perturbation.to_dict()
    values["files"][boxes.file] = sha256_of(folder / boxes.file)
    values["graphs"][head.name]["ranges"]["B"]["max"] = sets
    for graph in values["graphs"].values():
        graph["ranges"].get("O", {})["max"] = 8
    (folder / "manifest.json").write_text(json.dumps(values))
    return folder


SETTINGS = {
    "each with stock": None,
    "each": {"sets": 4, "alpha": 4.0, "gamma": -1.0, "keep_stock": False},
    "sum": {"reduction": "sum", "alpha": 4.0, "keep_stock": False},
    "mean, dilated": {"reduction": "mean", "coverage": "dilated", "keep_stock": False},
    "ITM too": {"reduction": "mean"},
    "none": None,
}
"""Each way of putting boxes together; "each" has more sets than a call of its graph takes."""


@pytest.fixture(scope="module")
def bundle_of(request, tmp_path_factory):
    """The bundle of one of `SETTINGS`, made when it is first asked for."""

    @cache
    def make(name):
        if name == "none":
            return request.getfixturevalue("stock_export").folder
        exported = request.getfixturevalue("tiny_bundle" if name == "ITM too" else "demo_bundle")
        if SETTINGS[name] is None:
            return exported
        return with_settings(exported, tmp_path_factory.mktemp("settings") / "bundle", **SETTINGS[name])

    return make


def python_scores(bundle, photos, boxes):
    with Retriever.open(bundle) as retriever, warnings.catch_warnings():
        warnings.simplefilter("ignore", QpertWarning)
        features = retriever.encode_images(photos, boxes=boxes)
        itc = retriever.encoder.encode_texts(TEXTS)
        return features.query_sets.itc_scores(itc), retriever.itm_scores(features, TEXTS)


def cpp_scores(programs, bundle, photos, *arguments):
    texts = [part for text in TEXTS for part in ("--text", text)]
    images = [part for photo in photos for part in ("--image", photo)]
    result = programs.score(bundle, *texts, *images, "--json", *arguments).json
    rows = [[(one["itc"], one["itm"], one["score"]) for one in image["scores"]] for image in result["images"]]
    return np.moveaxis(np.array(rows), 2, 0), [image["boxes"] for image in result["images"]]


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("pixels", ["native", "graph"])
def test_scores_of_photographs_equal_pythons(programs, bundle_of, name, pixels, photos, photo_boxes):
    bundle = bundle_of(name)
    takes_boxes = read_manifest(bundle).query_head.takes_boxes
    stock = cpp_scores(programs, bundle, photos, "--pixels", pixels)
    with_boxes = stock
    if takes_boxes:
        with_boxes = cpp_scores(
            programs, bundle, photos, "--pixels", pixels, "--boxes", photos[0].parent / "boxes.jsonl"
        )
        assert with_boxes[1] == [len(boxes) for boxes in photo_boxes]
        assert np.abs(with_boxes[0][0] - stock[0][0]).max() > 100 * SAME_SCORE, "the boxes changed nothing"
    for (scores, _), boxes in ((stock, None), (with_boxes, photo_boxes if takes_boxes else None)):
        itc, itm = python_scores(bundle, photos, boxes)
        np.testing.assert_allclose(scores[0], itc, rtol=0, atol=SAME_SCORE)
        np.testing.assert_allclose(scores[1], itm, rtol=0, atol=SAME_SCORE)
        np.testing.assert_allclose(scores[2], itm + itc, rtol=0, atol=2 * SAME_SCORE)


def test_boxes_of_the_command_line_are_those_of_a_file(programs, demo_bundle, photos, tmp_path):
    photo = photos[0]
    box = (10.5, 20.0, 200.25, 180.0)
    row = {"image": f"folder/{photo.name}", **dict(zip(("x1", "y1", "x2", "y2"), box, strict=True))}
    (tmp_path / "boxes.jsonl").write_text(json.dumps(row) + "\n\n")
    by_file, counts = cpp_scores(programs, demo_bundle, [photo], "--boxes", tmp_path / "boxes.jsonl")
    by_value, _ = cpp_scores(programs, demo_bundle, [photo], "--boxes", ",".join(map(str, box)))
    assert counts == [1]
    np.testing.assert_array_equal(by_file, by_value)


def test_scores_are_printed_for_people(programs, demo_bundle, photos):
    ended = programs.score(demo_bundle, "--text", "a cat", "--image", photos[0])
    assert ended.code == 0
    assert f"{photos[0]} (512×512, 0 boxes)" in ended.out
    assert "itm" in ended.out
    assert ended.out.rstrip().endswith("a cat")


def verify_gates(bundle):
    with Retriever.open(bundle) as retriever:
        samples = retriever.encoder.bundle.samples()
        found = verify_tensors(retriever.encoder, samples.cases, samples, reference="recorded", provider="cpu")
        return {gate.name: gate.limit for gate in found.gates}


@pytest.mark.parametrize("bundle", ["demo_bundle", "half_bundle"])
def test_recorded_samples_pass_with_the_limits_of_verify(programs, bundle, request):
    folder = request.getfixturevalue(bundle)
    result = programs.score(folder, "--samples", "--json").json
    assert result["verdict"] == "pass"
    limits = {gate["name"]: gate["limit"] for gate in result["gates"]}
    expected = verify_gates(folder)
    assert limits == {name: expected[name] for name in limits}
    behaviour = ("rows independent of neighbours", "effect of boxes", "zero weights", "boxes: ")  # no recorded arrays
    assert [name for name in expected.keys() - limits.keys() if not any(part in name for part in behaviour)] == []
    left_out = {name.partition(": ")[2] for name in expected.keys() - limits.keys()}
    assert left_out == {  # what needs other batch shapes, and Python's own masks
        "rows independent of neighbours",
        "zero weights against no boxes",
        "effect of boxes, relative difference",
        "masks, max abs difference",
        "weights, max abs difference",
    }


def test_a_changed_weight_fails_the_samples(programs, demo_bundle, copy_of):
    folder = copy_of(demo_bundle)
    weights = bytearray((folder / "onnx/vision.data").read_bytes())
    values = np.frombuffer(weights, np.float32).copy()
    values[: values.size // 2] *= 1.01
    (folder / "onnx/vision.data").write_bytes(values.tobytes())
    refused = programs.score(folder, "--samples")
    assert refused.code == 2
    assert "was altered" in refused.err
    ended = programs.score(folder, "--samples", "--skip-hashes")
    assert ended.code == 1
    assert "FAIL" in ended.out


def captions():
    generator = random.Random(1)
    characters = [chr(code) for code in (*range(0x460), *range(0x300, 0x310))]
    pieces = ["a", "b ", "  ", "\n", "\t ", "dog. ", " ", "\x1c", "\x85"]

    def joined(pool, longest, count):
        return ["".join(generator.choices(pool, k=generator.randrange(1, longest))) for _ in range(count)]

    made = [*hostile_captions(3000, special=True, seed=5), *joined(list(SIGMAS), 9, 1500)]
    return [*made, *joined(characters, 60, 1500), *joined(pieces, 260, 300), "[CLS] a [SEP]", "[DEC]", "word " * 10_000]


def vocabulary():
    try:
        return shared_folder("data/vocab") / "bert-base-uncased.txt"
    except pytest.skip.Exception:
        return DEMO_VOCABULARY


@pytest.mark.parametrize("max_length", [35, 100])
def test_ids_of_hostile_captions_equal_pythons(programs, demo_bundle, copy_of, edit_manifest, tmp_path, max_length):
    """With BERT's vocabulary (where it is not here: the demonstration's) and the letters that it lacks, so that other
    characters give other ids. 100: more than 50 words fit, so words are cut, too."""
    known = vocabulary().read_text(encoding="utf-8").splitlines()
    more = [token for letter in LETTERS for token in (letter, f"##{letter}")]
    (tmp_path / "vocab.txt").write_text("\n".join(dict.fromkeys([*known, *more])) + "\n", encoding="utf-8")
    backend = build_tokenizer(tmp_path / "vocab.txt", vocab_size=None)
    spec = TokenizerSpec("tokenizer.json", max_length, backend.get_vocab_size())
    folder = copy_of(demo_bundle)
    (folder / "tokenizer.json").write_text(self_contained(backend, spec).to_str(), encoding="utf-8")
    edit_manifest(folder, lambda values: values["tokenizer"].update(max_length=max_length, vocab_size=spec.vocab_size))
    texts = captions()
    (tmp_path / "texts.json").write_text(json.dumps(texts), encoding="utf-8")
    python, expected = Tokenizer(backend, spec), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QpertWarning)
        for text in texts:
            try:
                expected.append(python.encode([text]).input_ids[0].tolist())
            except TextError:
                expected.append(None)
    got = json.loads(programs.check("tokenize", folder, tmp_path / "texts.json").out)
    assert [text for text, ids, wanted in zip(texts, got, expected, strict=True) if ids != wanted] == []
    assert len({tuple(ids) for ids in expected if ids}) > 4000
    assert None in expected


@pytest.mark.parametrize("other", ["bpe", "sentencepiece"])
def test_other_tokenizers_are_refused(programs, demo_bundle, copy_of, edit_manifest, photos, other):
    folder = copy_of(demo_bundle)
    edit_manifest(folder, lambda values: values["tokenizer"].update(kind=other))
    ended = programs.score(folder, "--text", "a", "--image", photos[0])
    assert ended.code == 2
    assert f"this bundle's tokenizer is {other}" in ended.err


@pytest.mark.parametrize("fields", [{}, {"fit": "crop", "shortest_side": 60}, {"resample": "bilinear"}])
@pytest.mark.parametrize("rounding", ["floor", "half_even"])
def test_pixels_equal_the_graphs_and_pils_bit_for_bit(programs, demo_bundle, tmp_path, photos, fields, rounding):
    """The native pixels, preprocess.onnx and PIL, on photographs, noise and extremes of odd sizes."""
    size = 56 if fields.get("fit") else 112
    image = ImagePreprocessing(size, **{"rounding": rounding, **fields})
    folder = tmp_path / "bundle"
    shutil.copytree(demo_bundle, folder)
    spec = preprocess_spec(image)
    save(preprocess_graph(spec, image), folder, spec)
    values = json.loads((folder / "manifest.json").read_text())
    values["preprocessing"], values["graphs"]["preprocess"] = image.to_dict(), spec.to_dict()
    (folder / "manifest.json").write_text(json.dumps(values))
    rng = np.random.default_rng(0)
    pictures = [np.asarray(load_image(photo)) for photo in photos]
    for width, height in [*ODD_SIZES, (size, size), (size + 1, size - 1)]:
        pictures.append(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        pictures.append((rng.integers(0, 2, (height, width, 3)) * 255).astype(np.uint8))
    arguments = []
    for number, picture in enumerate(pictures):
        picture.tofile(tmp_path / f"{number}.raw")
        arguments += [f"{picture.shape[1]}x{picture.shape[0]}", tmp_path / f"{number}.raw"]
    programs.check("pixels", folder, tmp_path / "pixels", programs.library, *arguments)
    made = np.fromfile(tmp_path / "pixels", np.uint32).reshape(len(pictures), 2, 3, size, size)
    expected = preprocess_images(pictures, image).view(np.uint32)
    for way in (0, 1):
        different = (made[:, way] != expected).reshape(len(pictures), -1).any(axis=1)
        assert np.flatnonzero(different).tolist() == [], ("native", "graph")[way]
