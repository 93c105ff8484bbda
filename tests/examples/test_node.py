"""examples/node gives what the Python runtime gives: pixels, token ids, scores, and errors in one line.

Needs Node and its packages, which `make test-node` (or `make test-all`) installs; skips elsewhere, with the reason.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hostile_captions import hostile_captions
from PIL import Image
from shared_data import shared_folder

from qpert.exporter.families.blip2.tokenizer import build_tokenizer
from qpert.exporter.host_graphs.tokenizer import self_contained
from qpert.runtime import Retriever
from qpert.runtime.inputs.images import load_image, preprocess_images
from qpert.runtime.inputs.text import Tokenizer, TokenizerSpec

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "node"
SCORES = 1e-5
"""Both run the same graphs in ONNX Runtime's CPU kernels, of two versions that may sum in another order: about 1e-6 on
match logits of up to 10, and boxes are float32 here."""
TEXTS = ["A smiling woman astronaut.", "a small red star on the left", "A cat's nose!", "two blue rings (striped)"]


@pytest.fixture(scope="module")
def node() -> str:
    found = shutil.which("node")
    if found is None:
        pytest.skip("Node is not on this machine")
    if not (EXAMPLE / "node_modules" / ".qpert").exists():
        pytest.skip("the packages of examples/node are not installed: run `make test-node`")
    return found


@pytest.fixture
def probe(node: str, tmp_path: Path):
    """Asks examples/node; see node_probe.mjs."""

    def ask(**request) -> dict:
        given = json.dumps({"folder": str(tmp_path), **request})
        script = str(Path(__file__).with_name("node_probe.mjs"))
        done = subprocess.run([node, script], input=given, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return ask


@pytest.fixture
def cli(node: str):
    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run([node, EXAMPLE / "cli.mjs", *map(str, arguments)], capture_output=True, text=True)

    return run


def test_the_example_is_as_short_as_it_says() -> None:
    lines = sum(len(path.read_text().splitlines()) for path in EXAMPLE.glob("*.mjs"))
    assert lines < 300


@pytest.mark.parametrize("alpha", [None, 0.0, 3.5])
def test_scores_are_those_of_python_with_a_query_set_for_each_box(
    probe, demo_bundle, photos, photo_boxes, alpha
) -> None:
    """The demonstration's calibrated settings: reduction `each` with the stock set, weights that grow with the box."""
    compare_scores(probe, demo_bundle, photos, photo_boxes, alpha)


def test_scores_are_those_of_python_where_all_boxes_act_together_on_both_stages(
    probe, both_bundle, photos, photo_boxes
) -> None:
    compare_scores(probe, both_bundle, photos, photo_boxes, None)


def compare_scores(probe, bundle: Path, photos: list[Path], boxes: list, alpha: float | None) -> None:
    given = [boxes[0], None, *boxes[2:]]
    with Retriever.open(bundle) as stock:
        settings = stock.encoder.manifest.perturbation
    settings = settings if alpha is None else replace(settings, alpha=alpha)
    with Retriever.open(bundle, perturbation=settings) as retriever:
        texts = retriever.encode_texts(TEXTS)
        features = retriever.encode_images(photos, given)
        itc, itm = features.query_sets.itc_scores(texts), retriever.itm_scores(features, TEXTS)
        sets = features.query_sets
        matched = [[sets.matched_box(image, text) for text in texts] for image in range(len(photos))]
    requests = [
        {"image": str(photo), "boxes": [] if one is None else one.xyxy.tolist(), "alpha": alpha}
        for photo, one in zip(photos, given, strict=True)
    ]
    if alpha is None:
        for one in requests:
            del one["alpha"]
    found = probe(bundle=str(bundle), texts=TEXTS, score=requests)["scores"]
    np.testing.assert_allclose([one["itc"] for one in found], itc, atol=SCORES, rtol=0)
    np.testing.assert_allclose([one["itm"] for one in found], itm, atol=SCORES, rtol=0)
    assert len({len(one["queries"]) for one in found}) > (1 if settings.splits_boxes else 0)
    if alpha != 0:  # else every set is the stock set, and rounding decides
        assert [[None if box == -1 else box for box in one["matched"]] for one in found] == matched


def pictures() -> list[np.ndarray]:
    rng = np.random.default_rng(5)
    shapes = [(480, 640), (97, 640), (1999, 31), (31, 1999), (40, 50), (5, 7), (1, 1), (300, 1), (364, 364), (365, 363)]
    return [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes] + [
        rng.choice(np.array([0, 255], np.uint8), (113, 111, 3))
    ]


