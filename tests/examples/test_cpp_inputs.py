"""What strangers hand to `examples/cpp`: pictures of every kind, decoded as by PIL, and damage, refused clearly."""

import io
import json
import random
import shutil
import subprocess

import numpy as np
import pytest
from cpp_programs import ONNXRUNTIME, built
from PIL import Image

from qpert.runtime.errors import ImageError
from qpert.runtime.files import sha256_of
from qpert.runtime.inputs.images import ORIENTATION, load_image

pytestmark = pytest.mark.slow

MUTATIONS = 400
"""Damaged files that the sanitized build reads, of each kind about a quarter."""


@pytest.fixture(scope="module")
def programs():
    return built(sanitize=False)


@pytest.fixture(scope="module")
def sanitized():
    return built(sanitize=True)


@pytest.fixture(scope="module")
def scene():
    """A colourful picture of odd size, with edges."""
    y, x = np.mgrid[:83, :121]
    pixels = np.stack([x * 2, y * 3, (x * y) % 256], axis=2).astype(np.uint8)
    pixels[20:40, 30:70] = (250, 20, 30)
    return Image.fromarray(pixels)


def exif(orientation):
    block = Image.Exif()
    block[ORIENTATION] = orientation
    return block


def jpeg_files(scene):
    yield "plain.jpg", scene, {"quality": 90}
    yield "sharp.jpg", scene, {"quality": 95, "subsampling": 0}
    yield "progressive.jpg", scene, {"progressive": True}
    yield "grey.jpg", scene.convert("L"), {}
    yield "cmyk.jpg", scene.convert("CMYK"), {}
    yield "restarts.jpg", scene, {"restart_marker_rows": 1}
    for orientation in range(10):
        yield f"turned-{orientation}.jpg", scene, {"exif": exif(orientation)}
    yield "xmp.jpg", scene, {"xmp": b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'}


def png_files(scene):
    ramp = np.arange(83 * 121).reshape(83, 121)
    yield "rgb.png", scene, {}
    yield "rgba.png", scene.convert("RGBA"), {}
    yield "grey.png", scene.convert("L"), {}
    yield "grey-alpha.png", scene.convert("LA"), {}
    yield "one-bit.png", scene.convert("1"), {}
    for colours in (2, 4, 16, 200):
        yield f"palette-{colours}.png", scene.quantize(colours), {}
    yield "transparent.png", scene.quantize(16), {"transparency": 3}
    yield "grey-16.png", Image.fromarray((ramp * 6).astype(np.uint16)), {}
    yield "grey-16-small.png", Image.fromarray((ramp % 256).astype(np.uint16)), {}
    yield "turned.png", scene, {"exif": exif(8)}


def test_pictures_of_every_kind_are_decoded_as_by_pil(programs, scene, tmp_path, photos):
    files = list(photos)
    for name, picture, options in (*jpeg_files(scene), *png_files(scene)):
        picture.save(tmp_path / name, **options)
        files.append(tmp_path / name)
    assert len(files) > 30
    for file in files:
        made = programs.decode(file, tmp_path / "raw")
        assert made is not None, file.name
        np.testing.assert_array_equal(made, np.asarray(load_image(file)), err_msg=file.name)


def pil_reads(file):
    try:
        return np.asarray(load_image(file))
    except ImageError:
        return None


@pytest.mark.parametrize("kind", ["plain.jpg", "progressive.jpg", "rgb.png"])
def test_truncated_pictures_are_refused_as_by_pil(programs, scene, tmp_path, kind):
    """Of the PNG, 12 bytes are its end mark, without which the picture is whole."""
    (options,) = [options for name, _, options in (*jpeg_files(scene), *png_files(scene)) if name == kind]
    scene.save(tmp_path / kind, **options)
    whole = (tmp_path / kind).read_bytes()
    refused = 0
    for length in (1, 2, 3, 20, len(whole) // 3, len(whole) // 2, len(whole) - 40, len(whole) - 12, len(whole) - 2):
        file = tmp_path / f"cut-{length}-{kind}"
        file.write_bytes(whole[:length])
        expected, made = pil_reads(file), programs.decode(file, tmp_path / "raw")
        assert (made is None) == (expected is None), f"{length} of {len(whole)} bytes"
        refused += made is None
        if made is not None:
            np.testing.assert_array_equal(made, expected)
    assert refused >= 6


def set_schema(folder, edit):
    edit(folder, lambda values: values.update(schema_version=3))


def remove_data(folder, edit):
    (folder / "onnx/vision.data").unlink()


def shorten_data(folder, edit):
    data = (folder / "onnx/qformer.data").read_bytes()
    (folder / "onnx/qformer.data").write_bytes(data[:-1])


def climb(folder, edit):
    edit(folder, lambda values: values["graphs"]["text"].update(file="../outside.onnx"))


def link_out(folder, edit):
    (folder / "tokenizer.json").rename(folder.parent / "tokenizer.json")
    (folder / "tokenizer.json").symlink_to(folder.parent / "tokenizer.json")


def break_json(folder, edit):
    (folder / "manifest.json").write_text("[" * 100_000)


def no_role(folder, edit):
    edit(folder, lambda values: values["graphs"].pop("text"))


def unhashed(folder, edit):
    edit(folder, lambda values: values["files"].pop("onnx/text.onnx"))


def no_manifest(folder, edit):
    (folder / "manifest.json").unlink()


DAMAGES = {
    set_schema: "has schema version 3, this program reads version 2",
    remove_data: "vision.data is missing from the bundle",
    shorten_data: "qformer.data was altered",
    climb: "'../outside.onnx', which is outside the bundle",
    link_out: "a link there leads out of the bundle",
    break_json: "cannot be read as JSON",
    no_role: "0 graphs of role text_tower",
    unhashed: "no hash for onnx/text.onnx",
    no_manifest: "holds no manifest.json",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_bundles_are_refused(programs, demo_bundle, copy_of, edit_manifest, photos, damage):
    folder = copy_of(demo_bundle)
    damage(folder, edit_manifest)
    for arguments in (("--samples",), ("--text", "a cat", "--image", photos[0])):
        ended = programs.score(folder, *arguments)
        assert ended.code == 2
        assert DAMAGES[damage] in ended.err
        assert ended.err.startswith("error: ")
        assert ended.err.count("\n") == 1
        assert ended.out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--boxes", "1,2,nan,4"], "is not finite"),
        (["--boxes", "30,2,10,4"], "is inverted"),
        (["--boxes", "10,2,10,4"], "is empty"),
        (["--boxes", "1,2,3"], "is no box"),
        (["--boxes", "900,900,950,950"], "lies outside the image of 512×512 pixels"),
        (["--boxes", "missing.jsonl"], "does not exist"),
        (["--boxes", "0,0,9,9"] * 40, "has 40 boxes, this bundle takes up to 32"),
        (["--text", " \n"], "a text is blank"),
        (["--text", b"a \xff dog"], "is not valid UTF-8"),
        (["--image", "missing.jpg"], "does not exist"),
        (["--threads", "-1"], "expected a whole number"),
        (["--colour", "red"], "--colour is not an option"),
        (["--text"], "--text needs a value"),
    ],
)
def test_bad_arguments_are_refused(programs, demo_bundle, photos, arguments, message):
    command = [
        str(programs.folder / "qpert-cpp"),
        str(demo_bundle),
        "--text",
        "a cat",
        "--image",
        str(photos[0]),
        *arguments,
    ]
    environment = {"QPERT_ONNXRUNTIME": str(ONNXRUNTIME)}
    ended = subprocess.run(command, capture_output=True, env=environment)
    assert ended.returncode == 2
    assert ended.stdout == b""
    assert message in ended.stderr.decode()
    assert ended.stderr.count(b"\n") == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"image": "a.jpg", "x1": NaN, "y1": 0, "x2": 5, "y2": 5}', "is not finite"),
        ('{"image": "a.jpg", "x1": 1, "y1": 0, "x2": 5}', "has no y2"),
        ('{"image": "a.jpg", "x1": "1", "y1": 0, "x2": 5, "y2": 5}', "no number"),
        ("{", "is not JSON"),
        ("[1]", "no JSON object"),
    ],
)
def test_bad_lines_of_box_files_are_named(programs, demo_bundle, photos, tmp_path, line, message):
    file = tmp_path / "boxes.jsonl"
    file.write_text('{"image": "b.jpg", "x1": 1, "y1": 0, "x2": 5, "y2": 5}\n' + line + "\n")
    ended = programs.score(demo_bundle, "--text", "a", "--image", photos[0], "--boxes", file)
    assert ended.code == 2
    assert f"{file}:2" in ended.err
    assert message in ended.err


