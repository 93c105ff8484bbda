"""Folders that users reported and stock transformers reads: their metadata counts, and scores are stock's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from stock_models import WORDS, small_hf_folder, small_hf_model, small_inputs, small_tokenizer

from qpert.exporter.checkpoints.checkpoint import load_state
from qpert.exporter.export import ExportRequest, export_bundle
from qpert.exporter.families.blip2.checkpoint import open_checkpoint
from qpert.exporter.families.blip2.reference_huggingface import HuggingFaceReference
from qpert.exporter.families.declare import Limits
from qpert.graphs.families.blip2.model import Blip2Retrieval
from qpert.runtime import Retriever
from qpert.runtime.bundle.manifest import read_manifest
from qpert.runtime.cli import run
from qpert.runtime.errors import CheckpointError

PHOTOS = sorted((Path(__file__).parents[3] / "examples" / "photos").glob("*.jpg"))
CAPTIONS = ["a red boat", "two dogs on the beach", "the cat and a kite near water"]
HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(scope="module")
def meanstd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose image processor has mean = std = 0.5, and whose saved processor added `<image>`."""
    folder = small_hf_folder(tmp_path_factory.mktemp("meanstd"), "b")
    edit(folder / "preprocessor_config.json", **HALF)
    tokenizer = small_tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bundle(meanstd: Path) -> Path:
    request = ExportRequest("blip2", str(meanstd), meanstd.parent / "bundle", limits=Limits(2, 2, 3))
    return export_bundle(request).folder


def test_scores_from_picture_files_are_those_of_the_stock_processor_and_model(meanstd: Path, bundle: Path) -> None:
    from PIL import Image
    from transformers import AutoTokenizer, Blip2ForImageTextRetrieval
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    pixels = BlipImageProcessorPil.from_pretrained(meanstd)(
        [Image.open(path).convert("RGB") for path in PHOTOS], return_tensors="pt"
    )["pixel_values"]
    texts = AutoTokenizer.from_pretrained(meanstd)(CAPTIONS, padding=True, return_tensors="pt")
    model = Blip2ForImageTextRetrieval.from_pretrained(meanstd, attn_implementation="eager").eval()
    model.config.image_token_index = None
    expected = np.empty((len(PHOTOS), len(CAPTIONS)), np.float32)
    with torch.no_grad():
        for number in range(len(PHOTOS)):
            one = pixels[number : number + 1].expand(len(CAPTIONS), -1, -1, -1)
            output = model(one, texts["input_ids"], texts["attention_mask"])
            expected[number] = output.logits_per_image.diagonal()
    with Retriever.open(bundle) as retriever:
        assert retriever.encoder.manifest.preprocessing.mean == (0.5, 0.5, 0.5)
        found = retriever.itc_scores(retriever.encode_images(PHOTOS).query_embeds, retriever.encode_texts(CAPTIONS))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    assert expected.std() > 1e-3, "equal scores would show nothing"


def test_a_token_without_a_row_is_left_out_of_the_bundle_and_noted(meanstd: Path, bundle: Path) -> None:
    manifest = read_manifest(bundle)
    assert manifest.notes == ("tokens without a row in the word embeddings were left out: '<image>'",)
    contents = [token["content"] for token in json.loads((bundle / "tokenizer.json").read_text())["added_tokens"]]
    assert "<image>" in (meanstd / "tokenizer.json").read_text()
    assert "<image>" not in contents
    assert manifest.tokenizer.vocab_size == len(WORDS) + 1
    with Retriever.open(bundle) as retriever:
        assert retriever.encoder.tokenizer.encode(["an <image> of a dog"]).input_ids.max() <= len(WORDS)
        assert np.isfinite(retriever.encode_texts(["an <image> of a dog"])).all()


@pytest.mark.parametrize("reference", ["hf", "torch"])
def test_a_bundle_with_other_constants_than_the_checkpoint_fails_verification(
    bundle: Path, tmp_path: Path, reference: str, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(bundle, tmp_path / "bundle")
    if reference == "hf":
        assert run(["verify", str(copy), "--reference", "hf"]) == 0
    values = json.loads((copy / "manifest.json").read_text())
    values["preprocessing"] |= {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.2613026, 0.2757771]}
    (copy / "manifest.json").write_text(json.dumps(values))
    capsys.readouterr()
    assert run(["verify", str(copy), "--reference", reference, "--json"]) == 1
    gates = json.loads(capsys.readouterr().out)["gates"]
    assert [gate["name"] for gate in gates if not gate["pass"]] == ["preprocessing: max abs difference"]


# Weights.


def stray_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')


def extra_tensor(folder: Path) -> None:
    path = folder / "model.safetensors"
    save_file(load_file(path) | {"logit_scale": torch.tensor(2.6)}, path, {"format": "pt"})


def float64(folder: Path) -> None:
    path = folder / "model.safetensors"
    save_file({name: tensor.double() for name, tensor in load_file(path).items()}, path, {"format": "pt"})


def prefixed(folder: Path) -> None:
    path = folder / "model.safetensors"
    save_file({f"module.{name}": tensor for name, tensor in load_file(path).items()}, path, {"format": "pt"})


