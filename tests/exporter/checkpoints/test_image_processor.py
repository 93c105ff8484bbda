"""Image processor files against the stock processors: the same pixels, or a refusal by name."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from qpert.exporter.checkpoints.image_processor import read_fields, read_preprocessing, with_size
from qpert.runtime.errors import CheckpointError
from qpert.runtime.inputs.images import preprocess_images
from qpert.runtime.inputs.preprocessing import ImagePreprocessing

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
    "not normalised": ("SiglipImageProcessor", {"do_normalize": False, "size": [40, 40]}),
    "blip, all left out": ("BlipImageProcessor", {}),
    "blip, one number is a square": (
        "BlipImageProcessor",
        {"size": 56, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
    ),
    "blip, not converted": ("BlipImageProcessor", {"size": {"height": 42, "width": 42}, "do_convert_rgb": False}),
}
STOCK = {
    "BlipImageProcessor": BlipImageProcessorPil,
    "CLIPImageProcessor": CLIPImageProcessorPil,
    "SiglipImageProcessor": SiglipImageProcessorPil,
}
SCALED = {
    "another rescale_factor": {"rescale_factor": 1 / 127.5, "size": [40, 40]},
    "another rescale_factor, not normalised": {"rescale_factor": 0.01, "do_normalize": False, "size": [40, 40]},
    "no rescaling": {"do_rescale": False, "image_mean": [120.0, 110.0, 100.0], "image_std": [60.0] * 3, "size": 40},
}


def pictures():
    generator = np.random.default_rng(0)
    noise = [Image.fromarray(generator.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in ODD_SIZES]
    return [Image.open(path).convert("RGB") for path in PHOTOS] + noise


def for_stock(picture, facts):
    """A picture that a stock processor resizes columns first, as the runtime and LAVIS do.

    Pillow 13 takes a tall picture's rows first; resized columns leave the stock processor the rows alone.
    """
    if facts.fit == "crop" or picture.height <= picture.width:
        return picture
    return picture.resize((facts.size, picture.height), Image.Resampling[facts.resample.upper()])


@pytest.mark.parametrize("name", FILES)
def test_the_runtimes_pixels_equal_the_stock_processors(name):
    kind, values = FILES[name]
    facts, _ = read_fields(Path("preprocessor_config.json"), values, kind)
    stock = STOCK[kind](**values)
    for picture in pictures():
        expected = stock(for_stock(picture, facts), return_tensors="np")["pixel_values"][0]
        assert expected.shape == (3, facts.size, facts.size)
        # the stock one multiplies by 1/255 in float64, the runtime divides by 255 in float32: one rounding apart
        np.testing.assert_allclose(preprocess_images([picture], facts)[0], expected, rtol=0, atol=5e-7)


@pytest.mark.parametrize("name", SCALED)
def test_another_scale_gives_the_stock_processors_pixels_and_is_noted(name):
    facts, notes = read_fields(Path("preprocessor_config.json"), SCALED[name], "BlipImageProcessor")
    stock = BlipImageProcessorPil(**SCALED[name])
    assert len(notes) == 1
    assert "mean and std are divided by" in notes[0]
    for picture in pictures()[:3]:
        expected = stock(picture, return_tensors="np")["pixel_values"][0]
        np.testing.assert_allclose(preprocess_images([picture], facts)[0], expected, rtol=0, atol=2e-6)


def test_nulls_in_a_size_say_nothing():
    size = {"height": 42, "width": 42, "shortest_edge": None}
    assert read_fields(Path("p"), {"size": size}, "BlipImageProcessor")[0].size == 42


@pytest.mark.parametrize("value", ["bilinear", "BILINEAR", "PILImageResampling.BILINEAR", 2])
def test_a_filter_may_be_a_number_or_a_name(value):
    assert read_fields(Path("p"), {"resample": value}, "BlipImageProcessor")[0].resample == "bilinear"


def read(folder, kind, **settings):
    return read_preprocessing(folder, default_type=kind, **settings)


def test_what_stock_processors_save_is_read(tmp_path):
    CLIPImageProcessorPil(size={"shortest_edge": 70}, crop_size=60).save_pretrained(tmp_path)
    facts = read(tmp_path, "CLIPImageProcessor", tower_size=60).preprocessing
    assert (facts.fit, facts.size, facts.shortest_side, facts.resample) == ("crop", 60, 70, "bicubic")
    SiglipImageProcessorPil(size={"height": 48, "width": 48}).save_pretrained(tmp_path)
    facts = read(tmp_path, "CLIPImageProcessor", tower_size=48).preprocessing
    assert (facts.fit, facts.size, facts.mean) == ("squash", 48, (0.5, 0.5, 0.5))
    BlipImageProcessorPil(size={"height": 56, "width": 56}, image_std=[0.3, 0.4, 0.5]).save_pretrained(tmp_path)
    facts = read(tmp_path, "CLIPImageProcessor", tower_size=56).preprocessing
    assert (facts.fit, facts.size, facts.std) == ("squash", 56, (0.3, 0.4, 0.5))


def test_the_processor_file_of_transformers_5_wins_and_a_contradiction_is_noted(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": 224}))
    nested = {"image_processor": {"image_processor_type": "SiglipImageProcessor", "size": [32, 32]}, "odd": 1}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    found = read(tmp_path, "CLIPImageProcessor", tower_size=32)
    assert found.preprocessing.fit == "squash"
    assert found.notes == (
        "processor_config.json has unknown fields, which are not used: odd",
        "preprocessor_config.json differs from processor_config.json, which wins, as in transformers 5",
    )
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "CLIPProcessor"}))
    assert read(tmp_path, "CLIPImageProcessor", tower_size=224).preprocessing.fit == "crop"


BAD = [
    ({"image_processor_type": "ViTImageProcessor"}, "preprocessing-unsupported", "ViTImageProcessor"),
    ({"do_something": True}, "preprocessing-unsupported", "do_something"),
    ({"auto_map": {"AutoImageProcessor": "x.Y"}}, "preprocessing-unsupported", "auto_map"),
    ({"do_pad": True}, "preprocessing-unsupported", "do_pad"),
    ({"use_square_size": True}, "preprocessing-unsupported", "use_square_size"),
    ({"do_resize": False}, "preprocessing-unsupported", "do_resize"),
    ({"do_center_crop": False}, "preprocessing-unsupported", "do_center_crop"),
    ({"do_center_crop": "yes"}, "preprocessing-value", "do_center_crop"),
    ({"size": {"shortest_edge": 224, "longest_edge": 300}}, "preprocessing-unsupported", "longest_edge"),
    ({"size": {"shortest_edge": 200}}, "preprocessing-unsupported", "padding"),
    ({"size": [224, 336]}, "preprocessing-unsupported", "squares"),
    ({"size": {"height": 256, "width": 256}}, "preprocessing-unsupported", "crop_size"),
    ({"size": {"shortest_edge": 0}}, "hub-config-value", "shortest_edge"),
    ({"crop_size": {"shortest_edge": 224}}, "preprocessing-unsupported", "crop_size"),
    ({"resample": 0}, "preprocessing-unsupported", "resample"),
    ({"resample": "nearest"}, "preprocessing-unsupported", "resample"),
    ({"image_processor_type": "BlipImageProcessor", "do_center_crop": True}, "preprocessing-unsupported", "do_center"),
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


def test_unknown_fields_that_are_off_are_noted():
    _, notes = read_fields(Path("p.json"), {"do_dance": False}, "BlipImageProcessor")
    assert notes == ("p.json has unknown fields, which are not used: do_dance",)


def test_pictures_of_another_size_than_the_tower_takes_are_refused_unless_a_size_is_asked_for(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text("{}")
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path, "CLIPImageProcessor", tower_size=336)
    assert caught.value.code == "preprocessing-size"
    assert "--image-size" in str(caught.value)
    found = read(tmp_path, "CLIPImageProcessor", tower_size=336, image_size=336)
    assert (found.preprocessing.size, found.preprocessing.shortest_side) == (336, 336)
    assert found.notes == ("preprocessor_config.json states images of 224 px; --image-size 336 replaces that",)


def test_a_folder_without_a_processor_means_the_familys_and_says_so_or_is_refused(tmp_path):
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path, "CLIPImageProcessor", tower_size=224)
    assert caught.value.code == "hub-file-missing"
    found = read(tmp_path, "BlipImageProcessor", tower_size=56, usual=ImagePreprocessing(56))
    assert found.preprocessing == ImagePreprocessing(56)
    assert "the family's preprocessing is used (squash to 56×56, bicubic" in found.notes[0]
    assert read(None, "BlipImageProcessor", tower_size=56, usual=ImagePreprocessing(56)).notes == ()


def test_another_size_keeps_the_share_that_the_crop_cuts_away():
    facts, _ = read_fields(Path("p"), {"size": {"shortest_edge": 256}, "crop_size": 224}, "CLIPImageProcessor")
    assert (with_size(facts, 336).size, with_size(facts, 336).shortest_side) == (336, 384)
    squash = with_size(read_fields(Path("p"), {}, "SiglipImageProcessor")[0], 384)
    assert (squash.size, squash.resized(100, 30)) == (384, (384, 384))
