"""Image processor files against the stock processors: the same pixels, or a refusal by name."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from qpert.exporter.hub.preprocessing import read_fields, read_preprocessing
from qpert.runtime.errors import CheckpointError

PHOTOS = sorted((Path(__file__).parents[3] / "examples" / "photos").glob("*.jpg"))
ODD_SIZES = [(1, 500), (500, 1), (37, 224), (224, 37), (225, 224), (224, 224), (31, 97), (3, 2), (333, 250)]

FILES = {
    "clip, all left out": ("CLIPImageProcessor", {}),
    "openai, old": (
        "CLIPImageProcessor",
        {"feature_extractor_type": "CLIPFeatureExtractor", "size": 224, "crop_size": 224, "resample": 3}
        | {"do_center_crop": True, "do_normalize": True, "do_resize": True}
        | {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]},
    ),
    "openai, 336": (
        "CLIPImageProcessor",
        {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 336}}
        | {"crop_size": {"height": 336, "width": 336}, "rescale_factor": 0.00392156862745098},
    ),
    "another shortest side than crop": ("CLIPImageProcessor", {"size": {"shortest_edge": 61}, "crop_size": 48}),
    "odd margins": ("CLIPImageProcessor", {"size": {"shortest_edge": 62}, "crop_size": [49, 49], "resample": 2}),
    "clip, squashed": (
        "CLIPImageProcessor",
        {"size": {"height": 50, "width": 50}, "do_center_crop": False, "resample": 1},
    ),
    "one number is a square": ("CLIPImageProcessor", {"size": 50, "default_to_square": True, "crop_size": 50}),
    "siglip, all left out": ("SiglipImageProcessor", {}),
    "siglip, 384": (
        "SiglipImageProcessor",
        {"image_processor_type": "SiglipImageProcessor", "size": {"height": 384, "width": 384}, "resample": 3}
        | {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "processor_class": "SiglipProcessor"}
        | {"do_convert_rgb": None, "rescale_factor": 0.00392156862745098},
    ),
    "siglip 2 (bilinear)": ("SiglipImageProcessor", {"size": {"height": 56, "width": 56}, "resample": 2}),
    "one mean for all channels": ("SiglipImageProcessor", {"image_mean": 0.4, "image_std": 0.3, "size": [40, 40]}),
    "not normalised": ("SiglipImageProcessor", {"do_normalize": False, "rescale_factor": 0.01, "size": [40, 40]}),
}
STOCK = {"CLIPImageProcessor": CLIPImageProcessorPil, "SiglipImageProcessor": SiglipImageProcessorPil}


def pictures():
    generator = np.random.default_rng(0)
    noise = [Image.fromarray(generator.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in ODD_SIZES]
    return [Image.open(path).convert("RGB") for path in PHOTOS] + noise


def expected_pixels(picture, facts):
    """The facts, carried out with PIL and NumPy: float32 [3,S,S]."""
    resized = picture.resize(facts.resized(*picture.size), Image.Resampling[facts.resample.upper()])
    left, top = facts.offsets(*picture.size)
    bytes_ = np.asarray(resized.crop((left, top, left + facts.size, top + facts.size)))
    scaled = (bytes_.astype(np.float64) * facts.rescale).astype(np.float32)
    return ((scaled - np.float32(facts.mean)) / np.float32(facts.std)).transpose(2, 0, 1)


@pytest.mark.parametrize("name", FILES)
def test_pixels_equal_the_stock_processors(name):
    kind, values = FILES[name]
    facts = read_fields(Path("preprocessor_config.json"), values, kind)
    stock = STOCK[kind](**values)
    for picture in pictures():
        expected = stock(picture, return_tensors="np")["pixel_values"][0]
        assert expected.shape == (3, facts.size, facts.size)
        np.testing.assert_array_equal(expected_pixels(picture, facts), expected)


def test_what_stock_processors_save_is_read(tmp_path):
    CLIPImageProcessorPil(size={"shortest_edge": 70}, crop_size=60).save_pretrained(tmp_path)
    facts = read_preprocessing(tmp_path, image_size=60, default_type="CLIPImageProcessor")
    assert (facts.fit, facts.size, facts.shortest, facts.resample) == ("crop", 60, 70, "bicubic")
    SiglipImageProcessorPil(size={"height": 48, "width": 48}).save_pretrained(tmp_path)
    facts = read_preprocessing(tmp_path, image_size=48, default_type="CLIPImageProcessor")
    assert (facts.fit, facts.size, facts.mean) == ("squash", 48, (0.5, 0.5, 0.5))


def test_the_processor_file_of_transformers_5_wins(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": 224}))
    nested = {"image_processor": {"image_processor_type": "SiglipImageProcessor", "size": [32, 32]}}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    assert read_preprocessing(tmp_path, image_size=32, default_type="CLIPImageProcessor").fit == "squash"
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "CLIPProcessor"}))
    assert read_preprocessing(tmp_path, image_size=224, default_type="CLIPImageProcessor").fit == "crop"


BAD = [
    ({"image_processor_type": "ViTImageProcessor"}, "preprocessing-unsupported", "ViTImageProcessor"),
    ({"do_something": True}, "preprocessing-unsupported", "do_something"),
    ({"auto_map": {"AutoImageProcessor": "x.Y"}}, "preprocessing-unsupported", "auto_map"),
    ({"do_pad": True}, "preprocessing-unsupported", "do_pad"),
    ({"use_square_size": True}, "preprocessing-unsupported", "use_square_size"),
    ({"do_resize": False}, "preprocessing-unsupported", "do_resize"),
    ({"do_rescale": False}, "preprocessing-unsupported", "do_rescale"),
    ({"do_center_crop": False}, "preprocessing-unsupported", "do_center_crop"),
    ({"do_center_crop": "yes"}, "preprocessing-value", "do_center_crop"),
    ({"size": {"shortest_edge": 224, "longest_edge": 300}}, "preprocessing-unsupported", "longest_edge"),
    ({"size": {"shortest_edge": 200}}, "preprocessing-unsupported", "padded"),
    ({"size": [224, 336]}, "preprocessing-unsupported", "squares"),
    ({"size": {"height": 256, "width": 256}}, "preprocessing-unsupported", "crop_size"),
    ({"size": {"shortest_edge": 0}}, "hub-config-value", "shortest_edge"),
    ({"crop_size": {"shortest_edge": 224}}, "preprocessing-unsupported", "crop_size"),
    ({"resample": 0}, "preprocessing-unsupported", "resample"),
    ({"resample": "bicubic"}, "preprocessing-unsupported", "resample"),
    ({"rescale_factor": -1}, "hub-config-value", "rescale_factor"),
    ({"image_mean": [0.5, 0.5]}, "preprocessing-value", "image_mean"),
    ({"image_std": [0.5, 0, 0.5]}, "preprocessing-value", "image_std"),
]


@pytest.mark.parametrize(("values", "code", "named"), BAD)
def test_what_cannot_be_honoured_is_refused_by_name(values, code, named):
    with pytest.raises(CheckpointError) as caught:
        read_fields(Path("preprocessor_config.json"), values, "CLIPImageProcessor")
    assert caught.value.code == code
    assert named in str(caught.value)


def test_pictures_of_another_size_than_the_tower_takes_are_refused(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text("{}")
    with pytest.raises(CheckpointError) as caught:
        read_preprocessing(tmp_path, image_size=336, default_type="CLIPImageProcessor")
    assert caught.value.code == "preprocessing-size"


def test_a_folder_without_a_processor_is_refused(tmp_path):
    with pytest.raises(CheckpointError) as caught:
        read_preprocessing(tmp_path, image_size=224, default_type="CLIPImageProcessor")
    assert caught.value.code == "hub-file-missing"


def test_another_size_keeps_the_share_that_the_crop_cuts_away():
    facts = read_fields(Path("p"), {"size": {"shortest_edge": 256}, "crop_size": 224}, "CLIPImageProcessor")
    assert (facts.with_size(336).size, facts.with_size(336).shortest) == (336, 384)
    squash = read_fields(Path("p"), {}, "SiglipImageProcessor").with_size(384)
    assert (squash.size, squash.resized(100, 30)) == (384, (384, 384))
