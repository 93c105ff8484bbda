"""Files that are good in several ways and bad in many: each bad one gives one error that says what to do."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import small_lavis
import torch
from safetensors.torch import save_file
from small_lavis import CLIP, EVA, HEADS

from qpert.exporter.checkpoints.checkpoint import load_state
from qpert.exporter.checkpoints.parameters import narrowed
from qpert.exporter.families.blip2.architecture import ArchitectureOptions
from qpert.exporter.families.blip2.checkpoint import open_checkpoint
from qpert.runtime.errors import CheckpointError


def open_small(path: Path) -> dict[str, torch.Tensor]:
    with open_checkpoint(str(path), options=HEADS) as checkpoint:
        return load_state(checkpoint)


@pytest.mark.parametrize("form", ["runner", "bare", "legacy", "safetensors"])
def test_the_same_numbers_come_from_every_kind_of_file(tmp_path: Path, form: str) -> None:
    state = small_lavis.random_state()
    path = tmp_path / ("x.safetensors" if form == "safetensors" else "x.pth")
    if form == "runner":
        small_lavis.save(path, state)
    elif form == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "bare")
    got = open_small(path)
    assert got.keys() == state.keys()
    assert all(torch.equal(got[name], state[name]) for name in state)


def test_a_file_from_before_torch_1_6_says_that_it_is_held_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "old.pth"
    torch.save(small_lavis.random_state(), path, _use_new_zipfile_serialization=False)
    with open_checkpoint(str(path), options=HEADS) as checkpoint:
        assert "old.pth has the format before torch 1.6" in checkpoint.notes[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened_to_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    state = {name: tensor.to(dtype) for name, tensor in small_lavis.random_state().items()}
    got = open_small(small_lavis.save(tmp_path / "half.pth", state))
    assert all(got[name].dtype == torch.float32 and torch.equal(got[name], state[name].float()) for name in state)


def test_nothing_is_read_before_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    save_file(small_lavis.random_state(), path)
    with open_checkpoint(str(path), options=HEADS) as checkpoint:
        store, reads = checkpoint.tensors.store, []
        monkeypatch.setattr(
            type(checkpoint.tensors), "_read", lambda _, name: reads.append(name) or store.read(name), raising=True
        )
        assert set(checkpoint.tensors.names()) == set(small_lavis.random_state())
        assert reads == []
        checkpoint.tensors.get("itm_head.bias")
        assert reads == ["itm_head.bias"]


def test_float32_parameters_stay_mapped_to_their_file(tmp_path: Path) -> None:
    path = small_lavis.save(tmp_path / "x.pth", small_lavis.random_state())
    with open_checkpoint(str(path), options=HEADS) as checkpoint:
        state = load_state(checkpoint)
        first = checkpoint.tensors.get("itm_head.weight")
        assert state["itm_head.weight"].data_ptr() == first.data_ptr(), "a copy would double the memory of a checkpoint"
    assert torch.isfinite(state["itm_head.weight"]).all(), "the state outlives the checkpoint"


def test_a_closed_checkpoint_says_so(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(small_lavis.save(tmp_path / "x.pth", small_lavis.random_state())), options=HEADS)
    checkpoint.close()
    with pytest.raises(CheckpointError, match=r"itm_head.bias cannot be read .*was the checkpoint closed"):
        checkpoint.tensors.get("itm_head.bias")


def test_the_hash_is_of_the_file_and_progress_is_told(tmp_path: Path) -> None:
    path, heard = small_lavis.save(tmp_path / "x.pth", small_lavis.random_state()), []
    with open_checkpoint(str(path), options=HEADS, progress=lambda *step: heard.append(step)) as checkpoint:
        assert checkpoint.record.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert heard[-1] == ("hashing the checkpoint", path.stat().st_size, path.stat().st_size)


# Bad files.


def refused(path: Path | str, message: str, options: ArchitectureOptions = HEADS) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(str(path), options=options)
    assert str(path) in str(caught.value)
    assert caught.value.exit_code == 2


class Payload:
    """Runs a command where it is unpickled by a careless reader."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_code_is_refused_and_not_run(tmp_path: Path, zipped: bool) -> None:
    path, marker = tmp_path / "evil.pth", tmp_path / "ran"
    torch.save({"model": Payload(marker)}, path, _use_new_zipfile_serialization=zipped)
    refused(path, r"holds pickled code \((posix|nt)\.mkdir\), which is never run; expected tensors only")
    assert not marker.exists()


def test_an_object_of_a_training_framework_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "args.pth"
    torch.save({"model": small_lavis.random_state(), "args": SimpleNamespace(lr=1)}, path)
    refused(path, r"holds pickled code \(types\.SimpleNamespace\).*save_file")


def test_a_half_downloaded_pth_is_refused(tmp_path: Path) -> None:
    path = small_lavis.save(tmp_path / "x.pth", small_lavis.random_state())
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    refused(path, r"is truncated: .*its end is missing \([\d,]+ bytes, half-downloaded\?\); download or copy it again")


