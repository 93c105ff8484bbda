"""What `qpert export coca` reads and refuses; each refusal is one line that names the key, and nothing is written."""

import json

import numpy as np
import pytest
import torch
from coca_models import model_cfg
from safetensors.torch import save_file
from tower_folders import clip_folder

from qpert.exporter.checkpoints.checkpoint import no_progress
from qpert.exporter.families.coca.checkpoint import CocaOptions, open_checkpoint, resized_positions
from qpert.exporter.families.coca.model_config import CONFIG_NAME, read_model_config
from qpert.exporter.families.coca.names import expected_shapes, origins
from qpert.graphs.families.coca.config import CONFIGS
from qpert.graphs.families.coca.model import CocaRetrieval
from qpert.runtime.cli import run

ROWS = 60


def config_file(folder, **changes):
    """`open_clip_config.json` of shape a with a small vocabulary; `section__key=value` changes it."""
    values = {"model_cfg": model_cfg("a", ROWS), "preprocess_cfg": {}}
    for name, value in changes.items():
        *sections, key = name.split("__")
        part = values["model_cfg"] if sections != ["preprocess_cfg"] else values
        for section in sections:
            part = part[section]
        part[key] = value
    (folder / CONFIG_NAME).write_text(json.dumps(values))
    return folder / CONFIG_NAME


