"""Images against stock Hugging Face, an independent bicubic, and cases worked by hand."""

import hashlib
import json
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from shared_data import shared_folder

from qpert.runtime.errors import ImageError, InputError
from qpert.runtime.inputs.images import image_size, load_image, preprocess_images, resize
from qpert.runtime.inputs.preprocessing import ImagePreprocessing

PHOTOS = Path(__file__).parents[3] / "examples" / "photos"
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def pixels(source):
    return np.asarray(load_image(source))


def numpy_bicubic(image, size):
    """PIL's filter as its documentation describes it: Keys' cubic with a = -0.5, the support scaled when shrinking."""

    def matrix(length):
        scale = length / size
        stretch = max(scale, 1.0)
        centres = (np.arange(size)[:, None] + 0.5) * scale
        x = np.abs((np.arange(length)[None] + 0.5 - centres) / stretch)
        a = -0.5
        near = (a + 2) * x**3 - (a + 3) * x**2 + 1
        far = a * (x**3 - 5 * x**2 + 8 * x - 4)
        weights = np.where(x < 1, near, np.where(x < 2, far, 0))
        return weights / weights.sum(axis=1, keepdims=True)

    array = np.asarray(image, np.float64)
    wide = np.einsum("sw,hwc->hsc", matrix(array.shape[1]), array)
    wide = np.clip(np.round(wide), 0, 255)  # PIL keeps 8 bits between the two passes
    return np.clip(np.round(np.einsum("sh,hwc->swc", matrix(array.shape[0]), wide)), 0, 255)


@pytest.mark.parametrize("size", [224, 364])
@pytest.mark.parametrize("name", ["astronaut.jpg", "rocket.jpg"])
def test_pixel_values_are_those_of_the_stock_hugging_face_processor(name, size):
    transformers = pytest.importorskip("transformers")
    stock = transformers.BlipImageProcessorPil(size={"height": size, "width": size})
    image = Image.open(PHOTOS / name).convert("RGB")
    expected = stock(image, return_tensors="np")["pixel_values"]
    actual = preprocess_images([PHOTOS / name], ImagePreprocessing(size))
    assert actual.shape == (1, 3, size, size)
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, expected, atol=1e-6, rtol=0)  # same bytes; float32 operations in another order


@pytest.mark.parametrize("size", [64, 480])
def test_the_resize_is_the_antialiased_bicubic(size):
    image = load_image(PHOTOS / "chelsea.jpg")
    identity = ImagePreprocessing(size, mean=(0, 0, 0), std=(1, 1, 1))
    actual = preprocess_images([image], identity)[0].transpose(1, 2, 0)
    # One level of tolerance: PIL's weights are fixed-point, so what lies near a half may round the other way.
    np.testing.assert_allclose(actual, numpy_bicubic(image, size) / 255, atol=1.001 / 255, rtol=0)


