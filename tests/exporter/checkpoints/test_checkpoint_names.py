"""Every tensor by name: the full-size models' lists, and what is missing, extra or misshaped."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

import pytest
import small_lavis
import torch
from small_lavis import CLIP, EVA, HEADS

from qpert.exporter.checkpoints.checkpoint import load_state
from qpert.exporter.checkpoints.files import TensorInfo, TensorStore
from qpert.exporter.families.blip2.checkpoint import (
    NAMED,
    VISION_PREFIX,
    Plan,
    open_checkpoint,
    plan_checkpoint,
    vision_tensors,
)
from qpert.exporter.families.blip2.names import HUGGING_FACE_NAMES, lavis_origins, name_in
from qpert.graphs.families.blip2.config import Blip2Config
from qpert.runtime.errors import CheckpointError

KEYS = Path(__file__).resolve().parents[2] / "fixtures" / "keys"
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64"}
Entries = dict[str, TensorInfo]


def listed(fixture: str, file: str = "checkpoint") -> Entries:
    """Names, shapes and dtypes of a full-size model, as stock LAVIS or stock transformers has them."""
    entries = {}
    for name, description in json.loads((KEYS / f"{fixture}.json").read_text())["files"][file].items():
        dtype, _, shape = description.partition(" ")
        entries[name] = TensorInfo(tuple(int(n) for n in shape.split("x") if n), DTYPES[dtype])
    return entries


def backbone(entries: Entries, layers: int | None) -> Entries:
    """A vision file's entries as part of a checkpoint."""
    store = TensorStore(entries, lambda _: torch.zeros(()), lambda: None, (Path("vision.pth"),))
    return dict(vision_tensors(store, layers).entries)


def used_parameters(plan: Plan, entries: Entries) -> int:
    return sum(prod(origin.shape(entries)) for origin in plan.origins.values())


@pytest.mark.parametrize("name", NAMED)
def test_the_full_list_of_a_published_lavis_model_is_accepted_and_used(name: str) -> None:
    entries = listed(f"lavis_{name}")
    fixture = json.loads((KEYS / f"lavis_{name}.json").read_text())
    if "vision" in fixture["files"]:
        entries |= backbone(listed(f"lavis_{name}", "vision"), NAMED[name].config.vision.layers)
    plan = plan_checkpoint(entries, name, known=NAMED[name].config)
    assert plan.format == "lavis"
    assert plan.config == Blip2Config(**{**vars(NAMED[name].config), "name": "checkpoint"})
    assert {origin.name for origin in plan.origins.values()} == entries.keys() - set(fixture["unused"])
    unused = ("temp", "Qformer.cls.predictions")
    expected = sum(count for part, count in fixture["parameters"].items() if part not in unused)
    assert used_parameters(plan, entries) == expected


@pytest.mark.parametrize(("fixture", "name"), [("hf_itm_vit_g", "pretrain"), ("hf_itm_vit_g_coco", "coco")])
def test_the_full_list_of_a_published_hugging_face_model_is_accepted_and_used(fixture: str, name: str) -> None:
    entries = listed(fixture)
    plan = plan_checkpoint(entries, fixture)
    assert plan.format == "huggingface"
    assert plan.config == Blip2Config(**{**vars(NAMED[name].config), "name": "checkpoint"})
    assert {origin.name for origin in plan.origins.values()} == entries.keys()
    key_biases = 39 * 1408
    assert used_parameters(plan, entries) == sum(prod(info.shape) for info in entries.values()) - key_biases


def test_stock_lavis_and_stock_hugging_face_name_the_same_parameters() -> None:
    lavis = {name for name in listed("lavis_coco") if not name.startswith(("temp", "Qformer.cls"))}
    lavis.discard("Qformer.bert.embeddings.position_ids")
    assert lavis_origins("huggingface", listed("hf_itm_vit_g_coco")).keys() == lavis


def test_names_go_to_hugging_face_and_back() -> None:
    names = listed("hf_itm_vit_g")
    for lavis, origin in lavis_origins("huggingface", names).items():
        assert name_in("huggingface", lavis) == origin.name
    assert len({pair.lavis for pair in HUGGING_FACE_NAMES}) == len(HUGGING_FACE_NAMES)