def state(folder):
    """Tensors of shape a at random, and some of the caption decoder."""
    config = read_model_config(config_file(folder), "a", None).config
    generator = torch.Generator().manual_seed(0)
    shapes = expected_shapes(config, 9) | {"logit_scale": (), "text_decoder.ln_final.weight": (36,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture
def folder(tmp_path):
    save_file(state(tmp_path), tmp_path / "open_clip_model.safetensors")
    return tmp_path


def opened(source, **options):
    return open_checkpoint(str(source), image_size=None, options=CocaOptions(**options), progress=no_progress)


def refused(source, out, capsys, *options):
    """The one line of an export that exits with 2 and leaves nothing."""
    capsys.readouterr()
    assert run(["export", "coca", "--checkpoint", str(source), "--out", str(out), *options]) == 2
    assert not out.exists()
    lines = capsys.readouterr().err.strip().splitlines()
    return lines[-1]


@pytest.mark.parametrize("form", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin", "training.pt"])
def test_every_form_of_file_gives_the_same_parameters(tmp_path, form):
    tensors = state(tmp_path)
    path = tmp_path / form
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    elif path.suffix == ".pt":  # as open_clip's own training saves it
        wrapped = {f"module.{name}": tensor for name, tensor in tensors.items()}
        torch.save({"epoch": 3, "name": "run", "state_dict": wrapped}, path)
    else:
        torch.save(tensors, path)
    source = path if path.suffix == ".pt" else tmp_path
    with opened(source) as checkpoint:
        names = set(checkpoint.tensors.names())
        with torch.device("meta"):
            network = CocaRetrieval(checkpoint.config)
        assert {name: tuple(checkpoint.tensors.get(name).shape) for name in names} == {
            name: tuple(value.shape) for name, value in network.state_dict().items()
        }
        third = checkpoint.tensors.get("pooler.k_proj.bias")
        torch.testing.assert_close(third, tensors["visual.attn_pool.attn.in_proj_bias"][36:72])
        torch.testing.assert_close(checkpoint.tensors.get("pooler.query"), tensors["visual.attn_pool.query"][:1])
        assert any("1 tensors of the caption decoder are not used" in note for note in checkpoint.notes)


def test_a_file_of_published_shapes_needs_no_configuration():
    """Names and shapes alone, without 1 GB of numbers."""
    from qpert.exporter.checkpoints.files import TensorInfo
    from qpert.exporter.checkpoints.locate import Located
    from qpert.exporter.families.coca.checkpoint import find_config

    for name, config in CONFIGS.items():
        entries = {key: TensorInfo(shape) for key, shape in expected_shapes(config, 256).items()}
        found, notes = find_config(Located("x", "x.bin"), entries, CocaOptions())
        assert found.config == config
        assert f"head counts are those of {name}" in notes[0]


def test_fine_tuned_captioning_checkpoints_are_warned_of_by_name(folder):
    with opened(folder) as checkpoint:
        assert not any("WARNING" in note for note in checkpoint.notes)
    moved = folder / "mscoco_finetuned_CoCa-ViT-B-32"
    moved.mkdir()
    for name in ("open_clip_model.safetensors", CONFIG_NAME):
        (folder / name).rename(moved / name)
    with opened(moved) as checkpoint:
        assert "not meant for retrieval" in checkpoint.notes[0].replace("\n", " ")


def test_published_names_are_hub_repositories_and_say_so_without_a_network(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert run(["export", "coca", "--checkpoint", "coca_ViT-L-14", "--out", str(tmp_path / "b")]) == 3
    assert "laion/CoCa-ViT-L-14-laion2B-s13B-b90k" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vision_cfg__attentional_pool": "parallel"}, ["vision_cfg.attentional_pool 'parallel'", "expected True"]),
        ({"vision_cfg__attentional_pool": "cascade"}, ["vision_cfg.attentional_pool 'cascade'"]),
        ({"vision_cfg__attentional_pool": False}, ["vision_cfg.attentional_pool False", "qpert export clip"]),
        ({"vision_cfg__timm_model_name": "vit_x"}, ["vision_cfg.timm_model_name 'vit_x'"]),
        ({"vision_cfg__qk_norm": True}, ["vision_cfg.qk_norm True"]),
        ({"vision_cfg__ls_init_value": 1e-5}, ["vision_cfg.ls_init_value 1e-05"]),
        ({"vision_cfg__sparkle": 3}, ["unknown fields", "vision_cfg.sparkle"]),
        ({"text_cfg__embed_cls": False}, ["text_cfg.embed_cls False"]),
        ({"text_cfg__hf_model_name": "roberta-base"}, ["text_cfg.hf_model_name 'roberta-base'"]),
        ({"text_cfg__correct_cls_mask": True}, ["text_cfg.correct_cls_mask True"]),
        ({"text_cfg__pad_id": 1}, ["text_cfg.pad_id 1"]),
        ({"shine": 1}, ["unknown fields", "shine"]),
        ({"multimodal_cfg": None}, ["multimodal_cfg None", "qpert export clip"]),
        ({"text_cfg__context_length": 77}, ["text.positional_embedding with 77 rows", "set context_length to 76"]),
        ({"text_cfg__width": 25}, ["width 25 is not a multiple of its 4 heads"]),
        ({"vision_cfg__layers": 3}, ["missing: visual.transformer.resblocks.2"]),
        ({"vision_cfg__width": "30"}, ["vision_cfg", "width '30'", "whole number"]),
        ({"preprocess_cfg__resize_mode": "longest"}, ["preprocess_cfg.resize_mode 'longest'", "--resize squash"]),
        ({"preprocess_cfg__gamma": 2}, ["preprocess_cfg: gamma"]),
        ({"preprocess_cfg__std": [0, 1, 1]}, ["std 0"]),
    ],
)
def test_a_configuration_that_the_network_does_not_have_is_refused_by_key(folder, change, words, capsys):
    config_file(folder, **change)
    line = refused(folder, folder / "bundle", capsys)
    assert [word for word in words if word not in line] == [], line


@pytest.mark.parametrize(
    ("renamed", "words"),
    [
        ({"visual.attn_pool.": "visual.attn_pool_contrastive."}, ["attn_pool_contrastive", "'parallel' or 'cascade'"]),
        ({"text.cls_emb": "cls_emb"}, ["no text.cls_emb"]),
        ({"visual.ln_post.bias": "visual.ln_posh.bias"}, ["missing: visual.ln_post.bias", "visual.ln_posh.bias"]),
        ({"logit_scale": "adapter.scale"}, ["no open_clip CoCa has: adapter.scale"]),
        ({"visual.transformer": "visual.trunk", "text.cls_emb": "x"}, ["visual.trunk", "timm"]),
    ],
)
def test_tensors_that_are_not_those_of_a_coca_are_refused_by_name(tmp_path, renamed, words, capsys):
    tensors = state(tmp_path)
    for old, new in renamed.items():
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "open_clip_model.safetensors")
    line = refused(tmp_path, tmp_path / "bundle", capsys)
    assert [word for word in words if word not in line] == [], line


def test_weights_that_no_published_model_has_need_a_configuration(folder, capsys):
    (folder / CONFIG_NAME).rename(folder / "model.json")
    line = refused(folder / "open_clip_model.safetensors", folder / "bundle", capsys)
    assert "--model-config" in line
    with opened(folder / "open_clip_model.safetensors", model_config=str(folder / "model.json")) as checkpoint:
        assert checkpoint.config.pooler_heads == 2
    (folder / "bare.json").write_text(json.dumps(model_cfg("a", ROWS)))  # as in open_clip's model_configs
    with opened(folder, model_config=str(folder / "bare.json")) as checkpoint:
        assert checkpoint.config.vision.heads == 3


def test_a_clip_given_to_coca_is_named(tmp_path, capsys):
    hub = clip_folder(tmp_path / "hub", "a")
    line = refused(hub, tmp_path / "b", capsys)
    assert "open_clip_pytorch_model.bin" in line
    assert "qpert export clip" in line
    line = refused(hub / "model.safetensors", tmp_path / "b", capsys)
    assert "Hugging Face's form" in line
    assert "vision_model." in line or "text_model." in line
    names = ("visual.conv1.weight", "visual.class_embedding", "token_embedding.weight", "transformer.x")
    torch.save({name: torch.zeros(2) for name in names}, tmp_path / "ViT-B-32.pt")
    line = refused(tmp_path / "ViT-B-32.pt", tmp_path / "b", capsys)
    assert "token_embedding.weight" in line
    assert "it is a CLIP" in line


def test_a_coca_given_to_clip_is_named(folder, tmp_path, capsys):
    for source, key in (
        (folder, "model_cfg.multimodal_cfg"),
        (folder / "open_clip_model.safetensors", "text.cls_emb"),
    ):
        capsys.readouterr()
        assert run(["export", "clip", "--checkpoint", str(source), "--out", str(tmp_path / "b")]) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert key in line
        assert "qpert export coca" in line
    assert not (tmp_path / "b").exists()
    torch.save({"visual.conv1.weight": torch.zeros(2)}, tmp_path / "clip.pt")
    assert run(["export", "clip", "--checkpoint", str(tmp_path / "clip.pt"), "--out", str(tmp_path / "b")]) == 2
    assert "Hugging Face's form" in capsys.readouterr().err


def test_pictures_are_cropped_or_squashed_and_the_choice_is_noted(folder):
    with opened(folder) as checkpoint:
        prepared = checkpoint.preprocessing
    assert (prepared.fit, prepared.size, prepared.shortest_side, prepared.rounding) == ("crop", 49, 49, "half_even")
    with opened(folder, resize="squash") as checkpoint:
        assert checkpoint.preprocessing.fit == "squash"
        assert checkpoint.config.resize == "squash"
        assert any("--resize squash replaces" in note for note in checkpoint.notes)


def test_positions_of_another_grid_are_resized_with_antialiasing():
    """A constant stays, and a ramp keeps its symmetry about the centre; the class token is untouched."""
    ramp = torch.arange(4.0)[:, None].expand(4, 4).reshape(16, 1)
    positions = torch.cat([torch.full((1, 2), 9.0), torch.cat([ramp, torch.ones(16, 1)], dim=1)])
    found = resized_positions(positions, 6)
    assert found.shape == (37, 2)
    assert found[0].tolist() == [9, 9]
    np.testing.assert_allclose(found[1:, 1].numpy(), 1, atol=1e-6)  # float32 weights that sum to 1
    image = found[1:, 0].reshape(6, 6)
    np.testing.assert_allclose(image + image.flip(0), 3, atol=1e-5)


def test_every_parameter_has_an_origin():
    for config in CONFIGS.values():
        with torch.device("meta"):
            names = set(CocaRetrieval(config).state_dict())
        assert set(origins(config)) == names
        assert {origin.name for origin in origins(config).values()} == set(expected_shapes(config, 256))
