"""What `make demo` chooses to show, by hand-made ranks, and the page it makes of it."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qpert.runtime.inputs.boxes import Boxes

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def demo():
    sys.path.insert(0, str(EXAMPLES))
    try:
        yield importlib.import_module("demo")
    finally:
        sys.path.remove(str(EXAMPLES))


def test_what_moved_most_comes_first_in_either_direction(demo):
    before, after = np.array([99, 9, 0, 4, 149]), np.array([0, 4, 9, 4, 2])
    assert demo.chosen(before, after) == [0, 4, 1], "100 → 1, 150 → 3, 10 → 5; ranks count from 0"
    assert demo.chosen(after, before) == [2]
    assert demo.one_a_picture([4, 1, 0, 3, 2], np.array([7, 7, 8, 8, 7])) == [4, 3]


def test_the_table_gives_recall_and_the_interval_of_the_difference(demo):
    pictures = demo.SCENES
    owners = {"smallest": np.arange(pictures), "usual": np.arange(pictures)}
    never, always = np.full(pictures, 3), np.zeros(pictures, np.int64)
    half = np.where(np.arange(pictures) % 2, 0, 3)
    ranks = {
        demo.WITHOUT: {"smallest": never, "usual": always},
        demo.DETECTED: {"smallest": half, "usual": always},
        demo.TRUE: {"smallest": always, "usual": half},
    }
    without, detected, true = demo.conditions(ranks, owners, np.full(pictures, 0.05))
    assert (without.smallest, detected.smallest, true.smallest) == (0, 50, 100)
    assert (without.usual, detected.usual, true.usual) == (100, 100, 50)
    low, high = detected.smallest_interval
    # A share of one half of 200 has a standard error of 3.5 points.
    assert 40 < low < 45
    assert 55 < high < 60
    assert true.smallest_interval == (100, 100)
    assert detected.usual_interval == (0, 0)


def test_the_page_shows_both_directions_and_leads_with_the_figures(demo, tmp_path):
    page = importlib.import_module("demo_page")
    Image.new("RGB", (60, 40)).save(tmp_path / "a.png")
    boxes = Boxes([[1, 1, 9, 9], [20, 5, 30, 30]], (60, 40))
    cases = [
        page.Case("a red star", tmp_path / "a.png", boxes, 1, 57, 1),
        page.Case("a blue <ring>", tmp_path / "a.png", boxes, None, 2, 8),
    ]
    rows = tuple(
        page.Condition(name, value, (1.0, 9.0), 60.0, (-2.0, 3.0))
        for name, value in (("without boxes", 2.1), ("boxes of the detector", 11.9), ("true boxes", 12.5))
    )
    html = page.render(
        page.Page(rows, (cases[0],), (cases[1],), (70, 20, 310), 200, 'qpert search demo/gallery "a red star"', {}, {})
    )
    assert "11.9 %</b> of searches; without boxes, in 2.1 %" in html
    assert "rank 57" in html
    assert "→ 8" in html
    assert "a blue &lt;ring&gt;" in html
    assert html.count('class="matched"') == 1
    assert "not verified" in html
    assert "+1.0 to +9.0" in html