def patterned(width, height):
    """A uint8 [H,W,3] picture from whole-number arithmetic alone, the same on every machine and NumPy."""
    shape = (np.arange(length, dtype=np.int64) for length in (height, width, 3))
    y, x, channel = np.meshgrid(*shape, indexing="ij")
    mixed = (x * 7919 + y * 104729 + channel * 1299709 + x * y * 31) % 65521
    return (mixed * mixed // 251 % 256).astype(np.uint8)


GOLDEN = json.loads((Path(__file__).parents[2] / "fixtures" / "resize" / "pillow12.json").read_text())
"""Of `patterned` pictures resized by one call of Pillow 10.4.0 and 12.0.0, which agree: "97x640 56x56 bicubic" to the
first 16 digits of the SHA-256 of the pixels. 33 of the 156 are other pixels where Pillow 13.0.0 resizes in one call."""


def golden(image, size, resample):
    name = f"{image.width}x{image.height} {size[0]}x{size[1]} {resample}"
    return hashlib.sha256(np.asarray(resize(image, size, resample)).tobytes()).hexdigest()[:16] == GOLDEN[name]


@pytest.mark.parametrize("shape", sorted({name.split()[0] for name in GOLDEN}))
def test_the_resize_gives_pillow_12s_bytes_on_every_pillow(shape):
    image = Image.fromarray(patterned(*map(int, shape.split("x"))))
    wanted = [name.split()[1:] for name in GOLDEN if name.split()[0] == shape]
    assert len(wanted) == 12
    wrong = [
        (size, resample) for size, resample in wanted if not golden(image, tuple(map(int, size.split("x"))), resample)
    ]
    assert wrong == []


@pytest.mark.parametrize("shape", ["97x640", "480x640", "31x1999"])
def test_pixel_values_and_both_references_take_the_columns_of_a_tall_picture_first(tmp_path, shape):
    from qpert.exporter.references.pixels import picture_pixels
    from qpert.exporter.references.recording import pixels_of

    picture = patterned(*map(int, shape.split("x")))
    Image.fromarray(picture).save(tmp_path / "tall.png")
    bytes_of = ImagePreprocessing(364, mean=(0, 0, 0), std=(1, 1, 1))
    levels = np.rint(preprocess_images([picture], bytes_of)[0] * 255).astype(np.uint8).transpose(1, 2, 0)
    digest = hashlib.sha256(np.ascontiguousarray(levels).tobytes()).hexdigest()[:16]
    assert digest == GOLDEN[f"{shape} 364x364 bicubic"]
    expected = preprocess_images([picture], ImagePreprocessing(364))[0]
    np.testing.assert_allclose(pixels_of(picture, ImagePreprocessing(364)), expected, atol=1e-6, rtol=0)
    np.testing.assert_allclose(
        picture_pixels(tmp_path / "tall.png", ImagePreprocessing(364)), expected, atol=1e-6, rtol=0
    )


def test_a_constant_colour_is_normalised_as_worked_by_hand():
    image = np.empty((5, 9, 3), np.uint8)
    image[:] = (51, 102, 255)
    values = preprocess_images([image], ImagePreprocessing(4))
    assert values.shape == (1, 3, 4, 4)
    for channel, byte in enumerate((0.2, 0.4, 1.0)):
        np.testing.assert_allclose(values[0, channel], (byte - MEAN[channel]) / STD[channel], rtol=1e-6)


def test_paths_pil_images_and_arrays_give_the_same_rows():
    path = PHOTOS / "coffee.jpg"
    image = Image.open(path)
    rows = preprocess_images([path, str(path), image, np.asarray(image)], ImagePreprocessing(56))
    for row in rows[1:]:
        np.testing.assert_array_equal(row, rows[0])


def test_no_images_give_an_empty_batch():
    assert preprocess_images([], ImagePreprocessing(28)).shape == (0, 3, 28, 28)


def test_a_loaded_image_loads_again_unchanged():
    once = load_image(PHOTOS / "rocket.jpg")
    np.testing.assert_array_equal(pixels(once), np.asarray(once))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_alpha_is_dropped_without_compositing(tmp_path, mode):
    image = Image.new("RGBA", (3, 2), (200, 200, 200, 0)).convert(mode)
    np.testing.assert_array_equal(pixels(image), np.full((2, 3, 3), 200))


def test_a_transparent_palette_keeps_its_colours_and_says_nothing(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    image.save(tmp_path / "p.png", transparency=bytes([0, 128]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(pixels(tmp_path / "p.png"), [[[10, 20, 30], [40, 50, 60]]])


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("L", 77, (77, 77, 77)),
        ("1", 1, (255, 255, 255)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("YCbCr", (9, 128, 128), (9, 9, 9)),
    ],
)
def test_other_modes_become_rgb(mode, colour, expected):
    np.testing.assert_array_equal(pixels(Image.new(mode, (2, 2), colour))[0, 0], expected)


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_16_bit_grey_is_scaled_not_clipped(mode):
    image = Image.new(mode, (5, 1))
    for x, value in enumerate([0, 257, 257 * 128, 32768, 65535]):
        image.putpixel((x, 0), value)
    np.testing.assert_array_equal(pixels(image)[0, :, 0], [0, 1, 128, 128, 255])  # 32768 / 257 = 127.502


def test_a_16_bit_png_file_is_scaled(tmp_path):
    Image.fromarray(np.array([[0, 65535, 32896]], np.uint16)).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(pixels(tmp_path / "deep.png")[0, :, 1], [0, 255, 128])


@pytest.mark.parametrize("mode", ["I", "I;16", "I;16B"])
def test_integers_that_fit_in_8_bits_are_8_bit_levels_as_for_pil_itself(mode):
    image = Image.new(mode, (4, 1))
    for x, value in enumerate([0, 7, 128, 255]):
        image.putpixel((x, 0), value)
    np.testing.assert_array_equal(pixels(image)[0, :, 2], [0, 7, 128, 255])
    if mode == "I":
        np.testing.assert_array_equal(pixels(image), np.asarray(image.convert("RGB")))


def test_a_32_bit_tiff_of_8_bit_values_is_not_black(tmp_path):
    values = np.arange(48, dtype=np.int32).reshape(6, 8) * 5
    Image.fromarray(values).save(tmp_path / "deep.tif")
    np.testing.assert_array_equal(pixels(tmp_path / "deep.tif"), np.repeat(values[..., None], 3, axis=2))


def test_negative_integers_are_refused():
    with pytest.raises(ImageError) as caught:
        load_image(Image.new("I", (2, 2), -1))
    assert caught.value.code == "image-range"


TURNS = {
    1: lambda seen: seen,
    2: lambda seen: seen[:, ::-1],
    3: lambda seen: seen[::-1, ::-1],
    4: lambda seen: seen[::-1],
    5: lambda seen: seen.transpose(1, 0, 2),
    6: lambda seen: np.rot90(seen, -1),
    7: lambda seen: seen[::-1, ::-1].transpose(1, 0, 2),
    8: lambda seen: np.rot90(seen),
    9: lambda seen: seen,
    0: lambda seen: seen,
}
"""What EXIF's orientations mean for an array [H,W,3] (EXIF 2.32, tag 0x0112); others mean nothing."""

CARRIERS = ("jpg", "mpo", "png", "webp", "tif", "avif", "jfif")


def written(folder, suffix, orientation, shape=(24, 40)):
    """A picture of four flat quarters, so that lossy formats keep them, with an orientation in its EXIF or TIFF tag."""
    if suffix == "avif":
        pytest.importorskip("PIL._avif")
    array = np.zeros((*shape, 3), np.uint8)
    middle, centre = shape[0] // 2, shape[1] // 2
    array[:middle, :centre], array[:middle, centre:] = (230, 20, 20), (20, 230, 20)
    array[middle:, :centre], array[middle:, centre:] = (20, 20, 230), (230, 230, 20)
    path = folder / f"picture.{suffix}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"exif": exif} if suffix != "tif" else {"tiffinfo": {0x0112: orientation}}
    kinds = {"jfif": "JPEG", "mpo": "MPO"}
    more = {"save_all": True, "append_images": [Image.new("RGB", shape[::-1])]} if suffix == "mpo" else {}
    Image.fromarray(array).save(path, kinds.get(suffix), **options, **more)
    return path, array


@pytest.mark.parametrize(
    ("suffix", "orientation"),
    # AVIF stores turns of its own instead of EXIF's number, so there no other number can be written.
    [(suffix, number) for suffix in CARRIERS for number in TURNS if suffix != "avif" or number in range(1, 9)],
)
def test_size_and_pixels_of_every_format_are_those_of_the_picture_as_it_is_seen(tmp_path, suffix, orientation):
    path, stored = written(tmp_path, suffix, orientation)
    seen = TURNS[orientation](stored)
    assert image_size(path) == (seen.shape[1], seen.shape[0])
    assert load_image(path).size == image_size(path)
    # 60 levels of 210 between the colours: lossy formats blur the borders of the quarters, not their centres.
    for row in (0.25, 0.75):
        for column in (0.25, 0.75):
            place = int(seen.shape[0] * row), int(seen.shape[1] * column)
            np.testing.assert_allclose(pixels(path)[place].astype(int), seen[place].astype(int), atol=60)
    np.testing.assert_array_equal(pixels(load_image(path)), pixels(path))
    with Image.open(path) as opened:
        np.testing.assert_array_equal(pixels(opened), pixels(path))


@pytest.mark.parametrize("orientation", [6, 9])
def test_a_tag_that_pil_cannot_write_does_not_matter(tmp_path, orientation):
    array = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
    # EXIF by hand: two entries, Orientation (SHORT) and XResolution (RATIONAL 0/0, not a number).
    entries = struct.pack("<HHIHH", 0x0112, 3, 1, orientation, 0) + struct.pack("<HHII", 0x011A, 5, 1, 38)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + struct.pack("<I", 0) + struct.pack("<II", 0, 0)
    Image.fromarray(array).save(tmp_path / "a.png", exif=exif)
    seen = TURNS[orientation](array)
    np.testing.assert_array_equal(pixels(tmp_path / "a.png"), seen)
    assert image_size(tmp_path / "a.png") == (seen.shape[1], seen.shape[0])


def test_exif_that_cannot_be_read_turns_nothing(tmp_path):
    array = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
    Image.fromarray(array).save(tmp_path / "a.png", exif=b"Exif\0\0no TIFF header here")
    np.testing.assert_array_equal(pixels(tmp_path / "a.png"), array)
    assert image_size(tmp_path / "a.png") == (7, 5)


def test_the_size_of_what_is_no_picture_is_refused_as_loading_it_is(tmp_path):
    (tmp_path / "a.jpg").write_text("no picture")
    with pytest.raises(ImageError) as caught:
        image_size(tmp_path / "a.jpg")
    assert caught.value.code == "image-format"
    with pytest.raises(ImageError) as caught:
        image_size(tmp_path / "b.jpg")
    assert caught.value.code == "image-missing"


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_exif_orientation_is_honoured(tmp_path, suffix):
    image = Image.new("RGB", (32, 16), (250, 0, 0))
    image.paste((0, 0, 250), (0, 0, 16, 16))  # blue on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise when shown: left becomes top
    path = tmp_path / f"turned.{suffix}"
    image.save(path, exif=exif)
    with Image.open(path) as opened:
        for seen in (pixels(path), pixels(opened)):
            assert seen.shape == (32, 16, 3)
            assert seen[4, 8, 2] > 200 > 100 > seen[28, 8, 2]
        assert opened.size == (32, 16), "the caller's image was changed"
    np.testing.assert_array_equal(pixels(load_image(path)), pixels(path))


def test_of_an_animation_the_first_frame_is_used(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(pixels(tmp_path / "a.gif")[0, 0], (255, 0, 0))


def test_a_one_pixel_wide_image_is_an_image():
    assert np.isfinite(preprocess_images([np.zeros((500, 1, 3), np.uint8)], ImagePreprocessing(14))).all()


def jpeg_bytes():
    return (PHOTOS / "chelsea.jpg").read_bytes()


def png_of(width, height):
    """A PNG that claims a size and breaks off after its first few bytes of pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 20))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty file"),
        (b"no image at all, just a sentence", "not an image"),
        (jpeg_bytes()[:3000], "broken or truncated"),
        (png_of(10, 10), "broken or truncated"),
        (png_of(0, 10), "bad.png"),
        (png_of(60_000, 60_000), "too large to open safely"),
        (b"GIF89a\x04\x00\x04\x00\x00\x00\x00", "bad.png"),
    ],
    ids=["empty", "text", "truncated JPEG", "truncated PNG", "zero width", "bomb", "GIF without frames"],
)
def test_a_bad_file_is_an_error_that_names_it(tmp_path, content, message):
    path = tmp_path / "bad.png"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=message) as caught:
        load_image(path)
    assert "bad.png" in str(caught.value)


def test_a_damaged_photograph_never_crashes(tmp_path):
    random = np.random.default_rng(0)
    original = np.frombuffer(jpeg_bytes(), np.uint8)
    for trial in range(40):
        damaged = original.copy()
        damaged[random.integers(0, 700, 12)] = random.integers(0, 256, 12)
        path = tmp_path / f"{trial}.jpg"
        path.write_bytes(damaged.tobytes())
        try:
            array = pixels(path)
        except ImageError as error:
            assert f"{trial}.jpg" in str(error)  # noqa: PT017  (most damaged files still decode)
        else:
            assert array.shape[2] == 3


def test_a_missing_file_a_folder_and_an_impossible_path_are_errors(tmp_path):
    with pytest.raises(ImageError, match=r"gone\.jpg does not exist"):
        load_image(tmp_path / "gone.jpg")
    with pytest.raises(ImageError, match="is a folder"):
        load_image(tmp_path)
    with pytest.raises(ImageError, match=r"cannot be opened|does not exist"):
        load_image("a\0b.jpg")


def test_pil_images_of_zero_size_and_of_floats_are_errors():
    with pytest.raises(ImageError, match="zero size: 0×5"):
        load_image(Image.new("RGB", (0, 5)))
    with pytest.raises(ImageError, match="mode F"):
        load_image(Image.new("F", (3, 3)))
    with pytest.raises(ImageError, match=r"70000.*expected 0…65535"):
        load_image(Image.new("I", (2, 2), 70_000))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 4, 3), np.float32), r"float32 \[4, 4, 3\]; expected uint8 \[H,W,3\]"),
        (np.zeros((3, 4, 4), np.uint8), r"uint8 \[3, 4, 4\]"),
        (np.zeros((4, 4), np.uint8), r"uint8 \[4, 4\]"),
        (np.zeros((4, 4, 4), np.uint8), r"uint8 \[4, 4, 4\]"),
        (np.zeros((0, 4, 3), np.uint8), "empty"),
        (b"bytes", "is a bytes; expected a path"),
    ],
)
def test_other_inputs_are_errors_that_say_what_was_got(array, message):
    with pytest.raises(ImageError, match=message) as caught:
        preprocess_images([np.zeros((4, 4, 3), np.uint8), array], ImagePreprocessing(14))
    assert "image 1" in str(caught.value)


def test_one_image_in_place_of_a_list_is_an_error():
    with pytest.raises(ImageError, match="put it in a list"):
        preprocess_images("photo.jpg", ImagePreprocessing(14))


def test_preprocessing_survives_the_manifest():
    preprocessing = ImagePreprocessing(364)
    assert preprocessing.to_dict() == {
        "size": 364,
        "mean": list(MEAN),
        "std": list(STD),
        "resample": "bicubic",
        "fit": "squash",
    }
    assert ImagePreprocessing.from_dict(preprocessing.to_dict()) == preprocessing


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 0}, "image size is 0"),
        ({"size": "224"}, "image size is '224'"),
        ({"mean": [0.5, 0.5]}, "mean is"),
        ({"mean": [0.5, 0.5, float("nan")]}, "finite"),
        ({"std": [1, 0, 1]}, "above 0"),
        ({"resample": "area"}, "resample is 'area'"),
        ({"crop": True}, "expected \\["),
        ({"fit": "stretch"}, "fit is 'stretch'"),
        ({"fit": "crop"}, "shortest_side is 0"),
        ({"fit": "crop", "shortest_side": 223}, "shortest_side is 223"),
        ({"rounding": "up"}, "rounding is 'up'"),
    ],
)
def test_unusable_preprocessing_is_an_error(change, message):
    with pytest.raises(InputError, match=message):
        ImagePreprocessing.from_dict({**ImagePreprocessing(224).to_dict(), **change})


def test_the_pictures_of_public_reports_load_as_pil_reads_them():
    cases = shared_folder("cases/img")
    with Image.open(cases / "i32_8bit.tif") as deep:
        np.testing.assert_array_equal(pixels(cases / "i32_8bit.tif"), np.asarray(deep.convert("RGB")))
        assert pixels(cases / "i32_8bit.tif").max() > 100
    with Image.open(cases / "exif9.jpg") as plain:
        np.testing.assert_array_equal(pixels(cases / "exif9.jpg"), np.asarray(plain.convert("RGB")))
        assert image_size(cases / "exif9.jpg") == plain.size
    with Image.open(cases / "exif_srational.jpg") as side:
        turned = side.convert("RGB").transpose(Image.Transpose.ROTATE_270)
    np.testing.assert_array_equal(pixels(cases / "exif_srational.jpg"), np.asarray(turned))
    assert image_size(cases / "exif_srational.jpg") == turned.size
