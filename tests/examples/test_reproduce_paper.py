"""`examples/reproduce_paper.py` from export to table, on stand-in trees of the real layout and a small random model."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_model import OPTIONS, VOCABULARY, tiny_checkpoint

from qpert.runtime.scenes import write_dataset

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "examples" / "reproduce_paper.py"
PUBLISHED = json.loads((SCRIPT.parents[1] / "runtime" / "evaluation" / "published.json").read_text(encoding="utf-8"))
IMAGES = 16


def reproduce(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, arguments)], capture_output=True, text=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for layout in ("flickr30k", "coco"):
        for split in ("val", "test"):
            write_dataset(root / layout, split, IMAGES, layout=layout)
    tiny_checkpoint(root / "tiny.pth")
    return root


@pytest.fixture(scope="module")
def options(data: Path) -> list[object]:
    heads = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in OPTIONS.items())
    export = f"--tokenizer {VOCABULARY} --max-length 32 {heads}"
    return ["--checkpoint", data / "tiny.pth", "--export-options", export, "--limit", IMAGES]


@pytest.fixture(scope="module")
def out(data: Path, options: list[object], made_once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    def make(folder: Path) -> None:
        answer = reproduce(data, *options, "--out", folder)
        assert answer.returncode == 0, answer.stderr[-3000:]

    return made_once("reproduced", make)


def test_the_table_holds_every_row_with_the_papers_figures_beside_it(out: Path) -> None:
    rows = json.loads((out / "table.json").read_text())
    kinds = [(row["dataset"], row["row"]) for row in rows]
    assert kinds == [
        ("flickr30k", "stock"),
        ("flickr30k", "entities"),
        ("flickr30k", "release"),
        ("coco", "stock"),
        ("coco", "entities"),
        ("flickr30k", "ablation-strength"),
        ("flickr30k", "ablation-threshold"),
    ]
    assert rows[0]["paper"]["t2i"]["r1"] == 89.76
    assert rows[2]["paper"]["t2i"]["r1"] == 89.88
    assert rows[3]["paper"]["i2t"]["mr10"] == 98.86
    assert all(row["images"] == IMAGES for row in rows[:5])
    page = (out / "table.md").read_text()
    assert "/ 89.76" in page
    assert "A rehearsal on 16 pictures" in page
    assert (out / "table.html").read_text().startswith("<!")


def test_measured_figures_are_those_of_the_steps(out: Path) -> None:
    rows = {(row["dataset"], row["row"]): row for row in json.loads((out / "table.json").read_text())}
    for dataset, kind in (("flickr30k", "stock"), ("flickr30k", "entities"), ("coco", "stock"), ("coco", "entities")):
        step = json.loads((out / "steps" / f"{dataset}-{kind}.json").read_text())
        assert rows[dataset, kind]["measured"]["t2i"] == step["t2i"]
    report = json.loads((out / "calibrated-flickr30k" / "manifest.json").read_text())
    assert report["calibration"]["dataset"]["split"] == "val"
    strength = rows["flickr30k", "ablation-strength"]["cells"]
    assert {(one["weight"], one["alpha"]) for one in strength} == {
        (weight, alpha) for weight in ("S", "1-S", "S-0.5", "0.5-S", "constant") for alpha in (2, 4, 6, 8, 10)
    }
    assert [one["paper_mr1"] for one in strength[:2]] == [88.73, 88.65]


def test_the_same_command_repeats_nothing(data: Path, options: list[object], out: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (out / "steps").iterdir()}
    answer = reproduce(data, *options, "--out", out)
    assert answer.returncode == 0
    assert "==" not in answer.stderr
    assert {path: path.stat().st_mtime_ns for path in (out / "steps").iterdir()} == before


def test_incomplete_data_stops_before_any_work(tmp_path: Path) -> None:
    answer = reproduce(tmp_path, "--out", tmp_path / "out")
    assert answer.returncode == 1
    assert "qpert data check" in answer.stderr
    assert not (tmp_path / "out").exists()
    assert reproduce(tmp_path / "nowhere").returncode == 2


def test_a_dry_run_shows_every_command(tmp_path: Path) -> None:
    answer = reproduce(tmp_path, "--dry-run", "--coco-boxes", "coco.jsonl")
    assert answer.returncode == 0
    lines = answer.stdout.splitlines()
    assert len(lines) == 12
    assert all(line.startswith("qpert ") for line in lines)
    assert any("--boxes coco.jsonl --bin-boxes coco.jsonl" in line for line in lines)


def test_the_ablations_beside_are_the_papers() -> None:
    """The shared column is what the settings of both tables are inferred from; the highest cell is one by hand."""
    published = json.loads((SCRIPT.parent / "paper_ablations.json").read_text(encoding="utf-8"))
    strength, threshold = published["alpha"], published["threshold"]
    assert [row[-1] for row in strength["mr1"]] == [row[-1] for row in threshold["mr1"]]
    assert strength["values"][-1] == threshold["alpha"]
    assert threshold["values"][-1] == strength["threshold"]
    assert max(max(row) for row in threshold["mr1"]) == 89.16