def test_pixels_are_bit_equal(probe, demo_bundle, photos, tmp_path) -> None:
    images = [np.asarray(load_image(photo)) for photo in photos] + pictures()
    request = []
    for index, image in enumerate(images):
        (tmp_path / f"rgb-{index}").write_bytes(image.tobytes())
        request.append([str(tmp_path / f"rgb-{index}"), image.shape[1], image.shape[0]])
    probe(bundle=str(demo_bundle), pixels=request)
    with Retriever.open(demo_bundle) as retriever:
        wanted = preprocess_images(images, retriever.encoder.manifest.preprocessing)
    for index, one in enumerate(wanted):
        found = np.fromfile(tmp_path / f"pixels-{index}", np.float32).reshape(one.shape)
        assert np.array_equal(found, one), f"picture {index} of {images[index].shape}"


def test_pictures_are_decoded_as_python_decodes_them(probe, photos, tmp_path) -> None:
    """libjpeg-turbo on both sides; EXIF orientations; grey, palette, alpha; a colour profile (rocket.jpg)."""
    files = list(photos)
    small = Image.open(photos[0]).convert("RGB").resize((61, 43))
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        files.append(tmp_path / f"turned-{orientation}.jpg")
        small.save(files[-1], exif=exif, quality=90)
    for mode in ("L", "LA", "RGBA", "P", "1"):
        files.append(tmp_path / f"{mode}.png")
        (small.convert("RGB") if mode == "RGBA" else small).convert(mode).save(files[-1])
    transparent = small.convert("RGBA")
    transparent.putalpha(Image.linear_gradient("L").resize(small.size))
    files.append(tmp_path / "transparent.png")
    transparent.save(files[-1])
    files.append(tmp_path / "grey.jpg")
    small.convert("L").save(files[-1])
    sizes = probe(decode=[str(file) for file in files])["sizes"]
    for index, file in enumerate(files):
        wanted = load_image(file)
        assert tuple(sizes[index]) == wanted.size, file.name
        found = np.fromfile(tmp_path / f"decoded-{index}", np.uint8)
        assert np.array_equal(found, np.asarray(wanted).ravel()), file.name


@pytest.mark.filterwarnings("ignore::qpert.runtime.errors.QpertWarning")
def test_ids_of_hostile_captions(probe, demo_bundle) -> None:
    texts = [
        text
        for special in (False, True)
        for seed in range(4)
        for text in hostile_captions(1000, special=special, seed=seed)
    ]
    texts = [text for text in texts if text.strip()]
    assert len(texts) > 7000
    with Retriever.open(demo_bundle) as retriever:
        tokenizer = retriever.encoder.tokenizer
        wanted = [tokenizer.encode([text]).input_ids[0].tolist() for text in texts]
    assert max(map(len, wanted)) == 35, "some are cut"
    found = probe(bundle=str(demo_bundle), ids=texts)["ids"]
    different = [text for text, one, two in zip(texts, found, wanted, strict=True) if one != two]
    assert different == []


@pytest.mark.filterwarnings("ignore::qpert.runtime.errors.QpertWarning")
def test_ids_of_hostile_captions_in_a_large_vocabulary(probe, tmp_path) -> None:
    """BERT's vocabulary and the letters that it lacks, so that different characters give different ids; captions of
    capital sigmas, controls and signs among them. The demonstration's small vocabulary would hide most differences."""
    known = (shared_folder("data/vocab") / "bert-base-uncased.txt").read_text(encoding="utf-8").splitlines()
    letters = [chr(code) for code in (*range(33, 0x250), *range(0x2B0, 0x300), *range(0x370, 0x460))]
    vocabulary = tmp_path / "vocab.txt"
    pieces = [piece for letter in letters for piece in (letter, f"##{letter}")]
    vocabulary.write_text("\n".join(dict.fromkeys([*known, *pieces])) + "\n", encoding="utf-8")
    backend = build_tokenizer(vocabulary, vocab_size=None)
    spec = TokenizerSpec("tokenizer.json", 35, backend.get_vocab_size())
    (tmp_path / "tokenizer.json").write_text(self_contained(backend, spec).to_str(), encoding="utf-8")
    generator = random.Random(1)
    pools = ["ΣΣΣΑαb .'’ʰ\u0345\u0301ªǅⅧⓐ🄰-1中:\u00ad\u200d", "".join(map(chr, range(0x460))), "ab \n\t.\x1c\x85"]
    made = ["".join(generator.choices(pool, k=generator.randrange(1, 60))) for pool in pools for _ in range(1000)]
    texts = [text for text in [*hostile_captions(1500, special=True), *made, "[CLS] a [SEP]", "[DEC]"] if text.strip()]
    plain = Tokenizer(backend, spec)  # cleans in Python
    wanted = [plain.encode([text]).input_ids[0].tolist() for text in texts]
    assert len(set(map(tuple, wanted))) > 3000
    found = probe(tokenizer=str(tmp_path / "tokenizer.json"), spec={"max_length": 35}, ids=texts)["ids"]
    assert [text for text, one, two in zip(texts, found, wanted, strict=True) if one != two] == []


