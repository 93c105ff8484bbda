"""config.json of CLIP and SigLIP folders against what stock transformers makes of it."""

import json

import pytest
import torch
from stock_towers import CLIP_SHAPES, SIGLIP_SHAPES, stock_clip, stock_siglip

from qpert.exporter.checkpoints.files import open_tensors
from qpert.exporter.families.clip import hub_config as clip
from qpert.exporter.families.siglip import hub_config as siglip
from qpert.exporter.hub.towers import check_tensors
from qpert.graphs.transformer import ACTIVATIONS
from qpert.runtime.errors import CheckpointError

STOCK = {"clip": (stock_clip, clip), "siglip": (stock_siglip, siglip)}
CASES = [("clip", shape) for shape in CLIP_SHAPES] + [("siglip", shape) for shape in SIGLIP_SHAPES]
FIELDS = {
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp_width": "intermediate_size",
    "activation": "hidden_act",
    "layer_norm_eps": "layer_norm_eps",
    "image_size": "image_size",
    "patch_size": "patch_size",
    "vocab_size": "vocab_size",
    "max_positions": "max_position_embeddings",
}


def written(folder, values):
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def check_agrees(config, stock):
    for part, stock_part in ((config.vision, stock.vision_config), (config.text, stock.text_config)):
        for field, key in FIELDS.items():
            if hasattr(part, field):
                assert getattr(part, field) == getattr(stock_part, key), key


@pytest.mark.parametrize(("family", "shape"), CASES)
def test_saved_folders_are_read_as_they_were_made(family, shape, tmp_path):
    make, reader = STOCK[family]
    stock = make(shape)
    stock.save_pretrained(tmp_path)
    config, notes = reader.read_config(tmp_path, name="small")
    check_agrees(config, stock.config)
    assert notes == ()
    store = open_tensors(tmp_path / "model.safetensors")
    check_tensors(store.entries, reader.expected_shapes(config), reader.UNUSED, "the file")
    store.close()


def test_what_a_clip_file_leaves_out_is_what_transformers_means(tmp_path):
    from transformers import CLIPConfig

    config, notes = clip.read_config(written(tmp_path, {"model_type": "clip"}), name="default")
    stock = CLIPConfig()
    check_agrees(config, stock)
    assert config.embed_dim == stock.projection_dim
    assert config.eos_token_id == stock.text_config.eos_token_id
    assert "config.json omits text_config.eos_token_id: transformers' default 49407 is used" in notes


def test_what_a_siglip_file_leaves_out_is_what_transformers_means(tmp_path):
    from transformers import SiglipConfig

    config, notes = siglip.read_config(written(tmp_path, {"model_type": "siglip"}), name="default")
    check_agrees(config, SiglipConfig())
    assert len(notes) == 6


@pytest.mark.parametrize("old", [{"hidden_size": 96, "num_attention_heads": 6}, {}, None])
def test_the_old_section_wins_with_its_defaults_as_in_transformers(old, tmp_path):
    from transformers import CLIPConfig

    values = {
        "text_config": {"hidden_size": 64, "num_attention_heads": 4, "eos_token_id": 2, "num_hidden_layers": 3},
        "text_config_dict": old,
        "vision_config": {"hidden_size": 48, "patch_size": 16, "layer_norm_eps": 1e-3},
        "vision_config_dict": old,
        "projection_dim": 33,
    }
    config, _ = clip.read_config(written(tmp_path, {"model_type": "clip", **values}), name="old")
    stock = CLIPConfig(**json.loads(json.dumps(values)))
    check_agrees(config, stock)
    assert config.eos_token_id == stock.text_config.eos_token_id == (2 if old is None else 49407)
    assert config.embed_dim == 33


