"""The demonstration that overlooks small objects: query sets for boxes, key centring, its checkpoint and its card."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from qpert.exporter import demo
from qpert.exporter.checkpoints.checkpoint import load_state
from qpert.exporter.families.blip2.checkpoint import open_checkpoint
from qpert.graphs.families.blip2.config import CONFIGS
from qpert.graphs.families.blip2.model import Blip2Retrieval
from qpert.graphs.perturbation.choices import GraphPerturbation
from qpert.runtime.files import sha256_of
from qpert.runtime.inputs.boxes import Boxes
from qpert.runtime.inputs.images import preprocess_images
from qpert.runtime.inputs.perturbation import object_masks
from qpert.runtime.inputs.preprocessing import ImagePreprocessing
from qpert.runtime.progress import Silent
from qpert.runtime.scenes import draw_scene, sample_scene

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "demonstration"
NAME = "demo-small-objects"
THRESHOLD = 0.9
MODULES = ("scoring", "box_queries", "key_centring", "small_objects_data", "small_objects_train", "small_objects_card")
CLOSE = {"rtol": 0, "atol": 2e-5}
"""Unit vectors in float32 through four layers, from subspaces by SVD and by `eigh` in float64."""


@pytest.fixture(scope="module")
def scripts() -> dict[str, ModuleType]:
    """The scripts as modules: they import each other by their bare names, as they do when they are run."""
    sys.path.insert(0, str(FOLDER))
    try:
        return {name: importlib.import_module(name) for name in MODULES}
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def boxed():
    """Six scenes as image tokens of the vision tower of both checkpoints, and their boxes; the third has none."""
    scenes = [sample_scene(f"boxes of the study/{index}") for index in range(6)]
    boxes = [Boxes(np.array([item.box for item in scene.objects], np.float64), scene.size) for scene in scenes]
    boxes[2] = Boxes.empty(scenes[2].size)
    model = network()
    pixels = preprocess_images([draw_scene(scene) for scene in scenes], ImagePreprocessing(112))
    with torch.no_grad():
        return model.encode_image(torch.from_numpy(pixels)), boxes


def network(name: str = NAME) -> Blip2Retrieval:
    """The checkpoint with the float64 oracle as its perturbation."""
    with open_checkpoint(name) as checkpoint:
        model = Blip2Retrieval(checkpoint.config, GraphPerturbation(threshold=THRESHOLD))
        model.load_state_dict({key: value.float() for key, value in load_state(checkpoint).items()})
    return model.eval().requires_grad_(requires_grad=False)


def by_oracle(scripts, tokens, boxes, weights):
    """Query embeddings of the model's own forward, with the oracle of the perturbation."""
    masks = torch.from_numpy(object_masks(boxes, grid=scripts["scoring"].token_grid(), coverage="exact"))
    padded = torch.zeros(masks.shape[:2])
    for row, each in enumerate(weights):
        padded[row, : len(each)] = torch.as_tensor(each)
    return network().encode_queries(tokens, masks, padded)


def test_one_set_for_all_boxes_is_the_models_own_perturbation(scripts, boxed):
    tokens, boxes = boxed
    found = scripts["box_queries"].boxed_images(network(), tokens, boxes)
    weights = [3.0 * (1 - each.areas) for each in boxes]
    got = found.together(torch.from_numpy(np.concatenate(weights)).float(), THRESHOLD)
    torch.testing.assert_close(got, by_oracle(scripts, tokens, boxes, weights), **CLOSE)


def test_a_set_for_each_box_is_the_perturbation_by_that_box_alone(scripts, boxed):
    tokens, boxes = boxed
    found = scripts["box_queries"].boxed_images(network(), tokens, boxes)
    got = found.each(torch.full((len(found.owners),), 8.0), THRESHOLD)
    assert len(got) == sum(map(len, boxes))
    for row, image in enumerate(found.owners.tolist()):
        own = row - int((found.owners < image).sum())
        alone = Boxes(boxes[image].xyxy[[own]], boxes[image].size)
        expected = by_oracle(scripts, tokens[[image]], [alone], [[8.0]])
        torch.testing.assert_close(got[[row]], expected, **CLOSE)


def test_the_best_set_of_each_picture_counts(scripts):
    scores = np.array([[1.0, 5.0], [3.0, 2.0], [4.0, 0.0]], np.float32)
    got = scripts["box_queries"].best_of_sets(scores, np.array([0, 0, 2]), 3)
    np.testing.assert_array_equal(got, [[3.0, 5.0], [-np.inf, -np.inf], [4.0, 0.0]])


def test_key_biases_change_nothing_without_boxes_and_much_with_them(scripts, boxed):
    tokens, boxes = boxed
    found = []
    for centred in (False, True):
        model = network()
        centre = scripts["key_centring"].background_mean(tokens, boxes) if centred else None
        scripts["key_centring"].set_key_centre(model, centre)
        images = scripts["box_queries"].boxed_images(model, tokens, boxes)
        found.append((images.stock(), images.each(torch.full((len(images.owners),), 8.0), THRESHOLD)))
    torch.testing.assert_close(found[0][0], found[1][0], **CLOSE)
    assert (found[0][1] - found[1][1]).abs().max() > 0.1


def test_keys_of_the_centre_are_zero(scripts, boxed):
    tokens, boxes = boxed
    model = network()
    centre = scripts["key_centring"].background_mean(tokens, boxes)
    scripts["key_centring"].set_key_centre(model, centre)
    keys, _ = model.Qformer.keys_and_values(centre[None, None])
    for layer in keys:
        assert layer.abs().max() < 1e-4  # sums of 192 products of about one, in float32