def damaged(bundle: Path, folder: Path, damage) -> Path:
    copy = Path(shutil.copytree(bundle, folder / "damaged"))
    damage(copy)
    return copy


def newer(bundle: Path) -> None:
    path = bundle / "manifest.json"
    path.write_text(path.read_text().replace('"schema_version": 2', '"schema_version": 3'))


def escaping(bundle: Path) -> None:
    path = bundle / "manifest.json"
    path.write_text(path.read_text().replace('"onnx/vision.onnx"', '"../vision.onnx"'))


DAMAGES = {
    "newer schema": (newer, "schema version 3"),
    "no manifest": (lambda bundle: (bundle / "manifest.json").unlink(), "manifest.json"),
    "cut manifest": (
        lambda bundle: (bundle / "manifest.json").write_text('{"schema_version": 2'),
        "no manifest of qpert",
    ),
    "path outside": (escaping, "outside the bundle"),
    "missing data file": (lambda bundle: (bundle / "onnx" / "qformer.data").unlink(), "qformer.data"),
    "altered data file": (
        lambda bundle: (bundle / "onnx" / "qformer.data").write_bytes(b"x"),
        "not the one that was exported",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_bundle_is_one_line_and_exit_code_2(cli, demo_bundle, photos, tmp_path, name) -> None:
    damage, message = DAMAGES[name]
    done = cli(damaged(demo_bundle, tmp_path, damage), "--image", photos[0], "--text", "a dog")
    assert_refused(done, message)


def assert_refused(done: subprocess.CompletedProcess[str], message: str) -> None:
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert message in done.stderr


def test_bad_pictures_texts_and_boxes_are_one_line_and_exit_code_2(cli, demo_bundle, photos, tmp_path) -> None:
    cut, words, empty = tmp_path / "cut.jpg", tmp_path / "words.jpg", tmp_path / "empty.png"
    cut.write_bytes(photos[0].read_bytes()[:30_000])
    words.write_text("no picture")
    empty.touch()
    deep = tmp_path / "deep.png"
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(deep)
    for picture, message in (
        (cut, "no whole picture"),
        (words, "no whole picture"),
        (empty, "no whole picture"),
        (tmp_path / "none.jpg", "no whole picture"),
        (deep, "8-bit"),
    ):
        assert_refused(cli(demo_bundle, "--image", picture, "--text", "a dog"), message)
    picture = ["--image", photos[0]]
    assert_refused(cli(demo_bundle, *picture, "--text", "word " * 10_000), "50000 characters; expected at most 10000")
    assert_refused(cli(demo_bundle, *picture, "--text", " \t"), "blank")
    boxes = tmp_path / "boxes.jsonl"
    for corners, message in {
        "NaN, 1, 9, 9": "box 0 (NaN, 1, 9, 9) is not finite",
        "9, 9, 1, 1": "empty or inverted",
        "600, 9, 700, 99": "lies outside the picture of 512×512",
    }.items():
        names = zip(("x1", "y1", "x2", "y2"), corners.split(", "), strict=True)
        line = ", ".join(f'"{name}": {value}' for name, value in names)
        boxes.write_text(f'{{"image": "{photos[0].name}", {line}}}\n')
        assert_refused(cli(demo_bundle, *picture, "--text", "a dog", "--boxes", boxes), message)
    boxes.write_text("{x1:\n")
    assert_refused(cli(demo_bundle, *picture, "--text", "a dog", "--boxes", boxes), "boxes.jsonl:1 is not JSON")
    assert_refused(cli(demo_bundle, *picture, "--text", "a dog", "--alpha", "much"), "--alpha is much")


def test_the_command_ranks_sentences_as_python_does(cli, demo_bundle, photos, photo_boxes) -> None:
    arguments = [word for text in TEXTS for word in ("--text", text)]
    boxes = ["--boxes", photos[0].parent / "boxes.jsonl"]
    done = cli(demo_bundle, "--image", photos[0], *arguments, *boxes, "--itm", "--json")
    assert done.returncode == 0, done.stderr
    (report,) = json.loads(done.stdout)["images"]
    with Retriever.open(demo_bundle) as retriever:
        hits = retriever.search_texts(photos[0], TEXTS, boxes=photo_boxes[0])
    assert [hit["text"] for hit in report["hits"]] == [hit.text for hit in hits]
    np.testing.assert_allclose(
        [hit["score"] for hit in report["hits"]], [hit.score for hit in hits], atol=SCORES, rtol=0
    )
