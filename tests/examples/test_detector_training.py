"""The detector of the demonstration: its training resumes, what ships works in stock transformers, its card is true."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from qpert.runtime.files import sha256_of
from qpert.runtime.inputs.box_files import read_box_file
from qpert.runtime.inputs.datasets import read_dataset
from qpert.runtime.progress import Silent
from qpert.runtime.scenes import sample_scene, write_dataset

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parents[2] / "examples" / "demonstration_detector"
SHIPPED = Path(__file__).parents[2] / "exporter" / "detectors" / "demo"
SCENES = 12


@pytest.fixture(scope="module")
def scripts() -> dict[str, ModuleType]:
    """The scripts as modules. Names that the other demonstration's scripts have too are given back afterwards."""
    own = ("train", "evaluate", "install", "card", "boxes")
    before = {name: sys.modules.pop(name) for name in own if name in sys.modules}
    sys.path.insert(0, str(FOLDER))
    try:
        names = ("detector_data", "detector_model", "average_precision", *own)
        found = {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(str(FOLDER))
        for name in own:
            sys.modules.pop(name, None)
        sys.modules.update(before)
    return found


@pytest.fixture
def small(scripts, monkeypatch):
    """Pictures, shards and looks at the validation split as small as they can be."""
    monkeypatch.setattr(scripts["detector_data"], "SHARD", SCENES)
    monkeypatch.setattr(scripts["average_precision"], "QUICK", 2)
    monkeypatch.setattr(scripts["train"], "SIDE", 96)
    monkeypatch.setattr(scripts["train"], "FIRST_SIDE", 64)


def state_of(work: Path) -> dict:
    return torch.load(work / "checkpoint.pt", weights_only=True)


@pytest.mark.usefixtures("small")
def test_a_run_interrupted_between_two_steps_ends_with_the_weights_of_one_that_was_not(scripts, tmp_path, monkeypatch):
    train = scripts["train"]
    plan = train.Plan(seed=3, scenes=SCENES, steps=2, first_steps=1, batch=4, warm=1)
    train.run(plan, tmp_path / "whole", Silent(), save_every=1e9, evaluate_every=1e9)
    taken = train.Trainer.train_step

    def interrupted(self):
        if self.step == 1:
            raise KeyboardInterrupt
        return taken(self)

    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "train_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train.run(plan, tmp_path / "parts", Silent(), save_every=0, evaluate_every=1e9)
    begun = state_of(tmp_path / "parts")
    assert begun["step"] == 1
    train.run(plan, tmp_path / "parts", Silent(), save_every=0, evaluate_every=1e9)
    resumed, expected = state_of(tmp_path / "parts"), state_of(tmp_path / "whole")
    assert resumed["step"] == expected["step"] == 2
    for part in ("detector", "mean"):
        for name, tensor in expected[part].items():
            # everything drawn depends on seed and step, and one thread count gives one order of sums: bit for bit
            assert torch.equal(resumed[part][name], tensor), name
        assert any(not torch.equal(begun[part][name], tensor) for name, tensor in expected[part].items())
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["side"] == 96
    assert 0 <= lines[-1]["val_ap"] <= 100


@pytest.mark.usefixtures("small")
def test_an_installed_detector_opens_in_stock_transformers_with_the_mean_of_the_weights(scripts, tmp_path):
    from transformers import AutoModelForObjectDetection

    train, install = scripts["train"], scripts["install"]
    plan = train.Plan(seed=3, scenes=SCENES, steps=1, first_steps=0, batch=2, warm=1)
    train.run(plan, tmp_path, Silent(), save_every=1e9, evaluate_every=1e9)
    longer = train.Plan(seed=3, scenes=SCENES, steps=2, first_steps=0, batch=2, warm=1)
    train.run(longer, tmp_path, Silent(), save_every=1e9, evaluate_every=1e9)
    state = install.install(tmp_path, tmp_path / "out")
    assert [(one["from_step"], one["steps"]) for one in install.history(tmp_path, state)["plans"]] == [(0, 1), (1, 2)]
    loaded = AutoModelForObjectDetection.from_pretrained(tmp_path / "out").state_dict()
    expected = state_of(tmp_path)["mean"]
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(loaded[name], tensor), name
    assert (tmp_path / "out" / "model.safetensors").stat().st_size <= install.LIMIT


def test_boxes_in_shares_of_the_picture_are_the_scenes_boxes(scripts):
    scene = sample_scene("a scene for a detector")
    boxes, kinds = scripts["detector_data"].truth(scene)
    width, height = scene.size
    for item, (x, y, w, h), kind in zip(scene.objects, boxes.tolist(), kinds.tolist(), strict=False):
        corners = (x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height
        assert corners == pytest.approx(item.box, abs=1e-4)  # float32 at up to 240 pixels
        assert scripts["detector_data"].LABELS[kind] == item.kind
    assert (kinds[len(scene.objects) :] == -1).all()


def test_a_mirrored_picture_has_mirrored_boxes(scripts):
    pixels = np.zeros((1, 8, 8, 3), np.uint8)
    pixels[0, :, :2] = 255  # the left quarter
    boxes, kinds = np.zeros((1, 12, 4), np.float32), np.full((1, 12), -1, np.int64)
    boxes[0, 0], kinds[0, 0] = (0.125, 0.5, 0.25, 1), 7
    data = scripts["detector_data"].TrainingSet(pixels, boxes, kinds)
    batch, labels = data.batch([0, 0], [False, True])
    for picture, label, (left, right) in zip(batch, labels, ((0, 2), (6, 8)), strict=True):
        assert picture[:, :, left:right].min() == 1
        assert picture.sum() == 3 * 8 * 2
        x, _, w, _ = label["boxes"][0].tolist()
        assert ((x - w / 2) * 8, (x + w / 2) * 8) == (left, right)
        assert label["class_labels"].tolist() == [7]


def test_true_boxes_have_full_precision_and_missed_small_ones_none(scripts):
    part = scripts["average_precision"]
    scenes = [sample_scene(f"precision/{number}") for number in range(6)]
    limit = 0.02 * 240 * 208

    def all_of(scene, *, above: float):
        chosen = [item for item in scene.objects if scene.area(item) * 240 * 208 > above]
        corners = np.array([item.box for item in chosen], np.float32).reshape(-1, 4)
        labels = np.array([part.LABELS.index(item.kind) for item in chosen], np.int64)
        return part.Found(corners, np.ones(len(chosen), np.float32), labels)

    right = part.precision(scenes, [all_of(scene, above=0) for scene in scenes], small=0.02)
    for name in ("ap", "ap50", "ap_small", "recall50", "recall50_small"):
        assert right[name] == pytest.approx(100), name
    large_only = part.precision(scenes, [all_of(scene, above=limit) for scene in scenes], small=0.02, one_class=True)
    small = sum(scene.area(item) * 240 * 208 <= limit for scene in scenes for item in scene.objects)
    total = sum(len(scene.objects) for scene in scenes)
    assert 0 < small < total
    assert large_only["ap_small"] == large_only["recall50_small"] == 0
    assert large_only["recall50"] == pytest.approx(100 * (total - small) / total)


def test_of_boxes_on_the_same_place_the_best_is_kept_whatever_its_class(scripts):
    part = scripts["average_precision"]
    # IoU of the first two: 9 × 10 / (10 × 10) = 0.9; of the first and the third: 5 × 10 / (15 × 10) = 1/3
    boxes = np.array([[0, 0, 10, 10], [0, 0, 9, 10], [5, 0, 15, 10], [50, 50, 60, 60], [80, 80, 90, 90]], np.float32)
    found = part.Found(boxes, np.array([0.5, 0.9, 0.6, 0.2, 0.4], np.float32), np.arange(5))
    assert part.kept(found, threshold=0.3, overlap=0.7, most=32).labels.tolist() == [1, 2, 4]
    assert part.kept(found, threshold=0.3, overlap=0.95, most=32).labels.tolist() == [1, 2, 0, 4]
    assert part.kept(found, threshold=0.0, overlap=0.7, most=2).labels.tolist() == [1, 2]
    assert part.kept(found, threshold=0.95, overlap=0.7, most=32).boxes.shape == (0, 4)


@pytest.fixture(scope="module")
def shipped():
    from transformers import AutoImageProcessor, AutoModelForObjectDetection

    return AutoModelForObjectDetection.from_pretrained(SHIPPED).eval(), AutoImageProcessor.from_pretrained(SHIPPED)


def test_the_shipped_detector_finds_the_objects_of_scenes_that_nobody_has_drawn_before(scripts, shipped):
    part = scripts["average_precision"]
    scenes = [sample_scene(f"fresh/{number}") for number in range(50)]
    found = list(part.detect(*shipped, [part.as_written(scene) for scene in scenes], 0.0))
    assert part.precision(scenes, found)["ap50"] >= LEAST_AP50


LEAST_AP50 = 85
"""Percent. The card says 94.6 on 1,000 scenes; 50 of them, with 15 objects of a class, give a few points more or
less."""


def test_training_pictures_are_made_as_the_stock_processor_makes_them(scripts, shipped):
    picture = scripts["detector_data"].as_written(sample_scene("a picture for the processor"))
    side = scripts["train"].SIDE
    ours = np.asarray(picture.resize((side, side), Image.Resampling.BILINEAR)).transpose(2, 0, 1) / 255
    stock = shipped[1](images=picture, return_tensors="np")["pixel_values"][0]
    np.testing.assert_allclose(stock, ours, rtol=0, atol=1e-6)  # float32 against float64


def test_the_card_is_what_its_scripts_make_of_the_measurements(scripts):
    report = json.loads((FOLDER / "evaluation.json").read_text(encoding="utf-8"))
    run = json.loads((FOLDER / "run.json").read_text(encoding="utf-8"))
    text = (SHIPPED / "README.md").read_text(encoding="utf-8")
    assert text == scripts["card"].card(SHIPPED, report, run)
    assert report["sha256"] == sha256_of(SHIPPED / "model.safetensors")
    assert report["pictures"] == 1000
    assert f"{report['by_class']['ap']:.1f} | {report['by_class']['ap50']:.1f}" in text
    assert "{{" not in text


def test_boxes_are_written_as_qpert_reads_them(scripts, tmp_path):
    file = tmp_path / "boxes.jsonl"
    file.write_text("\n".join(scripts["boxes"].box_lines(SHIPPED, "test", 4, Silent())))
    write_dataset(tmp_path, "test", 4)
    dataset, table = read_dataset(tmp_path, "test"), read_box_file(file)
    for name, path in zip(dataset.names, dataset.images, strict=True):
        found = table.for_image(name, Image.open(path).size)
        assert len(found) > 0
        assert (found.scores >= 0.3).all()