def test_the_background_is_what_no_box_covers(scripts):
    tokens = torch.zeros(1, 65, 2)
    tokens[0, 0], tokens[0, 1:33], tokens[0, 33:] = 100.0, 3.0, 5.0  # CLS, the upper half, the lower half
    boxes = [Boxes(np.array([[0.0, 112.0, 224.0, 224.0]]), (224, 224))]
    assert scripts["key_centring"].background_mean(tokens, boxes).tolist() == [3.0, 3.0]


def test_some_tokens_keeps_cls_and_draws_different_patches(scripts):
    torch.manual_seed(0)
    tokens = torch.arange(65.0).expand(4, 65)[..., None]
    for _ in range(20):
        kept = scripts["small_objects_train"].some_tokens(tokens, 0.8)[..., 0]
        assert 1 + round(64 * 0.2) <= kept.shape[1] <= 65
        assert (kept[:, 0] == 0).all()
        assert all(len(set(row.tolist())) == kept.shape[1] for row in kept)
    assert scripts["small_objects_train"].some_tokens(tokens, 0.0).shape == (4, 65, 1)


def test_only_what_reads_the_picture_learns(scripts):
    student = scripts["small_objects_train"].begin(3)
    shipped = network("demo").state_dict()
    for name, parameter in student.model.named_parameters():
        new = any(part in name for part in scripts["small_objects_train"].NEW)
        assert parameter.requires_grad == (new and not name.endswith("crossattention.self.key.bias")), name
        if not new:
            assert torch.equal(parameter, shipped[name]), name


def test_the_checkpoint_opens_by_its_name_and_shares_what_was_not_trained(scripts):
    with open_checkpoint(NAME) as checkpoint:
        assert checkpoint.record.name == NAME
        assert checkpoint.config.vision == CONFIGS["demo"].vision
        assert checkpoint.config.qformer == CONFIGS["demo"].qformer
    own, other = network().state_dict(), network("demo").state_dict()
    assert own.keys() == other.keys()
    for name, tensor in own.items():
        if any(part in name for part in scripts["small_objects_train"].NEW):
            assert not torch.equal(tensor, other[name]) or not tensor.any(), name
        else:
            assert torch.equal(tensor, other[name]), name
    assert demo.SMALL_OBJECTS_MODEL.stat().st_size <= 10_000_000


def test_the_table_of_named_objects_is_that_of_the_training_scenes(scripts):
    """Counted anew on the first scenes; the whole table takes minutes."""
    table = json.loads((ROOT / "benchmarks" / "results" / "demonstration_named_by_size.json").read_text())
    data = scripts["small_objects_data"]
    assert table["salience"] == {"half": data.SALIENCE.half, "steepness": data.SALIENCE.steepness}
    counted = data.named_by_size(data.scenes(range(300), 0))
    for one, whole in zip(counted, table["bins"], strict=True):
        assert (one["from"], one["to"]) == (whole["from"], whole["to"])
        # shares of captions that are alike within a scene: groups count, not captions; five standard errors
        spread = np.sqrt(whole["named"] * (1 - whole["named"]) / max(one["objects"], 1))
        assert abs(one["named"] - whole["named"]) <= 5 * spread + 0.01


def test_the_committed_card_is_that_of_the_committed_measurements(scripts, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["small_objects_card.py", "--out", str(tmp_path / "card.md")])
    scripts["small_objects_card"].main()
    text = (tmp_path / "card.md").read_text(encoding="utf-8")
    assert text == scripts["small_objects_card"].CARD.read_text(encoding="utf-8")
    assert "{{" not in text


def test_the_study_measures_a_handful_of_scenes(scripts, tmp_path, monkeypatch):
    """`perturbation_study.py` from splits to report, with detections that are none on some pictures."""
    sys.path.insert(0, str(FOLDER))
    try:
        study, data = importlib.import_module("perturbation_study"), importlib.import_module("study_data")
    finally:
        sys.path.remove(str(FOLDER))
    monkeypatch.setattr(study, "THRESHOLDS", (0.9,))
    folder, out = tmp_path / "detections", tmp_path / "report.json"
    folder.mkdir()
    for split, count in (("val", 12), ("test", 14)):
        opened = data.open_split(tmp_path, split, count, Silent())
        line = {"image": opened.images[1].name, "x1": 10, "y1": 10, "x2": 60, "y2": 60, "score": 0.9}
        (folder / f"{split}.jsonl").write_text(json.dumps(line) + "\n")
    asked = ["--val", 12, "--test", 14, "--alphas", 8, "--rerank", 3, "--work", tmp_path, "--detections", folder]
    monkeypatch.setattr(sys, "argv", ["perturbation_study.py", *map(str, asked), "--out", str(out)])
    with torch.no_grad():
        study.main()
    torch.set_grad_enabled(True)
    report = json.loads(out.read_text())[NAME]
    assert set(report["keys"]) == {"shipped", "zero"}
    assert report["sha256"] == sha256_of(demo.SMALL_OBJECTS_MODEL)
    assert report["boxes"]["test"]["detected"] == pytest.approx(1 / 14, abs=0.005)
    true, detected = report["keys"]["shipped"]["true"], report["keys"]["shipped"]["detected"]
    assert true["itc"]["stock"] == detected["itc"]["stock"]  # no boxes, no difference
    assert true["itc"]["stock"]["smallest"]["t2i"]["r1"]["gain"] == 0
    assert {"itm_3", "attention"} <= true.keys()
    first, second = true["attention"]["stock"]
    assert 0 < first < 1
    assert 0 < second < 1