def test_boxes_over_the_edge_are_clipped_with_a_warning(programs, demo_bundle, photos):
    def itc(box):
        ended = programs.score(demo_bundle, "--text", "a cat", "--image", photos[0], "--boxes", box, "--json")
        return ended.json["images"][0]["scores"][0]["itc"], ended.err, ended.json["images"][0]["boxes"]

    over, inside = itc("400,400,600,530"), itc("400,400,512,512")
    assert over[0] == inside[0]
    assert "clipped to it" in over[1]
    assert inside[1] == ""
    beside = itc("512,0,530,20")
    assert beside[2] == 0
    assert "left out" in beside[1]


def test_a_text_of_ten_thousand_words_is_cut_with_a_warning(programs, demo_bundle, photos):
    ended = programs.score(demo_bundle, "--text", "word " * 10_000, "--image", photos[0])
    assert ended.code == 0
    assert "longer than the limit of 35 tokens and were truncated" in ended.err


def test_without_the_library_the_machine_cannot(programs, demo_bundle, photos, tmp_path):
    arguments = (demo_bundle, "--text", "a", "--image", photos[0])
    for path, message in (
        (tmp_path / "none.so", "cannot be opened"),
        (old_library(tmp_path), "expected 1.21 or later"),
    ):
        ended = programs.score(*arguments, "--onnxruntime", path)
        assert ended.code == 3
        assert message in ended.err
        assert programs.score(*arguments, environment={"QPERT_ONNXRUNTIME": str(path)}).err == ended.err


