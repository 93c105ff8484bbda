"""The LAVIS reference against LAVIS's own functions, and what it says when something is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from qpert.exporter.families.blip2.reference_lavis import ENVIRONMENT, LavisReference
from qpert.graphs.families.blip2.config import Blip2Config
from qpert.runtime.errors import CheckpointError, UnavailableError

# The same float32 operations; only how pairs are batched differs.
CLOSE = {"rtol": 0, "atol": 3e-6}
IMAGES = 5  # of the 24, to keep this short


def config_of(folder: Path) -> Blip2Config:
    return Blip2Config.from_dict(json.loads((folder / "config.json").read_text()))


def opened(folder: Path, **options) -> LavisReference:
    vision = folder / "vision.pth"
    return LavisReference.open(
        folder / "checkpoint.pth",
        config=config_of(folder),
        vision_checkpoint=vision if vision.exists() else None,
        **options,
    )


def every_pair(expected: dict[str, np.ndarray], images: int = IMAGES) -> dict[str, np.ndarray]:
    """Inputs of `itm`: all the texts with each of the first images."""
    texts = {name: expected[name] for name in ("input_ids", "attention_mask")}
    repeated = {name: np.broadcast_to(value, (images, *value.shape)) for name, value in texts.items()}
    return {"image_embeds": expected["image_embeds"][:images], **repeated}


@pytest.fixture(scope="module", params=["eva", "clip", "stage1"])
def folder(lavis_folder: Path, request: pytest.FixtureRequest) -> Path:
    return lavis_folder / request.param


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "expected.safetensors")


@pytest.fixture(scope="module")
def reference(folder: Path) -> Iterator[LavisReference]:
    with opened(folder, stages="both") as reference:
        yield reference


@pytest.mark.lavis
def test_image_stages_equal_forward_image(reference: LavisReference, expected: dict[str, np.ndarray]):
    embeds = reference.run("vision", {"pixel_values": expected["pixel_values"][:IMAGES]})
    np.testing.assert_allclose(embeds["image_embeds"], expected["image_embeds"][:IMAGES], **CLOSE)
    queries = reference.run("image_query", embeds)["query_embeds"]
    np.testing.assert_allclose(queries, expected["query_embeds"][:IMAGES], **CLOSE)


@pytest.mark.lavis
def test_contrastive_scores_equal_the_stock_forward(reference: LavisReference, expected: dict[str, np.ndarray]):
    texts = {name: expected[name] for name in ("input_ids", "attention_mask")}
    captions = reference.run("text", texts)["text_embeds"]
    np.testing.assert_allclose(captions, expected["text_embeds"], **CLOSE)
    queries = reference.run("image_query", {"image_embeds": expected["image_embeds"]})["query_embeds"]
    scores = np.einsum("iqe,ie->iq", queries, captions[:24]).max(-1)  # Blip2ITM.forward: image i with text i
    np.testing.assert_allclose(scores, expected["forward_itc"][:, 0], **CLOSE)


@pytest.mark.lavis
def test_matching_scores_equal_compute_itm_and_the_stock_forward(
    reference: LavisReference, expected: dict[str, np.ndarray]
):
    scores = reference.run("itm", every_pair(expected))["itm_scores"]
    np.testing.assert_allclose(scores, expected["itm_scores"][:IMAGES], **CLOSE)
    np.testing.assert_allclose(np.diag(scores), expected["forward_itm"][:IMAGES, 1], **CLOSE)


@pytest.mark.lavis
@pytest.mark.parametrize("graph", ["image_query", "itm"])
def test_zero_weights_are_the_stock_network(graph: str, reference: LavisReference, expected: dict[str, np.ndarray]):
    given = every_pair(expected)
    if graph == "image_query":
        given = {"image_embeds": given["image_embeds"]}
    masks = np.random.default_rng(0).random((IMAGES, 2, expected["image_embeds"].shape[1])).astype(np.float32)
    outputs = []
    for weight in (0.0, 8.0):
        weights = np.full((IMAGES, 2), weight, np.float32)
        outputs += reference.run(graph, given | {"object_masks": masks, "box_weights": weights}).values()
    (stock,) = reference.run(graph, given).values()
    np.testing.assert_array_equal(outputs[0], stock)
    assert np.abs(outputs[1] - stock).max() > 0.01


@pytest.mark.lavis
@pytest.mark.parametrize("graph", ["image_query", "itm"])
def test_a_box_that_spans_every_dimension_scales_the_queries(graph: str, lavis_folder: Path, tmp_path: Path):
    # With a threshold above 1 every dimension is kept, P = I (17 tokens span the head's 16) and M = (1 + w) I: the
    # network whose cross-attention query layers are 1 + w times as large, as a checkpoint that LAVIS loads.
    folder = lavis_folder / "clip"
    expected = load_file(folder / "expected.safetensors")
    scaled = torch.load(folder / "checkpoint.pth", weights_only=True)
    for name, value in scaled["model"].items():
        if "crossattention.self.query." in name:
            value *= 1.75
    torch.save(scaled, tmp_path / "scaled.pth")
    given = every_pair(expected)
    if graph == "image_query":
        given = {"image_embeds": given["image_embeds"]}
    with LavisReference.open(tmp_path / "scaled.pth", config=config_of(folder)) as reference:
        (wanted,) = reference.run(graph, given).values()
    whole = np.ones((IMAGES, 1, 17), np.float32)
    boxes = {"object_masks": whole, "box_weights": np.full((IMAGES, 1), 0.75, np.float32)}
    with opened(folder, threshold=1.1, stages="both") as reference:
        (found,) = reference.run(graph, given | boxes).values()
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5)


@pytest.mark.lavis
def test_a_vector_added_to_every_key_does_not_change_centred_subspaces(lavis_folder: Path, tmp_path: Path):
    # Added to the bias of the cross-attentions' keys, in a checkpoint that LAVIS loads; the softmax ignores it.
    folder = lavis_folder / "clip"
    expected = load_file(folder / "expected.safetensors")
    shifted = torch.load(folder / "checkpoint.pth", weights_only=True)
    for name, value in shifted["model"].items():
        if "crossattention.self.key.bias" in name:
            value += torch.randn(value.shape, generator=torch.Generator().manual_seed(6))
    torch.save(shifted, tmp_path / "shifted.pth")
    features = every_pair(expected)["image_embeds"]
    mask = np.zeros((IMAGES, 1, 17), np.float32)
    mask[:, :, 5:9] = 1
    boxes = {"image_embeds": features, "object_masks": mask, "box_weights": np.full((IMAGES, 1), 3, np.float32)}
    found = {}
    for centre_keys in (False, True):
        for file in (folder / "checkpoint.pth", tmp_path / "shifted.pth"):
            with LavisReference.open(file, config=config_of(folder), threshold=0.6, centre_keys=centre_keys) as lavis:
                found[centre_keys, file.stem] = lavis.run("image_query", boxes)["query_embeds"]
    np.testing.assert_allclose(found[True, "shifted"], found[True, "checkpoint"], rtol=0, atol=1e-4)
    assert np.abs(found[False, "shifted"] - found[False, "checkpoint"]).max() > 1e-2


@pytest.mark.lavis
@pytest.mark.parametrize(("name", "corners"), [("eva", False), ("clip", True)])
def test_another_image_size_interpolates_as_lavis_does(name: str, corners: bool, lavis_folder: Path, tmp_path: Path):
    # The checkpoint whose position embedding was resized beforehand gives the same. LAVIS aligns the corners for CLIP.
    folder = lavis_folder / name
    config = config_of(folder).with_image_size(98)  # 4×4 → 7×7
    saved = torch.load(folder / "checkpoint.pth", weights_only=True)["model"]
    key = "visual_encoder." + ("pos_embed" if name == "eva" else "positional_embedding")
    old = saved[key].reshape(17, -1)
    grid = old[1:].T.reshape(1, -1, 4, 4)
    new = torch.nn.functional.interpolate(grid, size=(7, 7), mode="bicubic", align_corners=corners)
    saved[key] = torch.cat([old[:1], new.flatten(2)[0].T]).reshape(*saved[key].shape[:-2], 50, -1)
    torch.save(saved, tmp_path / "resized.pth")  # a bare state dict, too
    pixels = {"pixel_values": np.random.default_rng(0).normal(size=(2, 3, 98, 98)).astype(np.float32)}
    with LavisReference.open(tmp_path / "resized.pth", config=config) as reference:
        wanted = reference.run("vision", pixels)["image_embeds"]
    with LavisReference.open(folder / "checkpoint.pth", config=config) as reference:
        found = reference.run("vision", pixels)["image_embeds"]
    np.testing.assert_allclose(found, wanted, **CLOSE)


@pytest.mark.lavis
def test_the_block_that_lavis_leaves_out_of_a_vision_file_is_reported(lavis_folder: Path):
    with opened(lavis_folder / "stage1") as reference:
        assert "head.weight" in reference.ignored
        assert {name.split(".")[1] for name in reference.ignored if name.startswith("blocks.")} == {"3"}


@pytest.mark.lavis
@pytest.mark.parametrize("name", ["eva", "clip"])
def test_expected_matrices_hold_what_their_k_says(name: str, lavis_folder: Path):
    folder = lavis_folder / name
    expected = load_file(folder / "expected.safetensors")
    for name, candidates in (("k8.i2t", 8), ("k8.t2i", 8), ("k24.t2i", 24), ("all.i2t", 36), ("all.t2i", 24)):
        assert ((expected[name] > -100).sum(1) == candidates).all(), name
    facts = json.loads((folder / "facts.json").read_text())
    assert "out of range" in facts["k_above_candidates"], "stock LAVIS no longer raises: expected outputs need that k"


def break_checkpoint(folder: Path, to: Path, change) -> Path:
    saved = torch.load(folder / "checkpoint.pth", weights_only=True)
    change(saved["model"])
    torch.save(saved, to / "broken.pth")
    return to / "broken.pth"


@pytest.mark.lavis
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop("itm_head.bias"), r"1 tensors are missing \(itm_head.bias\)"),
        (lambda m: m.update(extra=torch.zeros(1)), r"1 are not of this model \(extra\)"),
        (lambda m: m.update(query_tokens=torch.zeros(1, 2, 3)), "size mismatch for query_tokens"),
        (lambda m: m.pop("visual_encoder.pos_embed"), r"1 tensors are missing \(visual_encoder.pos_embed\)"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, message: str, lavis_folder: Path, tmp_path: Path):
    broken = break_checkpoint(lavis_folder / "eva", tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        LavisReference.open(broken, config=config_of(lavis_folder / "eva"))


@pytest.mark.lavis
def test_tensors_that_retrieval_does_not_use_may_be_absent(lavis_folder: Path, tmp_path: Path):
    def strip(model: dict[str, torch.Tensor]) -> None:
        for name in [name for name in model if "cls." in name or name == "temp" or name.endswith("position_ids")]:
            del model[name]

    ids = {"input_ids": np.full((1, 4), 5), "attention_mask": np.ones((1, 4), np.int64)}
    stripped = break_checkpoint(lavis_folder / "eva", tmp_path, strip)
    found = []
    for checkpoint in (stripped, lavis_folder / "eva" / "checkpoint.pth"):
        with LavisReference.open(checkpoint, config=config_of(lavis_folder / "eva")) as opened:
            found.append(opened.run("text", ids)["text_embeds"])
    np.testing.assert_array_equal(found[0], found[1])


@pytest.mark.lavis
def test_a_stage_one_checkpoint_without_its_vision_file_is_refused(lavis_folder: Path):
    with pytest.raises(CheckpointError, match=r"43 tensors are missing \(visual_encoder"):
        LavisReference.open(lavis_folder / "stage1" / "checkpoint.pth", config=config_of(lavis_folder / "stage1"))


@pytest.mark.lavis
def test_wrong_inputs_come_back_as_an_error_and_the_process_lives_on(reference: LavisReference):
    with pytest.raises(RuntimeError, match=r"text was given \['input_ids'\], expected"):
        reference.run("text", {"input_ids": np.zeros((1, 4), np.int64)})
    ids = {"input_ids": np.full((1, 4), 5), "attention_mask": np.ones((1, 4), np.int64)}
    assert reference.run("text", ids)["text_embeds"].dtype == np.float32


@pytest.mark.lavis
def test_a_process_that_died_is_reported_with_its_exit_code(lavis_folder: Path):
    reference = opened(lavis_folder / "eva")
    folder = Path(reference._worker._folder.name)
    reference._worker._process.kill()
    with pytest.raises(UnavailableError, match=r"exit code -9 \(killed: is there enough memory\?\)"):
        reference.run("vision", {"pixel_values": np.zeros((1, 3, 56, 56), np.float32)})
    reference.close()
    reference.close()
    assert not folder.exists()
    with pytest.raises(UnavailableError, match="has been closed"):
        reference.run("vision", {"pixel_values": np.zeros((1, 3, 56, 56), np.float32)})


def test_a_checkpoint_that_is_not_there_says_so(tmp_path: Path):
    somewhere = shutil.which("python3")
    assert somewhere is not None
    with pytest.raises(CheckpointError, match=r"gone.pth does not exist, expected a LAVIS checkpoint \(.pth\)"):
        LavisReference.open(tmp_path / "gone.pth", config=Blip2Config.from_dict(SMALL), python=Path(somewhere))


def test_an_interpreter_without_lavis_says_what_to_do(tmp_path: Path):
    somewhere = shutil.which("python3", path="/usr/bin:/bin:/usr/local/bin") or shutil.which("python3")
    assert somewhere is not None
    (tmp_path / "a.pth").touch()
    with pytest.raises(UnavailableError, match=r"make lavis-env") as caught:
        LavisReference.open(tmp_path / "a.pth", config=Blip2Config.from_dict(SMALL), python=Path(somewhere))
    assert caught.value.code == "lavis-environment-incomplete"


def test_without_the_environment_it_says_how_to_make_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("QPERT_LAVIS_PYTHON", str(tmp_path / "python"))
    with pytest.raises(UnavailableError, match=r"does not exist. Run `make lavis-env`.* or set QPERT_LAVIS_PYTHON"):
        ENVIRONMENT.python()


SMALL = {
    "name": "small",
    "vision": {
        **{"family": "eva", "image_size": 28, "patch_size": 14, "width": 16, "layers": 1, "heads": 2},
        **{"mlp_width": 32, "layer_norm_eps": 1e-6},
    },
    "qformer": {
        **{"width": 16, "layers": 1, "heads": 2, "mlp_width": 32, "cross_attention_frequency": 1},
        **{"queries": 2, "vocab_size": 8, "max_positions": 8},
    },
    "embed_dim": 4,
}