def test_a_half_downloaded_safetensors_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(small_lavis.random_state(), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    refused(path, r"is truncated, corrupt or not a safetensors file")


def test_flipped_bits_in_a_pth_are_found_by_its_checksums(tmp_path: Path) -> None:
    path = small_lavis.save(tmp_path / "x.pth", small_lavis.random_state())
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    data = bytearray(path.read_bytes())
    data[largest.header_offset + 200 + largest.file_size // 2] ^= 0x40
    path.write_bytes(data)
    refused(path, r"is corrupt: the checksum of its record .*data/\d+ is wrong")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_bytes_that_are_no_checkpoint_are_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"noise{suffix}"
    path.write_bytes(bytes(range(256)) * 40)
    refused(path, r"corrupt.* or not a (checkpoint|safetensors)")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"is empty; expected a checkpoint"),
        (b"\n<!DOCTYPE html><html>404</html>", r"is a web page, not a checkpoint"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", r"Git LFS pointer.*git lfs pull"),
        (b"PK\x03\x04 and no more", r"is truncated"),
        (b"\x80", r"corrupt, truncated or not a checkpoint"),
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".bin"])
def test_what_a_failed_download_leaves_is_refused(tmp_path: Path, content: bytes, message: str, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content)
    refused(path, message)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1, 2], r"holds a list; expected a state dict"),
        ({"model": {}}, r"holds nothing; expected a state dict"),
        (torch.zeros(3), r"holds a Tensor; expected a state dict"),
        ({"weights": 1, "epoch": 3}, r"entries that are not tensors: weights, epoch"),
        ({"state_dict": {}, "epoch": 3}, r"holds nothing; expected a state dict"),
    ],
)
def test_a_file_that_holds_something_else_says_what(tmp_path: Path, value: object, message: str) -> None:
    torch.save(value, tmp_path / "x.pth")
    refused(tmp_path / "x.pth", message)


def test_a_torchscript_program_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        archive.writestr("x/constants.pkl", b"")
        archive.writestr("x/data.pkl", b"")
        archive.writestr("x/version", b"3\n")
    refused(tmp_path / "x.pth", r"TorchScript program; expected a state dict")


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_says_so(tmp_path: Path) -> None:
    path = small_lavis.save(tmp_path / "x.pth", small_lavis.random_state())
    path.chmod(0)
    refused(path, r"cannot be read \(Permission denied\)")


def test_a_source_that_is_nothing_lists_what_is_possible(tmp_path: Path) -> None:
    refused(tmp_path / "gone.pth", r"gone.pth does not exist")
    refused("x" * 5000, r"cannot be read \(.*too long")
    refused("cocoo", r"'cocoo' is not a checkpoint: .*expected one of coco, pretrain, pretrain_vitL, a LAVIS FILE")