def old_library(folder):
    """A library with ONNX Runtime's entry point that says it is 1.20.1 and has no API but 20."""
    (folder / "old.c").write_text(
        "#include <stddef.h>\n"
        "static const void* api(unsigned version) { return version > 20 ? NULL : (void*)1; }\n"
        'static const char* version(void) { return "1.20.1"; }\n'
        "static const struct { const void* (*a)(unsigned); const char* (*v)(void); } base = {api, version};\n"
        "const void* OrtGetApiBase(void) { return &base; }\n"
    )
    subprocess.run(["cc", "-shared", "-fPIC", "-o", folder / "old.so", folder / "old.c"], check=True)
    return folder / "old.so"


def mutated(data, generator):
    """The bytes with some changed, cut, repeated or inserted."""
    made = bytearray(data)
    for _ in range(generator.choice([1, 2, 5, 20])):
        place = generator.randrange(len(made)) if made else 0
        way = generator.randrange(5)
        if way == 0 and made:
            made[place] = generator.randrange(256)
        elif way == 1 and made:
            made[place] ^= 1 << generator.randrange(8)
        elif way == 2:
            del made[place : place + generator.choice([1, 4, 64])]
        elif way == 3:
            made[place:place] = made[place : place + generator.choice([1, 8, 200])]
        else:
            made[place:place] = generator.choice(
                [b"\xff" * 4, b"0" * 40, b"-1", b"1e999", b"[" * 50, b"null", b"\x00" * 8]
            )
    return bytes(made[: generator.randrange(len(made) + 1)]) if generator.random() < 0.1 else bytes(made)


ODD = (None, -1, 0, 1e300, 2**63, True, "", "x", "../x", [], {}, [[]], {"type": "x"}, "\ud7ff" * 9)


def with_odd_value(values, generator):
    """JSON in which one value, at any depth, is another."""
    place, made = values, None
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = generator.choice(keys)
        inner = place[key]
        if not isinstance(inner, dict | list) or not inner or generator.random() < 0.15:
            made, place[key] = inner, generator.choice(ODD)
            return values if made != place[key] else with_odd_value(values, generator)
        place = inner