BAD = [
    ("clip", {"model_type": "siglip"}, "hub-model-type", "'siglip'"),
    ("clip", {"architectures": ["CLIPVisionModelWithProjection"]}, "hub-architecture", "CLIPVisionModel"),
    ("clip", {"quantization_config": {"bits": 4}}, "hub-quantized", "quantization_config"),
    ("clip", {"text_config": {"hidden_act": "relu"}}, "hub-config-unsupported", "'relu'"),
    ("clip", {"text_config": {"eos_token_id": [2, 3]}}, "hub-config-unsupported", "eos_token_id"),
    ("clip", {"text_config": 5}, "hub-config-section", "text_config"),
    ("clip", {"vision_config": {"num_channels": 1}}, "hub-config-unsupported", "num_channels"),
    ("clip", {"vision_config": {"image_size": [224, 224]}}, "hub-config-value", "image_size"),
    ("clip", {"vision_config": {"image_size": 24}}, "hub-config-value", "image size 24"),
    ("clip", {"vision_config": {"hidden_size": 100}}, "hub-config-value", "width 100"),
    ("clip", {"vision_config": {"layer_norm_eps": 0}}, "hub-config-value", "layer_norm_eps"),
    ("clip", {"projection_dim": None}, "hub-config-value", "projection_dim"),
    ("siglip", {"model_type": "siglip2"}, "siglip-naflex", "NaFlex"),
    ("siglip", {"model_type": "clip"}, "hub-model-type", "'clip'"),
    ("siglip", {"vision_config": {"vision_use_head": False}}, "hub-config-unsupported", "vision_use_head"),
    ("siglip", {"text_config": {"projection_size": 512}}, "hub-config-value", "projection_size"),
    ("siglip", {"text_config": {"hidden_size": 384}}, "hub-config-value", "projection_size"),
    ("siglip", {"text_config": {"hidden_act": "gelu_new"}}, "hub-config-unsupported", "gelu_new"),
]


@pytest.mark.parametrize(("family", "values", "code", "named"), BAD)
def test_what_is_not_supported_is_refused_by_name(family, values, code, named, tmp_path):
    with pytest.raises(CheckpointError) as caught:
        STOCK[family][1].read_config(written(tmp_path, {"model_type": family, **values}), name="bad")
    assert caught.value.code == code
    assert named in str(caught.value)


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(CheckpointError) as caught:
        clip.read_config(tmp_path, name="none")
    assert caught.value.code == "hub-file-missing"
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError) as caught:
        siglip.read_config(tmp_path, name="broken")
    assert caught.value.code == "hub-file-unreadable"


def test_siglip2_naflex_has_other_tensors_than_siglip():
    """Why `siglip2` is refused: were the state dicts the same, it could be read as SigLIP."""
    from transformers import Siglip2Config, Siglip2Model

    size = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = size | {"patch_size": 4, "num_patches": 16}
    naflex = Siglip2Model(Siglip2Config(text_config=size | {"vocab_size": 50}, vision_config=vision)).state_dict()
    weight = naflex["vision_model.embeddings.patch_embedding.weight"]
    assert tuple(weight.shape) == (16, 4 * 4 * 3)  # SigLIP: [16, 3, 4, 4], and another order of the pixels


def test_tensors_that_do_not_fit_are_listed_together():
    from qpert.exporter.checkpoints.files import TensorInfo

    entries = {
        "a": TensorInfo((2, 3)),
        "a.extra": TensorInfo((1,)),
        "foreign": TensorInfo((1,)),
        "spare": TensorInfo((1,)),
        "i": TensorInfo((1,), "int64"),
    }
    with pytest.raises(CheckpointError) as caught:
        check_tensors(entries, {"a": (3, 2), "gone": (1,), "i": (1,)}, frozenset({"spare"}), "the file")
    assert caught.value.code == "checkpoint-tensors"
    message = str(caught.value)
    assert "1 missing: gone" in message
    assert "1 unexpected: a.extra" in message
    assert "a [2, 3] (expected [3, 2])" in message
    assert "1 not floating-point: i" in message
    assert "spare" not in message
    assert "foreign" not in message


@pytest.mark.parametrize("family", STOCK)
def test_fields_that_are_not_known_are_noted_and_those_that_change_the_model_refused(family, tmp_path):
    make, reader = STOCK[family]
    make("a").save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values["vision_config"]["register_tokens"] = 4
    values["window"] = 7
    _, notes = reader.read_config(written(tmp_path, values), name="x")
    assert "config.json has unknown fields, which are not used: window" in notes
    assert "config.json has unknown fields, which are not used: vision_config.register_tokens" in notes
    values["text_config"]["is_decoder"] = True
    with pytest.raises(CheckpointError, match=r"text_config\.is_decoder True") as caught:
        reader.read_config(written(tmp_path, values), name="x")
    assert caught.value.code == "hub-config-unsupported"


@pytest.mark.parametrize("family", STOCK)
def test_the_exact_gelu_has_two_names(family, tmp_path):
    from transformers.activations import ACT2FN

    make, reader = STOCK[family]
    make("a").save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    for part in ("vision_config", "text_config"):
        values[part]["hidden_act"] = "gelu_python"
    config, _ = reader.read_config(written(tmp_path, values), name="x")
    assert config.vision.activation == config.text.activation == "gelu"
    x = torch.linspace(-6, 6, 1001)
    torch.testing.assert_close(ACT2FN["gelu_python"](x), ACTIVATIONS["gelu"](x), rtol=0, atol=1e-6)  # float32 rounding