@pytest.mark.parametrize("name", ["visual_encoder.blocks.1.mlp.fc2.weight", "visual_encoder.blocks.0.attn.q_bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_nan_and_infinity_are_found_when_the_tensor_is_read(
    tmp_path: Path, name: str, value: float, dtype: torch.dtype
) -> None:
    state = {key: tensor.to(dtype) for key, tensor in small_lavis.random_state().items()}
    state[name].view(-1)[5:7] = value
    path = tmp_path / "x.safetensors"
    save_file(state, path)
    with open_checkpoint(str(path), options=HEADS) as checkpoint:
        checkpoint.tensors.get("itm_head.bias")
        with pytest.raises(CheckpointError, match=rf"{name} holds NaN or infinity in 2 of its"):
            checkpoint.tensors.get(name)


# Checkpoints of a frozen vision transformer, and the file that has it.


def split(tmp_path: Path, config=EVA) -> tuple[Path, Path, dict[str, torch.Tensor]]:
    """A stage-1 checkpoint and its backbone, which has a block and a norm more and is half precision."""
    state = small_lavis.random_state(config)
    vision = {n.removeprefix("visual_encoder."): t.half() for n, t in state.items() if n.startswith("visual_encoder.")}
    stem = "blocks" if config is EVA else "transformer.resblocks"
    more = {n.replace(f"{stem}.2.", f"{stem}.3."): t for n, t in vision.items() if n.startswith(f"{stem}.2.")}
    torch.save(vision | more | {"norm.weight": torch.ones(48)}, tmp_path / "vision.pth")
    rest = {n: t for n, t in state.items() if not n.startswith("visual_encoder.")}
    expected = rest | {"visual_encoder." + n: t.float() for n, t in vision.items()}
    return small_lavis.save(tmp_path / "stage1.pth", rest), tmp_path / "vision.pth", expected


@pytest.mark.parametrize("config", [EVA, CLIP], ids=["eva", "clip"])
def test_the_vision_transformer_comes_from_its_own_file(tmp_path: Path, config) -> None:
    path, vision, expected = split(tmp_path, config)
    options = ArchitectureOptions(vision_heads=4, qformer_heads=2, vision_layers=3, vision_checkpoint=vision)
    with open_checkpoint(str(path), options=options) as checkpoint:
        got = load_state(checkpoint)
        both = path.read_bytes() + vision.read_bytes()  # in the order of their names: stage1.pth, vision.pth
        assert checkpoint.record.sha256 == hashlib.sha256(both).hexdigest()
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_without_a_count_all_blocks_of_a_vision_file_are_used_and_said(tmp_path: Path) -> None:
    path, vision, _ = split(tmp_path)
    options = ArchitectureOptions(vision_heads=4, qformer_heads=2, vision_checkpoint=vision)
    with open_checkpoint(str(path), options=options) as checkpoint:
        assert checkpoint.config.vision.layers == 4
        assert any("4 of the 4 blocks" in note and "--vision-layers" in note for note in checkpoint.notes)


def test_a_checkpoint_without_vision_tensors_asks_for_the_backbone(tmp_path: Path) -> None:
    path, vision, _ = split(tmp_path)
    refused(path, r"holds no visual_encoder tensors.*--vision-checkpoint eva_vit_g.pth.*storage.googleapis.com")
    many = ArchitectureOptions(vision_heads=4, qformer_heads=2, vision_layers=9, vision_checkpoint=vision)
    with pytest.raises(CheckpointError, match=r"vision.pth has 4 blocks, expected at least 9"):
        open_checkpoint(str(path), options=many)
    wrong = ArchitectureOptions(vision_checkpoint=path)
    with pytest.raises(CheckpointError, match=r"stage1.pth .*blocks.0") as caught:
        open_checkpoint(str(path), options=wrong)
    assert caught.value.code == "vision-checkpoint-unknown"


def test_a_backbone_beside_a_complete_checkpoint_is_refused(tmp_path: Path) -> None:
    _, vision, _ = split(tmp_path)
    path = small_lavis.save(tmp_path / "whole.pth", small_lavis.random_state())
    refused(
        path,
        r"--vision-checkpoint .* cannot be used: .* holds the vision transformer itself",
        ArchitectureOptions(vision_checkpoint=vision),
    )


def test_shards_whose_index_is_broken_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "blip-2"}))
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"model.safetensors.index.json") as caught:
        open_checkpoint(str(tmp_path))
    assert caught.value.code == "shard-index"


# State dicts as training tools wrap them.


def renamed(prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in small_lavis.random_state().items()}


@pytest.mark.parametrize(
    ("value", "notes"),
    [
        ({"model": renamed("module.")}, ["begin with 'module.'"]),
        ({"state_dict": renamed("model."), "epoch": 3}, ["under 'state_dict'", "begin with 'model.'"]),
        ({"model_state_dict": renamed("_orig_mod.module.")}, ["'model_state_dict'", "begin with '_orig_mod.module.'"]),
        ({"module": renamed("")}, ["under 'module'"]),
        ({"ema": renamed("")}, ["under 'ema' (an average of the weights: the file has no others)"]),
        ({"model": renamed(""), "ema": {"x": torch.ones(1)}}, ["under 'model'; not used: 'ema'"]),
        ({name: tensor.double() for name, tensor in renamed("").items()}, ["164 float64 tensors"]),
        (renamed("") | {"logit_scale": torch.ones(())}, ["1 tensor of the checkpoint not used"]),
    ],
)
def test_a_wrapped_state_dict_gives_the_same_weights_and_says_how_it_was_wrapped(
    tmp_path: Path, value: object, notes: list[str]
) -> None:
    torch.save(value, tmp_path / "x.pth")
    with open_checkpoint(str(tmp_path / "x.pth"), options=HEADS) as checkpoint:
        got, found = load_state(checkpoint), checkpoint.notes[: len(notes)]
    assert got.keys() == renamed("").keys()
    assert all(got[name].dtype == torch.float32 for name in got)
    assert all(torch.equal(got[name], tensor) for name, tensor in renamed("").items())
    assert all(part in note for part, note in zip(notes, found, strict=True))


def test_a_prefix_that_only_some_names_have_stays(tmp_path: Path) -> None:
    state = renamed("")
    state["module.itm_head.bias"] = state.pop("itm_head.bias")
    torch.save(state, tmp_path / "x.pth")
    refused(tmp_path / "x.pth", r"1 missing: itm_head.bias")


@pytest.mark.parametrize(
    ("stored", "value", "asked"),
    [(torch.float64, 1e39, torch.float32), (torch.float32, 7e4, torch.float16), (torch.bfloat16, 7e4, torch.float16)],
)
def test_a_weight_that_the_exported_dtype_cannot_hold_is_refused(
    stored: torch.dtype, value: float, asked: torch.dtype
) -> None:
    with pytest.raises(CheckpointError) as caught:
        narrowed(torch.tensor([0.5, -value], dtype=stored), asked, "w")
    assert caught.value.code == "weights-overflow"
    assert torch.equal(narrowed(torch.tensor([0.5], dtype=stored), asked, "w"), torch.tensor([0.5], dtype=asked))