def damaged_pictures(scene, folder, generator, count):
    whole = []
    for name, picture, options in (*jpeg_files(scene), *png_files(scene)):
        stream = io.BytesIO()
        picture.save(stream, name.rpartition(".")[2].replace("jpg", "jpeg"), **options)
        whole.append(stream.getvalue())
    for number in range(count):
        file = folder / f"picture-{number}"
        file.write_bytes(mutated(generator.choice(whole), generator))
        yield "picture", file


def damaged_boxes(folder, generator, count, photos):
    whole = b"".join((photos[0].parent / "boxes.jsonl").read_bytes().splitlines(keepends=True)[:6])
    for number in range(count):
        file = folder / f"boxes-{number}.jsonl"
        file.write_bytes(mutated(whole, generator))
        yield "boxes", file


def damaged_bundles(bundle, folder, generator, count):
    """Bundles with a damaged manifest, tokenizer or samples, whose hashes are right all the same, so that what is
    behind the hashes is reached. Large files are links to the whole ones' copies."""
    shutil.copytree(bundle, folder / "whole")
    tokenizer = json.loads((bundle / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = dict(list(tokenizer["model"]["vocab"].items())[:30])  # the rest would be most of it
    for number in range(count):
        copy = folder / f"bundle-{number}"
        shutil.copytree(bundle, copy, copy_function=lambda source, target: None)
        for file in bundle.rglob("*"):
            if file.is_file():
                target = copy / file.relative_to(bundle)
                target.hardlink_to(folder / "whole" / file.relative_to(bundle))
        victim = copy / generator.choice(["manifest.json", "manifest.json", "tokenizer.json", "samples.safetensors"])
        whole = victim.read_bytes()
        if victim.name == "tokenizer.json":
            whole = json.dumps(tokenizer).encode()
        head = len(whole) if victim.suffix == ".json" else 6000
        if number % 2 and victim.suffix == ".json":
            damaged = json.dumps(with_odd_value(json.loads(whole), generator)).encode()
        else:
            damaged = mutated(whole[:head], generator) + whole[head:]
        victim.unlink()
        victim.write_bytes(damaged)
        if victim.name != "manifest.json":
            values = json.loads((bundle / "manifest.json").read_text())
            values["files"][victim.name] = sha256_of(victim)
            (copy / "manifest.json").unlink()
            (copy / "manifest.json").write_text(json.dumps(values))
        yield "bundle", copy


def test_sanitizers_find_nothing_in_damaged_files(sanitized, demo_bundle, scene, tmp_path, photos):
    generator = random.Random(7)
    quarter = MUTATIONS // 4
    cases = [
        *damaged_pictures(scene, tmp_path, generator, 2 * quarter),
        *damaged_boxes(tmp_path, generator, quarter, photos),
        *damaged_bundles(demo_bundle, tmp_path, generator, quarter),
    ]
    (tmp_path / "list").write_text("".join(f"{kind} {path}\n" for kind, path in cases))
    results = sanitized.check("abuse", ONNXRUNTIME, tmp_path / "list").out.splitlines()
    assert len(results) == MUTATIONS
    unexplained = [case for case, result in zip(cases, results, strict=True) if result.startswith("exception")]
    assert unexplained == []
    refused = {kind: {r for (k, _), r in zip(cases, results, strict=True) if k == kind} for kind, _ in cases}
    assert {"image-broken", "ok"} <= refused["picture"]
    assert {"box-file-json", "ok"} <= refused["boxes"]
    assert {"manifest-unreadable", "manifest-fields", "samples-unreadable"} <= refused["bundle"]
    assert len({result for result in results if result != "ok"}) >= 10


def test_sanitizers_find_nothing_in_whole_files(sanitized, demo_bundle, photos):
    """The whole way, ONNX Runtime included."""
    assert sanitized.score(demo_bundle, "--samples").code == 0
    arguments = [demo_bundle, "--text", "a cat", "--text", "word " * 10_000, "--image", photos[0], "--threads", "2"]
    file = photos[0].parent / "boxes.jsonl"
    for more in ([], ["--boxes", "10,10,200,200"], ["--boxes", file], ["--boxes", "1,2,nan,4"]):
        ended = sanitized.score(*arguments, *more)
        assert ended.code == (2 if "1,2,nan,4" in more else 0), ended.err
        assert "Sanitizer" not in ended.err
        assert "runtime error" not in ended.err
