"""The demonstration's training scripts: losses by hand, a run that resumes, and a checkpoint that can be exported."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from qpert.exporter import demo
from qpert.exporter.checkpoints.checkpoint import load_state
from qpert.exporter.families.blip2.demonstration import open_demo
from qpert.graphs.families.blip2.config import CONFIGS
from qpert.graphs.families.blip2.model import Blip2Retrieval
from qpert.runtime.progress import Silent
from qpert.runtime.scenes import object_map, sample_scene

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parents[2] / "examples" / "demonstration"
MODULES = ("data", "student", "losses", "evaluation", "train")
SCENES = 12


@pytest.fixture(scope="module")
def scripts() -> dict[str, ModuleType]:
    """The scripts as modules: they import each other by their bare names, as they do when they are run."""
    sys.path.insert(0, str(FOLDER))
    try:
        found = {name: importlib.import_module(name) for name in MODULES}
    finally:
        sys.path.remove(str(FOLDER))
    found["data"].SHARD = SCENES
    found["evaluation"].QUICK = 4
    return found


@pytest.fixture(scope="module")
def plan(scripts):
    """One step of each stage is enough to pass every line of the training loop; the second makes a resumed one."""
    stage = scripts["train"].Stage
    stages = (
        stage("grow", 1, 6, 0, 1e-3, contrast=0.0),
        stage("contrast", 1, 6, 2, 1e-3),
        stage("match", 2, 6, 2, 6e-4, match=1.0),
    )
    return scripts["train"].Plan(seed=3, scenes=SCENES, stages=stages)


@pytest.fixture(scope="module")
def whole(scripts, plan, tmp_path_factory) -> Path:
    """The work folder of a run from start to finish."""
    work = tmp_path_factory.mktemp("training")
    scripts["train"].run(plan, work, Silent(), save_every=1e9, evaluate_every=1e9)
    return work


def state_of(work: Path) -> dict:
    return torch.load(work / "checkpoint.pt", weights_only=True)


def test_a_run_interrupted_after_any_step_ends_with_the_weights_of_one_that_was_not(
    scripts, plan, whole, tmp_path, monkeypatch
):
    train = scripts["train"]
    taken = train.Trainer.train_step

    def interrupted(self):
        if self.step == 2 and not (tmp_path / "stopped").exists():
            (tmp_path / "stopped").touch()
            raise KeyboardInterrupt
        return taken(self)

    monkeypatch.setattr(train.Trainer, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.run(plan, tmp_path, Silent(), save_every=0, evaluate_every=1e9)
    assert state_of(tmp_path)["step"] == 2
    train.run(plan, tmp_path, Silent(), save_every=0, evaluate_every=1e9)
    resumed, expected = state_of(tmp_path), state_of(whole)
    assert resumed["step"] == expected["step"] == plan.steps
    for name, tensor in expected["student"].items():
        # one thread count, one order of sums; the learning rate's short warm-up after a resume begins at `warm_from`,
        # which a checkpoint with its optimiser leaves at 0: bit for bit the same
        assert torch.equal(resumed["student"][name], tensor), name


def test_every_stage_changes_the_weights_it_trains_and_leaves_the_others(scripts, plan, whole):
    begun = scripts["student"].new_student(CONFIGS["demo"], plan.seed).state_dict()
    trained = state_of(whole)["student"]
    for name in ("model.itm_head.weight", "model.text_proj.weight", "model.visual_encoder.patch_embed.proj.weight"):
        assert not torch.equal(begun[name], trained[name]), name
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == plan.steps
    assert 0 <= lines[-1]["val_t2i_r1"] <= 100


def test_scenes_of_other_settings_are_refused(scripts, whole):
    with pytest.raises(SystemExit, match="other settings"):
        scripts["data"].prepare(whole / "scenes", SCENES, seed=4, workers=1, progress=Silent())


def test_the_installed_checkpoint_opens_as_the_exporter_opens_it(whole, tmp_path, monkeypatch):
    target = tmp_path / "model.safetensors"
    command = [sys.executable, FOLDER / "install.py", "--work", whole, "--target", target]
    subprocess.run(command, check=True, capture_output=True)
    expected = state_of(whole)["student"]
    monkeypatch.setattr(demo, "MODEL", target)
    with open_demo() as checkpoint:
        tensors = {name: tensor.clone() for name, tensor in load_state(checkpoint).items()}
    assert set(tensors) == {name for name, _ in Blip2Retrieval(CONFIGS["demo"]).named_parameters()}
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor.float(), expected[f"model.{name}"].half().float(), name)


def test_the_contrastive_loss_is_the_mean_of_both_directions(scripts):
    # two images, one text each, similarities times e^0 = 1: rows (1, 0) and (0, 1)
    similarities = torch.eye(2)
    expected = -math.log(math.e / (math.e + 1))  # every row and column is the softmax of (1, 0) at its own place
    got = scripts["losses"].itc_loss(similarities, torch.tensor(0.0))
    assert got.item() == pytest.approx(expected, rel=1e-6)  # float32 against float64


def test_an_images_own_texts_share_its_target(scripts):
    # one image cannot be confused: text to image costs nothing, image to its two texts the softmax over (2, 0)
    got = scripts["losses"].itc_loss(torch.tensor([[2.0, 0.0]]), torch.tensor(0.0))
    each = [-2 + math.log(math.exp(2) + 1), math.log(math.exp(2) + 1)]
    assert got.item() == pytest.approx(sum(each) / 2 / 2, rel=1e-6)


def test_similarity_is_that_of_the_best_query(scripts):
    queries = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[-1.0, 0.0], [0.0, -1.0]]])
    texts = torch.tensor([[0.6, 0.8]])
    assert scripts["losses"].itc_similarities(queries, texts).tolist() == [[pytest.approx(0.8)], [pytest.approx(-0.6)]]


def test_concepts_are_numbered_from_one_and_nought_is_padding(scripts):
    rows = scripts["losses"].many_hot(torch.tensor([[1, 3, 0, 0]]))
    assert rows.nonzero().tolist() == [[0, 0], [0, 2]]


def test_a_patch_is_labelled_with_the_object_that_covers_most_of_it(scripts):
    vision, scene = CONFIGS["demo"].vision, sample_scene("a scene for labels")
    labels = scripts["data"].patch_labels(scene, vision.image_size, vision.grid)
    seen = np.asarray(object_map(scene).resize((vision.image_size,) * 2, 0))
    side = vision.image_size // vision.grid
    kinds = list(scripts["data"].ATTRIBUTES["kind"])
    for patch in range(vision.grid**2):
        row, column = divmod(patch, vision.grid)
        pixels = seen[row * side : (row + 1) * side, column * side : (column + 1) * side]
        counts = [int((pixels == number + 1).sum()) for number in range(len(scene.objects))]
        covered = max(counts) / pixels.size
        assert labels[patch, 0] == (covered >= scripts["data"].LEAST_COVERED)
        if labels[patch, 0]:
            assert labels[patch, 1] == kinds.index(scene.objects[int(np.argmax(counts))].kind)


def test_the_measuring_commands_make_a_card(tmp_path):
    """`evaluate.py` and `card.py` as their help says, on splits of a handful of scenes."""
    report = tmp_path / "report.json"
    sizes = ["--val", "20", "--test", "20", "--rerank", "4", "--no-grid", "--work", tmp_path, "--out", report]
    subprocess.run([sys.executable, FOLDER / "evaluate.py", *map(str, sizes)], check=True, capture_output=True)
    found = json.loads(report.read_text())
    assert found["test"]["stock"]["itc"]["images"] == 20
    assert found["test"]["stock"]["itc"]["texts"] == 100
    assert found["test"]["stock"]["itm_4"]["t2i"]["r1"] > 100 / 20  # better than chance by far: the model is trained
    card = tmp_path / "CARD.md"
    subprocess.run([sys.executable, FOLDER / "card.py", "--report", report, "--out", card], check=True)
    text = card.read_text(encoding="utf-8")
    assert found["sha256"] in text
    assert "20 pictures, 100 captions" in text
    assert "{{" not in text
