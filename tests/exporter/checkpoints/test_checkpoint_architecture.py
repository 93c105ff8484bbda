"""What a checkpoint is, read from its tensors; what they do not tell; and position embeddings at other sizes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import small_lavis
import torch
from small_lavis import CLIP, EVA, HEADS

from qpert.exporter.checkpoints.checkpoint import load_state
from qpert.exporter.checkpoints.files import TensorInfo
from qpert.exporter.families.blip2.architecture import ArchitectureOptions, parameter_shapes
from qpert.exporter.families.blip2.checkpoint import open_checkpoint, plan_checkpoint
from qpert.exporter.families.blip2.positions import interpolate_positions
from qpert.graphs.families.blip2.config import CONFIGS, Blip2Config
from qpert.runtime.errors import CheckpointError, InputError


def entries(config: Blip2Config) -> dict[str, TensorInfo]:
    return {name: TensorInfo(shape) for name, shape in parameter_shapes(config).items()}


def planned(config: Blip2Config, options: ArchitectureOptions = HEADS) -> Blip2Config:
    return replace(plan_checkpoint(entries(config), "x.pth", options).config, name=config.name)


VARIANTS = {
    "eva": EVA,
    "clip": CLIP,
    "no qkv bias": replace(EVA, vision=replace(EVA.vision, qkv_bias=False)),
    "patch 16": replace(EVA, vision=replace(EVA.vision, patch_size=16, image_size=96)),
    "cross-attention in every layer": replace(EVA, qformer=replace(EVA.qformer, cross_attention_frequency=1)),
    "cross-attention in every third": replace(EVA, qformer=replace(EVA.qformer, cross_attention_frequency=3)),
    "cross-attention in the first": replace(EVA, qformer=replace(EVA.qformer, cross_attention_frequency=4)),
    "one layer": replace(EVA, qformer=replace(EVA.qformer, layers=1, cross_attention_frequency=1)),
}


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_every_dimension_is_read_from_the_tensors(config: Blip2Config) -> None:
    assert planned(config) == config


@pytest.mark.parametrize("name", ["coco", "pretrain", "pretrain_vitL"])
def test_published_models_need_no_options(name: str) -> None:
    plan = plan_checkpoint(entries(CONFIGS[name]), "x.pth")
    assert replace(plan.config, name=name) == CONFIGS[name]
    assert "vision heads: 16, as in the published model of width" in plan.notes[0]
    assert "Q-Former heads: 12, as in the published model of width 768" in plan.notes[1]
    assert "ln_vision eps: 1e-05, as in LAVIS's code" in plan.notes[3]
    assert len(plan.notes) == 5


@pytest.mark.parametrize(
    ("config", "heads"),
    [
        (replace(EVA, vision=replace(EVA.vision, width=176, heads=2)), 2),
        (replace(CLIP, vision=replace(CLIP.vision, width=192, heads=3)), 3),
    ],
    ids=["eva 88", "clip 64"],
)
def test_heads_of_unpublished_widths_are_assumed_from_the_usual_head_size_and_said(
    config: Blip2Config, heads: int
) -> None:
    wide = replace(config, qformer=replace(config.qformer, width=320, heads=5))
    plan = plan_checkpoint(entries(wide), "x.pth")
    assert (plan.config.vision.heads, plan.config.qformer.heads) == (heads, 5)
    assert f"vision heads: {heads}, assumed from the usual head size of" in plan.notes[0]
    assert "(--qformer-heads overrides)" in plan.notes[1]


def test_heads_that_nothing_tells_are_asked_for_by_option() -> None:
    with pytest.raises(CheckpointError, match=r"vision heads: 48 .*pass --vision-heads N") as caught:
        plan_checkpoint(entries(EVA), "x.pth")
    assert caught.value.code == "heads-unknown"
    with pytest.raises(CheckpointError, match=r"Q-Former heads: .*pass --qformer-heads N") as caught:
        plan_checkpoint(entries(EVA), "x.pth", ArchitectureOptions(vision_heads=4))
    assert caught.value.code == "heads-unknown"


def test_an_option_overrides_what_would_be_assumed() -> None:
    options = ArchitectureOptions(
        vision_heads=11, qformer_heads=6, vision_eps=1e-4, ln_vision_eps=2e-4, qformer_eps=3e-4
    )
    plan = plan_checkpoint(entries(CONFIGS["coco"]), "x.pth", options)
    config = plan.config
    assert (config.vision.heads, config.qformer.heads) == (11, 6)
    assert (config.vision.layer_norm_eps, config.ln_vision_eps, config.qformer.layer_norm_eps) == (1e-4, 2e-4, 3e-4)
    assert plan.notes == ()


def test_an_option_that_the_tensors_contradict_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"5 vision heads do not divide the width 48"):
        planned(EVA, ArchitectureOptions(vision_heads=5, qformer_heads=2))
    with pytest.raises(CheckpointError, match=r"0 Q-Former heads do not divide"):
        planned(EVA, ArchitectureOptions(vision_heads=4, qformer_heads=0))
    with pytest.raises(CheckpointError, match=r"--vision-layers is 2, .*x.pth has 3 ") as caught:
        planned(EVA, replace(HEADS, vision_layers=2))
    assert caught.value.code == "vision-layers-differ"


def test_a_named_checkpoint_that_is_another_model_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"is not the published 'coco': got .*image_size=224.* expected .*364"):
        plan_checkpoint(entries(CONFIGS["pretrain"]), "x.pth", known=CONFIGS["coco"])


def test_irregular_cross_attention_is_refused() -> None:
    broken = {name: info for name, info in entries(VARIANTS["cross-attention in every layer"]).items()
              if ".layer.2.crossattention" not in name}  # fmt: skip
    with pytest.raises(CheckpointError, match=r"layers 0, 1, 3 of 4 have cross-attention; expected 0, f, 2f"):
        plan_checkpoint(broken, "x.pth", HEADS)
    none = {name: info for name, info in broken.items() if "crossattention" not in name}
    with pytest.raises(CheckpointError, match=r"no Q-Former layer has cross-attention"):
        plan_checkpoint(none, "x.pth", HEADS)


def test_patches_that_are_no_square_are_refused() -> None:
    broken = entries(EVA) | {"visual_encoder.pos_embed": TensorInfo((1, 16, 48))}
    with pytest.raises(CheckpointError, match=r"pos_embed holds 16 positions; expected one for CLS and a square"):
        plan_checkpoint(broken, "x.pth", HEADS)


BLIP2_OPT = ["query_tokens", "Qformer.bert.embeddings.LayerNorm.weight", "opt_proj.weight", "ln_vision.weight"]
HF_OPT = ["query_tokens", "qformer.layernorm.weight", "language_model.model.decoder.embed_tokens.weight"]
BLIP_1 = [
    "visual_encoder.blocks.0.norm1.weight",
    "text_encoder.encoder.layer.0.output.dense.weight",
    "vision_proj.bias",
]
CLIP_HF = ["vision_model.post_layernorm.weight", "text_model.final_layer_norm.weight", "logit_scale"]
CLIP_OPENAI = ["visual.conv1.weight", "transformer.resblocks.0.ln_1.weight", "token_embedding.weight"]
EVA_ALONE = ["cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.norm1.weight"]
VIT_HF = ["vit.embeddings.cls_token", "classifier.weight"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (BLIP2_OPT, r"BLIP-2 with a language model.*no ITC and ITM heads; expected a retrieval checkpoint.*opt_proj"),
        (HF_OPT, r"Blip2ForConditionalGeneration.*Salesforce/blip2-itm-vit-g"),
        (BLIP_1, r"is a BLIP \(first generation\).*text_encoder"),
        (CLIP_HF, r"is a CLIP or SigLIP model"),
        (CLIP_OPENAI, r"is a CLIP or SigLIP model"),
        (EVA_ALONE, r"vision transformer alone.*--vision-checkpoint"),
        (VIT_HF, r"vision transformer alone"),
        (
            ["conv.weight", "fc.bias"],
            r"unknown architecture: none of its 2 tensors .*conv.weight, fc.bias.*Blip2Qformer",
        ),
    ],
)
def test_other_architectures_are_recognised_and_refused(tmp_path: Path, names: list[str], message: str) -> None:
    torch.save({name: torch.zeros(2) for name in names}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(str(tmp_path / "x.pth"))


# Position embeddings.


def test_eva_positions_go_from_16_to_26_patches_as_lavis_interpolates_them() -> None:
    """eva_vit.py interpolate_pos_embed: CLS kept, patches bicubic, corners not aligned."""
    vision = replace(EVA.vision, image_size=224, width=8)
    positions = torch.randn(1, 257, 8, generator=torch.Generator().manual_seed(0))
    cls, patches = positions[:, :1], positions[:, 1:]
    image = patches.reshape(-1, 16, 16, 8).permute(0, 3, 1, 2)
    image = torch.nn.functional.interpolate(image, size=(26, 26), mode="bicubic", align_corners=False)
    expected = torch.cat((cls, image.permute(0, 2, 3, 1).flatten(1, 2)), dim=1)
    got = interpolate_positions(positions, vision, 364)
    assert got.shape == (1, 677, 8)
    assert torch.equal(got, expected)


def test_clip_positions_are_interpolated_with_aligned_corners() -> None:
    """clip_vit.py interpolate_pos_embed: align_corners=True, so that corner patches stay what they are."""
    vision = replace(CLIP.vision, image_size=224, width=4)
    positions = torch.randn(257, 4, generator=torch.Generator().manual_seed(0))
    image = positions[1:].reshape(1, 16, 16, 4).permute(0, 3, 1, 2)
    image = torch.nn.functional.interpolate(image, size=(26, 26), mode="bicubic", align_corners=True)
    got = interpolate_positions(positions, vision, 364)
    assert torch.equal(got, torch.cat([positions[:1], image[0].permute(1, 2, 0).reshape(-1, 4)]))
    for old, new in ((0, 0), (15, 25), (240, 650), (255, 675)):
        torch.testing.assert_close(got[1 + new], positions[1 + old])


def test_half_precision_positions_are_interpolated_in_float32() -> None:
    positions = torch.randn(1, 17, 48, generator=torch.Generator().manual_seed(0)).half()
    got = interpolate_positions(positions, EVA.vision, 84)
    assert got.dtype == torch.float32
    assert torch.equal(got, interpolate_positions(positions.float(), EVA.vision, 84))


@pytest.mark.parametrize("config", [EVA, CLIP], ids=["eva", "clip"])
def test_a_checkpoint_opens_at_another_image_size(tmp_path: Path, config: Blip2Config) -> None:
    state = small_lavis.random_state(config)
    path = str(small_lavis.save(tmp_path / "x.pth", state))
    with open_checkpoint(path, options=HEADS, image_size=84) as checkpoint:
        got = load_state(checkpoint)
        assert checkpoint.config == replace(config.with_image_size(84), name="x")
        assert "interpolated from 56 px (4×4 patches) to 84 px (6×6)" in checkpoint.notes[-1]
    changed = [
        name for name in state if got[name].shape != state[name].shape or not torch.equal(got[name], state[name])
    ]
    assert changed == [name for name in state if "pos" in name and name.startswith("visual_encoder.")]
    assert {name: tuple(tensor.shape) for name, tensor in got.items()} == parameter_shapes(config.with_image_size(84))
    with open_checkpoint(path, options=HEADS, image_size=56) as checkpoint:
        assert not any("interpolated" in note for note in checkpoint.notes)


@pytest.mark.parametrize("size", [100, 13, 0, -14])
def test_an_image_size_that_is_no_multiple_of_the_patch_is_refused(tmp_path: Path, size: int) -> None:
    path = str(small_lavis.save(tmp_path / "x.pth", small_lavis.random_state()))
    with pytest.raises(InputError, match=rf"image size {size} is not a (positive )?multiple of the patch size 14"):
        open_checkpoint(path, options=HEADS, image_size=size)