@pytest.mark.parametrize("config", [EVA, CLIP], ids=["eva", "clip"])
def test_a_lavis_file_loads_tensor_for_tensor(tmp_path: Path, config: Blip2Config) -> None:
    state = small_lavis.random_state(config)
    path = small_lavis.save(tmp_path / "best.pth", state | small_lavis.unused_state(config))
    with open_checkpoint(str(path), options=HEADS) as checkpoint:
        loaded = load_state(checkpoint)
        assert set(checkpoint.tensors.names()) == state.keys()
        assert checkpoint.config == Blip2Config(**{**vars(config), "name": "best"})
    assert all(torch.equal(loaded[name], state[name]) for name in state)
    assert checkpoint.record.format == "lavis"


def test_one_report_names_everything_that_is_wrong() -> None:
    entries = entries_of(small_lavis.random_state())
    del entries["itm_head.bias"], entries["visual_encoder.pos_embed"], entries["visual_encoder.blocks.1.norm1.weight"]
    entries["Qformer.bert.pooler.dense.weight"] = TensorInfo((32, 32))
    entries["visual_encoder.blocks.0.mlp.fc1.weight"] = TensorInfo((81, 48))
    entries["text_proj.bias"] = TensorInfo((20,), "int64")
    with pytest.raises(CheckpointError) as caught:
        plan_checkpoint(entries, "bad.pth", HEADS)
    message = str(caught.value)
    assert "bad.pth does not hold exactly the tensors" in message
    assert "3 missing: itm_head.bias, visual_encoder.blocks.1.norm1.weight, visual_encoder.pos_embed" in message
    assert "1 unexpected: Qformer.bert.pooler.dense.weight" in message
    assert "1 of the wrong shape: visual_encoder.blocks.0.mlp.fc1.weight [81, 48], expected [80, 48]" in message
    assert "1 of a dtype other than float32, float16, bfloat16, float64: text_proj.bias int64" in message


def test_at_most_ten_names_are_listed_and_the_rest_counted() -> None:
    entries = entries_of(small_lavis.random_state())
    for number in range(25):
        entries[f"Qformer.extra.{number:02}"] = TensorInfo((1,))
    with pytest.raises(CheckpointError, match=r"25 unexpected: Qformer.extra.00, .*Qformer.extra.09, and 15 more"):
        plan_checkpoint(entries, "bad.pth", HEADS)


def test_hugging_face_problems_are_named_as_hugging_face_names_them() -> None:
    entries = listed("hf_itm_vit_g")
    del entries["qformer.encoder.layer.3.intermediate.dense.weight"]
    entries["vision_model.encoder.layers.7.self_attn.qkv.bias"] = TensorInfo((4223,))
    entries["vision_model.head.weight"] = TensorInfo((2,))
    with pytest.raises(CheckpointError) as caught:
        plan_checkpoint(entries, "folder")
    message = str(caught.value)
    assert "1 missing: qformer.encoder.layer.3.intermediate.dense.weight" in message
    assert "1 unexpected: vision_model.head.weight" in message
    assert "1 of the wrong shape: vision_model.encoder.layers.7.self_attn.qkv.bias [4223], expected [4224]" in message


def test_blocks_and_heads_beyond_what_lavis_takes_are_left_out_of_a_vision_file_and_nothing_else() -> None:
    entries = listed("lavis_pretrain", "vision")
    last = {name: info for name, info in entries.items() if name.startswith("blocks.38.")}
    extra = {name.replace("blocks.38.", "blocks.39."): info for name, info in last.items()}
    extra |= {"norm.weight": TensorInfo((1408,)), "head.bias": TensorInfo((1000,)), "mask_token": TensorInfo((1,))}
    assert backbone(entries | extra, None) == {VISION_PREFIX + name: info for name, info in entries.items()}
    checkpoint = listed("lavis_pretrain") | backbone(entries | {"blocks.0.gamma_1": TensorInfo((1408,))}, None)
    with pytest.raises(CheckpointError, match=r"1 unexpected: visual_encoder.blocks.0.gamma_1"):
        plan_checkpoint(checkpoint, "pretrain")


def entries_of(state: dict[str, torch.Tensor]) -> Entries:
    return {name: TensorInfo(tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in state.items()}