def gelu_python(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    values["vision_config"]["hidden_act"] = values["qformer_config"]["hidden_act"] = "gelu_python"
    (folder / "config.json").write_text(json.dumps(values))


REPORTED = {
    stray_index: [
        "the weights come from model.safetensors; not used, as in transformers: model.safetensors.index.json"
    ],
    extra_tensor: ["1 tensor of the checkpoint not used, because no part of the network has such a name: logit_scale"],
    float64: [
        "float64 tensors are rounded to float32",
        "config.json states dtype float32, but the weights are stored and read as ",
    ],
    prefixed: ["tensor names begin with 'module.', which was removed"],
    gelu_python: [
        "vision_config.hidden_act 'gelu_python' is the exact GELU",
        "qformer_config.hidden_act 'gelu_python'",
    ],
}


@pytest.mark.parametrize("change", REPORTED, ids=lambda change: change.__name__)
def test_what_stock_transformers_reads_is_read_with_a_note_and_gives_its_outputs(
    tmp_path: Path, change: Callable[[Path], None]
) -> None:
    folder = small_hf_folder(tmp_path, "b", seed=2)
    change(folder)
    with open_checkpoint(str(folder)) as checkpoint:
        notes, prefix = checkpoint.notes, checkpoint.tensors.store.prefix
        network = Blip2Retrieval(checkpoint.config)
        network.load_state_dict(load_state(checkpoint), strict=True)
    assert len(notes) == len(REPORTED[change])
    assert all(part in note for part, note in zip(REPORTED[change], notes, strict=True))
    stock = HuggingFaceReference.open(folder, prefix=prefix)
    pixels = small_inputs("b", images=2)["pixel_values"]
    expected = stock.run("vision", {"pixel_values": pixels.numpy()})["image_embeds"]
    queries = stock.run("image_query", {"image_embeds": expected})["query_embeds"]
    with torch.no_grad():
        image = network.eval().encode_image(pixels)
        np.testing.assert_allclose(image.numpy(), expected, rtol=0, atol=4e-5)  # as in test_checkpoint_huggingface
        np.testing.assert_allclose(network.encode_queries(image).numpy(), queries, rtol=0, atol=1e-5)


def test_a_single_file_counts_before_shards_as_in_transformers(tmp_path: Path) -> None:
    model = small_hf_model("a", seed=1)
    model.save_pretrained(tmp_path, max_shard_size="400KB")
    other = small_hf_model("a", seed=2)
    other.save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", tmp_path)
    stock = HuggingFaceReference.open(tmp_path)
    with open_checkpoint(str(tmp_path)) as checkpoint:
        assert torch.equal(checkpoint.tensors.get("itm_head.weight"), stock.model.itm_head.weight)
        assert torch.equal(checkpoint.tensors.get("itm_head.weight"), other.itm_head.weight)
        assert "model-00001-of-" in checkpoint.notes[0]


def test_a_tensor_more_inside_a_part_of_the_network_is_refused(tmp_path: Path) -> None:
    folder = small_hf_folder(tmp_path, "b")
    path = folder / "model.safetensors"
    name = "qformer.encoder.layer.0.attention.attention.query.lora_A.weight"
    save_file(load_file(path) | {name: torch.ones(2, 64)}, path, {"format": "pt"})
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(folder))
    assert caught.value.code == "checkpoint-tensors"
    assert name in str(caught.value)


# config.json.


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("qformer_config", "position_embedding_type", "relative_key"),
        ("vision_config", "num_channels", 4),
        ("vision_config", "pruned_heads", {"0": [1]}),
        ("qformer_config", "is_decoder", True),
        ("qformer_config", "hidden_act", "gelu_new"),
        (None, "quantization_config", {"bits": 4}),
        (None, "auto_map", {"AutoModel": "x.Y"}),
    ],
)
def test_a_field_that_asks_for_another_network_is_refused_by_name(
    tmp_path: Path, section: str | None, field: str, value: object
) -> None:
    folder = small_hf_folder(tmp_path, "b")
    values = json.loads((folder / "config.json").read_text())
    (values[section] if section else values)[field] = value
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(folder))
    assert caught.value.code == "hub-config-unsupported"
    assert field in str(caught.value)


@pytest.mark.parametrize(("field", "value"), [("qkv_bias", True), ("encoder_hidden_size", 71)])
def test_a_field_that_the_tensors_contradict_is_refused(tmp_path: Path, field: str, value: object) -> None:
    folder = small_hf_folder(tmp_path, "b")  # no bias in qkv, image features 72 wide
    values = json.loads((folder / "config.json").read_text())
    values["vision_config" if field == "qkv_bias" else "qformer_config"][field] = value
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(folder))
    assert caught.value.code == "hub-config-contradiction"


def test_unknown_fields_and_a_dtype_that_is_not_the_stored_one_are_noted(tmp_path: Path) -> None:
    folder = small_hf_folder(tmp_path, "b")
    edit(folder / "config.json", sparkle=3, dtype="float16")
    with open_checkpoint(str(folder)) as checkpoint:
        assert checkpoint.notes == (
            "config.json has unknown fields, which are not used: sparkle",
            "config.json states dtype float16, but the weights are stored and read as float32",
        )


def test_another_image_size_replaces_the_processors_and_is_noted(tmp_path: Path) -> None:
    folder = small_hf_folder(tmp_path, "b")
    with open_checkpoint(str(folder), image_size=48) as checkpoint:
        assert checkpoint.preprocessing.size == checkpoint.config.vision.image_size == 48
        assert checkpoint.notes[0] == "preprocessor_config.json states images of 40 px; --image-size 48 replaces that"
    edit(folder / "preprocessor_config.json", size={"height": 48, "width": 48})
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(folder))
    assert caught.value.code == "preprocessing-size"
