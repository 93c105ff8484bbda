"""Hugging Face folders through `open_checkpoint`, against the stock network that wrote them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from stock_models import SHAPES, small_hf_folder, small_hf_model, small_inputs

from qpert.exporter.checkpoints.checkpoint import load_state
from qpert.exporter.families.blip2.architecture import ArchitectureOptions
from qpert.exporter.families.blip2.checkpoint import open_checkpoint
from qpert.graphs.families.blip2.model import Blip2Retrieval
from qpert.runtime.errors import CheckpointError

TOLERANCE = 1e-5  # float32; both networks compute the same sums in another order
FEATURES = 4e-5
"""Image features are not of unit length like embeddings (magnitude up to 6), and stock LAVIS's own lie 2.0e-5 from the
same network in float64 (ours 1.0e-5): the patch embedding is a matrix product here and a convolution there."""


def opened(folder: Path) -> Blip2Retrieval:
    with open_checkpoint(str(folder)) as checkpoint:
        with torch.device("meta"):
            network = Blip2Retrieval(checkpoint.config)
        network.load_state_dict(load_state(checkpoint), strict=True, assign=True)
    return network.eval().requires_grad_(False)


def edit_config(folder: Path, **changes: Any) -> None:
    """Changes by dotted name; a value of `...` deletes."""
    path = folder / "config.json"
    values = json.loads(path.read_text())
    for dotted, value in changes.items():
        *parents, last = dotted.split("__")
        part = values
        for parent in parents:
            part = part[parent]
        if value is ...:
            del part[last]
        else:
            part[last] = value
    path.write_text(json.dumps(values))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_folder_gives_the_embeddings_and_scores_of_the_stock_network(tmp_path: Path, shape: str) -> None:
    folder = small_hf_folder(tmp_path, shape, seed=3)
    stock, network = small_hf_model(shape, seed=3), opened(folder)
    inputs = small_inputs(shape, images=4, texts=4)
    pixels, ids, mask = inputs["pixel_values"], inputs["input_ids"], inputs["attention_mask"]
    itc = stock(**inputs)
    itm = stock(**inputs, use_image_text_matching_head=True).logits_per_image[:, 1]  # image i with text i

    image = network.encode_image(pixels)
    queries, texts = network.encode_queries(image), network.encode_text(ids, mask)
    scores = torch.einsum("iqe,te->itq", queries, texts).amax(-1)
    matches = network.match(image, ids[:, None], mask[:, None])[:, 0]

    torch.testing.assert_close(image, stock.vision_model(pixels)[0], rtol=0, atol=FEATURES)
    torch.testing.assert_close(queries, itc.image_embeds, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(texts, itc.text_embeds, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(scores, itc.logits_per_image, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(matches, itm, rtol=0, atol=TOLERANCE)
    assert min(scores.std(), matches.std()) > 1e-3, "equal scores would show nothing"


def test_the_stock_network_has_key_biases_and_they_do_not_matter(tmp_path: Path) -> None:
    """The middle third of qkv.bias is random in these folders, and large here: LAVIS has no place for it."""
    stock = small_hf_model("a")
    bias = stock.vision_model.encoder.layers[0].self_attn.qkv.bias
    bias[64:128] = 5 * torch.randn(64, generator=torch.Generator().manual_seed(0))
    stock.save_pretrained(tmp_path / "folder")
    pixels = small_inputs("a")["pixel_values"]
    got = opened(tmp_path / "folder").encode_image(pixels)
    torch.testing.assert_close(got, stock.vision_model(pixels)[0], rtol=0, atol=FEATURES)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_folders_load_as_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    small_hf_model("c").to(dtype).save_pretrained(tmp_path / "half")
    with open_checkpoint(str(tmp_path / "half")) as checkpoint:
        assert checkpoint.tensors.get("itm_head.weight").dtype == dtype
        state = load_state(checkpoint)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    expected = small_hf_model("c").itm_head.weight.to(dtype).float()
    assert torch.equal(state["itm_head.weight"], expected)


def test_shards_load_as_one_checkpoint(tmp_path: Path) -> None:
    model = small_hf_model("a")
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="400KB")
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 2
    with open_checkpoint(str(tmp_path / "one")) as one, open_checkpoint(str(tmp_path / "many")) as many:
        single, sharded = load_state(one), load_state(many)
        assert one.record.sha256 != many.record.sha256
    assert single.keys() == sharded.keys()
    assert all(torch.equal(single[name], sharded[name]) for name in single)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    small_hf_model("a").save_pretrained(tmp_path, max_shard_size="400KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=rf"lacks 1 of the \d+ shards .*{shard.name}; finish the download"):
        open_checkpoint(str(tmp_path))


def test_an_index_that_leads_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    small_hf_model("a").save_pretrained(tmp_path, max_shard_size="400KB")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "../elsewhere.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"'\.\./elsewhere\.safetensors'") as caught:
        open_checkpoint(str(tmp_path))
    assert caught.value.code == "shard-outside"


def test_a_pytorch_model_bin_of_tensors_only_is_read(tmp_path: Path) -> None:
    folder = small_hf_folder(tmp_path, "b")
    with open_checkpoint(str(folder)) as checkpoint:
        expected = load_state(checkpoint)
    torch.save(small_hf_model("b").state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with open_checkpoint(str(folder)) as checkpoint:
        got = load_state(checkpoint)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_a_pytorch_model_bin_with_code_says_how_to_convert_it(tmp_path: Path) -> None:
    folder = small_hf_folder(tmp_path, "b")
    (folder / "model.safetensors").unlink()
    torch.save({"weights": Path()}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pickled code \(pathlib.*safe_serialization=True"):
        open_checkpoint(str(folder))


def test_the_record_and_the_vocabulary_come_from_the_folder(tmp_path: Path) -> None:
    folder = small_hf_folder(tmp_path, "c")
    (folder / "README.md").write_text("---\nlanguage: en\nlicense: mit\n---\n# A model\n")
    with open_checkpoint(str(folder)) as checkpoint:
        record = checkpoint.record
        assert (record.name, record.source, record.format) == (folder.name, str(folder), "huggingface")
        assert record.license == "mit"
        assert checkpoint.tokenizer == folder / "tokenizer.json"
        assert checkpoint.config.ln_vision_eps == checkpoint.config.vision.layer_norm_eps == 1e-5
        assert checkpoint.config.qformer.layer_norm_eps == 1e-10
        assert (checkpoint.config.vision.heads, checkpoint.config.qformer.heads) == (2, 4)
        assert checkpoint.notes == ()


def test_values_that_config_json_leaves_out_are_transformers_defaults_and_said(tmp_path: Path) -> None:
    folder = small_hf_folder(tmp_path, "a")
    edit_config(folder, qformer_config__layer_norm_eps=..., qformer_config__num_hidden_layers=...)
    with open_checkpoint(str(folder)) as checkpoint:
        assert checkpoint.config.qformer.layer_norm_eps == 1e-12
        assert checkpoint.notes == (
            "config.json omits qformer_config.layer_norm_eps: transformers' default 1e-12 is used",
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "blip"}, r"unknown architecture: model_type 'blip' .*expected 'blip-2'"),
        ({"model_type": ...}, r"unknown architecture: model_type None"),
        (
            {"architectures": ["Blip2ForConditionalGeneration"]},
            r"describes Blip2ForConditionalGeneration, which has no ITC and ITM heads; expected "
            r"Blip2ForImageTextRetrieval.*Salesforce/blip2-itm-vit-g",
        ),
        ({"vision_config__hidden_act": "quick_gelu"}, r"vision_config.hidden_act 'quick_gelu'; only 'gelu'"),
        ({"qformer_config__hidden_act": "relu"}, r"qformer_config.hidden_act 'relu'"),
        ({"vision_config__num_attention_heads": 0}, r"num_attention_heads 0, expected a positive number"),
        ({"vision_config__num_attention_heads": 5}, r"5 vision heads do not divide the width 64"),
        (
            {"vision_config__hidden_size": 80, "num_query_tokens": 32},
            r"contradicts the tensors .*vision.width 80 \(tensors: 64\); qformer.queries 32 \(tensors: 8\)",
        ),
        ({"qformer_config__cross_attention_frequency": 1}, r"cross_attention_frequency 1 \(tensors: 2\)"),
        ({"vision_config__image_size": 224}, r"vision.image_size 224 \(tensors: 56\)"),
        ({"vision_config": [1]}, r"vision_config is \[1\], expected an object"),
    ],
)
def test_a_config_json_that_cannot_be_right_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = small_hf_folder(tmp_path, "a")
    edit_config(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(str(folder))


def test_an_option_that_contradicts_config_json_is_refused(tmp_path: Path) -> None:
    folder = str(small_hf_folder(tmp_path, "a"))
    with pytest.raises(CheckpointError, match=r"--vision-heads is 8, .*config.json states 4") as caught:
        open_checkpoint(folder, options=ArchitectureOptions(vision_heads=8))
    assert caught.value.code == "option-contradicts-config"
    with pytest.raises(CheckpointError, match=r"--qformer-eps is 1e-05, .*config.json states 1e-12") as caught:
        open_checkpoint(folder, options=ArchitectureOptions(qformer_eps=1e-5))
    assert caught.value.code == "option-contradicts-config"


def test_folders_that_are_no_checkpoints_say_what_is_in_them(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(CheckpointError, match=r"it has notes.txt") as caught:
        open_checkpoint(str(tmp_path))
    assert caught.value.code == "hub-file-missing"
    folder = small_hf_folder(tmp_path, "a")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds no weights: expected model.safetensors.*vocab.txt"):
        open_checkpoint(str(folder))
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json is not JSON"):
        open_checkpoint(str(folder))


def test_a_single_file_of_a_folder_asks_for_the_folder(tmp_path: Path) -> None:
    folder = small_hf_folder(tmp_path, "a")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(folder / "model.safetensors"))
    assert caught.value.code == "hub-folder-expected"
